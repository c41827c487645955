"""One file for a project: every job reads its part of it, and no mistake in it goes unnoticed where it matters."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm import DDIM, Ancestral, DiTConfig, Heun
from jobs import evaluate, prepare_data, sample, train
from jobs.cli import run_job
from pipeline.cluster import ClusterConfig
from pipeline.config_io import read_toml, to_toml
from pipeline.config_sections import SECTIONS, SHARED
from pipeline.errors import ConfigError
from pipeline.generation.sample_config import SampleConfig
from pipeline.models.registry import resolve_model
from pipeline.presets import PRESETS, digits
from pipeline.project import parse_project, read_preset
from pipeline.tracking.tracking import TrackingConfig
from tests.jobs.every_job import EVERY_JOB, describes_nothing, resolve
from tests.pipeline.runs_in_process import run
from tests.pipeline.tiny_models import write_model

PROJECT = """
preset = "cifar10"
dataset = "s3://images/cats"

[tracking]
uri = "sqlite:///cats.db"
experiment = "cats"

[cluster]
num_cpus = 3

[prepare]
source = "photos"
shard_size = 77

[train]
output = "s3://models/cats"
steps = 9
[train.network]
name = "dit"
patch_size = 4
[train.grid_sampler]
num_steps = 3

[sample]
model = "models:/cats@champion"
seed = 5
images_per_class = 33
[sample.sampler]
name = "heun"
num_steps = 7

[evaluate]
seed = 6
[evaluate.sample]
images_per_class = 44

[calibrate]
terms_per_image = 2

[compare_samplers]
evaluations = [3, 9]

[compare_bounds]
max_images = 8

[figures]
max_bound_images = 4

[ema_reconstruct]
sigma_rel = 0.05

[ema_sweep]
sigma_rels = [0.1]

[benchmark_train]
rounds = 1
"""
TRACKING = TrackingConfig(uri="sqlite:///cats.db", experiment="cats")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "project.toml").write_text(PROJECT)
    return str(tmp_path / "project.toml")


def test_every_job_reads_what_is_shared(project: str) -> None:
    for name, job in EVERY_JOB.items():
        config = resolve(job, "--config", project)
        if name == "benchmark train":
            config = config.train
        assert getattr(config, "dataset", "s3://images/cats") == "s3://images/cats", name
        assert getattr(config, "tracking", TRACKING) == TRACKING, name
        assert getattr(config, "cluster", ClusterConfig(num_cpus=3)) == ClusterConfig(num_cpus=3), name
    assert resolve(prepare_data.JOB, "--config", project).cluster.num_cpus == 3
    for shared, jobs in {"tracking": "train sample evaluate calibrate", "cluster": "prepare_data train sample"}.items():
        assert all(hasattr(resolve(EVERY_JOB[name], "--config", project), shared) for name in jobs.split())


def test_every_job_reads_its_own_part(project: str) -> None:
    configs: dict[str, Any] = {name: resolve(job, "--config", project) for name, job in EVERY_JOB.items()}
    prepare, made = configs["prepare_data"], configs["sample"]
    assert (prepare.source, prepare.shard_size, prepare.seed) == ("photos", 77, 0)
    trained = configs["train"]
    assert (trained.output, trained.steps, trained.run_name) == ("s3://models/cats", 9, "cifar10")
    assert trained.network == DiTConfig(patch_size=4) and trained.grid_sampler == DDIM(num_steps=3)
    assert (made.model, made.seed, made.images_per_class) == ("models:/cats@champion", 5, 33)
    assert made.sampler == Heun(num_steps=7), "the preset's is Ancestral(num_steps=1000)"
    evaluated = configs["evaluate"]
    assert (evaluated.seed, evaluated.sample.seed, evaluated.sample.images_per_class) == (6, 5, 44)
    assert evaluated.sample.sampler == made.sampler
    assert configs["calibrate"].terms_per_image == 2 and configs["calibrate"].model == made.model
    compared = configs["compare samplers"]
    assert (compared.evaluations, compared.sample.images_per_class, compared.sample.seed) == ((3, 9), 33, 5)
    assert (configs["compare bounds"].max_images, configs["compare bounds"].model) == (8, made.model)
    figures = configs["figures"]
    assert (figures.max_bound_images, figures.evaluations, figures.sample.images_per_class) == (
        4,
        (5, 10, 20, 50, 250, 1000),
        33,
    )
    assert (configs["ema reconstruct"].sigma_rel, configs["ema reconstruct"].run) == (0.05, "s3://models/cats")
    sweep = configs["ema sweep"]
    assert (sweep.sigma_rels, sweep.run, sweep.evaluate.seed, sweep.sample.images_per_class) == (
        (0.1,), "s3://models/cats", 6, 33,
    )  # fmt: skip
    assert (configs["benchmark train"].rounds, configs["benchmark train"].train.network) == (1, trained.network)


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        ("prepare", "prepare_data", "shrad_size"),
        ("train", "train", "stepz"),
        ("sample", "sample", "sede"),
        ("evaluate", "evaluate", "sede"),
        ("calibrate", "calibrate", "terms"),
        ("ema_sweep", "ema sweep", "sigma_rel"),
    ],
)
def test_a_mistake_stops_the_jobs_that_read_its_section_and_no_other(
    section: str, name: str, key: str, project: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(project).read_text()
    assert f"[{section}]\n" in text
    Path(project).write_text(text.replace(f"[{section}]\n", f"[{section}]\n{key} = 3\n"))
    for other, job in EVERY_JOB.items():
        reads = {*job.reads, job.section, *(["sample"] if "evaluate" in job.reads else [])}
        if section in reads:
            assert run_job(describes_nothing(job), ["--config", project, "--dry-run"]) == 2, other
            assert f"error: {project}: {section}.{key}: unknown key" in capsys.readouterr().err
        else:
            resolve(job, "--config", project)
    assert section in {*EVERY_JOB[name].reads, EVERY_JOB[name].section}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[trian]\nsteps = 3", "trian: unknown name; did you mean 'train'?"),
        ("[compare_sampler]\nx = 3", "compare_sampler: unknown name; did you mean 'compare_samplers'?"),
        ("datset = 'x'", "datset: unknown name; did you mean 'dataset'?"),
        ("[zzz]", "zzz: unknown name; known: preset, dataset, tracking, cluster, prepare, "),
        ("train = 3", "train: must be a section, [train], got 3; write a table"),
        ("preset = 3", "preset: must be a name in quotes, got 3"),
        ("preset = ['digits']", "preset: must be a name in quotes, got ['digits']"),
        ("[train", "not valid TOML: "),
    ],
)
def test_names_on_top_are_checked_whoever_reads_the_file(text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_project(text, "mine.toml")
    assert str(caught.value).startswith(f"mine.toml: {rule}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("job", "key", "home"),
    [
        (train.JOB, "steps", "[train]"),
        (train.JOB, "network", "[train]"),
        (sample.JOB, "images_per_class", "[sample]"),
        (evaluate.JOB, "eps_images_per_t", "[evaluate]"),
        (prepare_data.JOB, "held_out_fraction", "[prepare]"),
        (sample.JOB, "shard_size", "[prepare] or [sample]"),
        (train.JOB, "output", "[train] or [sample]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_old_without_sections_is_told_where_its_keys_belong(job: Any, key: str, home: str) -> None:
    old = to_toml(job.of_preset(digits()))
    assert f"\n{key} = " in f"\n{old}" or f"[{key}]" in old or key == "held_out_fraction"
    with pytest.raises(ConfigError, match=r"^old\.toml: \w+: stands in a section, got it on top; write it below \["):
        parse_project(old, "old.toml")
    with pytest.raises(ConfigError) as caught:
        parse_project(f"{key} = 3\n", "old.toml")
    assert str(caught.value) == f"old.toml: {key}: stands in a section, got it on top; write it below {home}"


def test_an_empty_file_is_the_preset() -> None:
    for text in ("", "".join(f"[{section}]\n" for section in (*SECTIONS, "tracking", "cluster"))):
        tables = parse_project(text, "mine.toml")
        for make in PRESETS.values():
            assert read_preset(make(), tables, "mine.toml", SECTIONS[:4]) == make()
    assert set(SHARED).isdisjoint(SECTIONS)


def test_only_the_sections_that_are_asked_for_are_read() -> None:
    tables = parse_project("[sample]\nseed = 5\n[train]\nseed = 6\n", "mine.toml")
    only = read_preset(digits(), tables, "mine.toml", ("sample",))
    assert (only.sample.seed, only.train, only.evaluate) == (5, digits().train, digits().evaluate)
    assert read_preset(digits(), tables, "mine.toml", ("evaluate",)).evaluate.sample.seed == 5


def test_the_file_beside_finished_images_makes_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a project file: `sample` and `evaluate` take it, and flags change it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = SampleConfig(
        model=write_model(tmp_path / "model"),
        output=str(tmp_path / "out"),
        images_per_class=2,
        sampler=Ancestral(num_steps=3, variance="fixed_large"),
        shard_size=6,
        batch_size=6,
        tracking=TRACKING,
        cluster=ClusterConfig(num_cpus=2),
    )
    result, _ = run(config)
    stored = str(Path(result.store.uri) / "config.toml")
    assert resolve(sample.JOB, "--config", stored) == config
    assert resolve(sample.JOB, "--config", stored, "--preset", "imagenet64") == config
    assert resolve(sample.JOB, "--config", stored, "--seed", "8").seed == 8
    assert resolve(evaluate.JOB, "--config", stored).sampling == config
    assert resolve_model(config.model, TRACKING).files.digest == result.manifest.spec.model_digest
    with pytest.raises(ConfigError, match="sample: unknown key"):
        read_toml(SampleConfig, Path(stored).read_text(), "config.toml")
