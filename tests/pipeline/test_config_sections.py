"""Sections of a project file: what a job's configuration is written as, and read back from, over any preset."""

import tomllib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from ddpm import DDIM, Heun
from jobs import ema, evaluate, prepare_data, sample, train
from pipeline.cluster import ClusterConfig
from pipeline.config_sections import SECTIONS, SHARED, read_section, write_section
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.generation.requests.requests import Inpaint, Partial
from pipeline.presets import PRESETS, Preset, cifar10, digits, imagenet64
from pipeline.project import parse_project, read_preset
from pipeline.tracking.tracking import TrackingConfig
from tests.jobs.every_job import EVERY_JOB


def read(job: Any, text: str, preset: Preset) -> Any:
    """A job's configuration from a file over a preset, as the command line reads it."""
    tables = parse_project(text, "mine.toml")
    config = job.of_preset(read_preset(preset, tables, "mine.toml", job.reads))
    return config if job.section in job.reads else read_section(config, job.section, tables, "mine.toml")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EVERY_JOB)
def test_what_is_written_is_read_back_over_the_same_preset(name: str, preset: str) -> None:
    job = EVERY_JOB[name]
    config = job.of_preset(PRESETS[preset]())
    text = write_section(config, job.section, preset)
    assert tomllib.loads(text)["preset"] == preset
    assert read(job, text, PRESETS[preset]()) == config


@pytest.mark.parametrize("other", PRESETS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("job", [prepare_data.JOB, train.JOB, sample.JOB, evaluate.JOB], ids=lambda job: job.section)
def test_a_main_section_stands_alone_over_any_other_preset(job: Any, preset: str, other: str) -> None:
    """Nothing that the other preset sets shines through, not even where this one has nothing."""
    config = job.of_preset(PRESETS[preset]())
    text = write_section(config, job.section)
    assert read(job, text, PRESETS[other]()) == config


def test_what_differs_from_the_preset_is_written_too() -> None:
    """Shared fields, a request, another sampler, a field that is switched off."""
    tracking, cluster = TrackingConfig(uri="sqlite:///x.db", experiment="e"), ClusterConfig(num_cpus=3)
    images = replace(
        imagenet64().sample, request=Partial(inputs="x", label=3), sampler=Heun(churn=4.0, dynamic_threshold=0.9)
    )
    config = replace(images, tracking=tracking, cluster=cluster, seed=9)
    assert read(sample.JOB, write_section(config, "sample"), digits()) == config
    unset = replace(config, sampler=replace(config.sampler, dynamic_threshold=None), cluster=ClusterConfig())
    text = write_section(unset, "sample")
    start = replace(digits(), sample=config)
    assert read(sample.JOB, text, start) == unset


def test_shared_fields_stand_on_top_and_inner_sections_beside_their_owner() -> None:
    preset = replace(digits(), sample=replace(digits().sample, request=Inpaint(inputs="x", mask="centre")))
    config = EvaluateConfig(dataset="d", sample=preset.sample.images, seed=7)
    tables = tomllib.loads(write_section(config, "evaluate", "digits"))
    assert list(tables) == ["preset", "dataset", "tracking", "cluster", "sample", "evaluate"]
    assert (tables["dataset"], tables["evaluate"]["seed"]) == ("d", 7)
    assert tables["sample"]["request"]["mask"] == "centre" and "sample" not in tables["evaluate"]
    sweep = tomllib.loads(write_section(ema.JOBS["sweep"].of_preset(digits()), "ema_sweep"))
    assert [name for name in sweep if name in SECTIONS] == ["ema_sweep"], "a study starts from [sample], and changes it"
    assert sweep["ema_sweep"]["sample"]["shard_size"] == 125 and "sample" not in sweep["ema_sweep"]["evaluate"]
    benchmark = tomllib.loads(write_section(EVERY_JOB["benchmark train"].of_preset(digits()), "benchmark_train"))
    assert [name for name in benchmark if name in SECTIONS] == ["benchmark_train"]
    assert benchmark["benchmark_train"]["train"]["data"]["lanes"] == 4


def test_passwords_are_left_out_of_a_file() -> None:
    """Of the one field that may hold one, and of a text that mentions one; all else is read back as it was."""
    uri = "postgresql://me:secret-word@host/db?sslpassword=secret-word&x=1"
    config = replace(digits().sample, tracking=TrackingConfig(uri=uri), model="s3://bucket/a@b/run:1@2")
    text = write_section(config, "sample", "digits")
    assert "secret-word" not in text
    shown = TrackingConfig(uri="postgresql://***@host/db?sslpassword=***&x=1")
    assert read(sample.JOB, text, digits()) == replace(config, tracking=shown)


def test_every_section_is_a_jobs_and_every_job_has_one() -> None:
    assert sorted(job.section for job in EVERY_JOB.values()) == sorted(SECTIONS)
    assert tuple(one.name for one in fields(Preset)) == SECTIONS[:4], "those of a preset come first"


def test_evaluate_takes_sample_as_its_base_and_may_override_it() -> None:
    text = "[sample]\nseed = 5\nimages_per_class = 3\n[sample.sampler]\nnum_steps = 9\n"
    own = text + "[evaluate]\nseed = 6\n[evaluate.sample]\nseed = 7\n[evaluate.sample.sampler]\nname = 'heun'\n"
    sampled, evaluated = read(sample.JOB, own, digits()), read(evaluate.JOB, own, digits())
    assert (sampled.seed, sampled.sampler) == (5, DDIM(num_steps=9))
    assert (evaluated.seed, evaluated.sample.seed, evaluated.sample.images_per_class) == (6, 7, 3)
    assert evaluated.sample.sampler == Heun(num_steps=9)
    assert read(evaluate.JOB, text, digits()).sample == read(sample.JOB, text, digits()).images


@pytest.mark.parametrize("name", ["compare samplers", "figures", "ema sweep"])
def test_studies_take_sample_and_their_own_override_of_it(name: str) -> None:
    """What [evaluate.sample] says is for evaluate alone."""
    job = EVERY_JOB[name]
    text = "[sample]\nseed = 5\nshard_size = 30\n[evaluate.sample]\nseed = 7\nbatch_size = 9\n"
    config = read(job, text, digits())
    assert (config.sample.seed, config.sample.shard_size, config.sample.batch_size) == (5, 30, 125)
    config = read(job, f"{text}[{job.section}.sample]\nseed = 8\n", digits())
    assert (config.sample.seed, config.sample.shard_size) == (8, 30)


def test_a_sweep_measures_as_evaluate_says() -> None:
    job = ema.JOBS["sweep"]
    text = (
        "[evaluate]\nseed = 6\neps_images_per_t = 9\n[ema_sweep]\nsigma_rels = [0.1]\n[ema_sweep.evaluate]\nseed = 8\n"
    )
    config = read(job, text, digits())
    assert (config.evaluate.seed, config.evaluate.eps_images_per_t, config.sigma_rels) == (8, 9, (0.1,))


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("job", [train.JOB, sample.JOB, evaluate.JOB], ids=lambda job: job.section)
def test_shared_keys_are_refused_inside_a_section(job: Any, shared: str) -> None:
    value = '"d"' if shared == "dataset" else "{}"
    with pytest.raises(ConfigError) as caught:
        read(job, f"[{job.section}]\n{shared} = {value}\n", digits())
    place = f"mine.toml: {job.section}.{shared}: is shared by all jobs, got it in [{job.section}]"
    assert str(caught.value) == f"{place}; write it on top of the file"


def test_they_are_refused_in_an_inner_section_too() -> None:
    with pytest.raises(
        ConfigError, match=r"^mine\.toml: sample\.tracking: is shared by all jobs, got it in \[sample\]"
    ):
        read(evaluate.JOB, "[sample.tracking]\nuri = 'x'\n", digits())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[sample]\nsede = 1", "sample.sede: unknown key; did you mean 'seed'?"),
        ("[sample]\nseed = -1", "sample.seed: must be in [0, 2^64), got -1"),
        ("[sample.train]\nsteps = 3", "sample.train: unknown key"),
        ("[evaluate.samples]\nseed = 3", "evaluate.samples: unknown key; did you mean 'sample'?"),
        ("[evaluate.sample]\nsede = 3", "evaluate.sample.sede: unknown key; did you mean 'seed'?"),
        ("[evaluate.sample.sampler]\nname = 'hein'", "evaluate.sample.sampler.name: must be one of ancestral, "),
        ("[cluster]\nnum_cpus = 0", "cluster.num_cpus: at least 1, got 0"),
        ("dataset = 3", "dataset: Input should be a valid string, got 3"),
    ],
)
def test_mistakes_are_one_line_with_the_place_in_the_file(text: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(evaluate.JOB, text, digits())
    assert str(caught.value).startswith(f"mine.toml: {rule}"), caught.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    steps: int = 1
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    dataset: str = "a"
    train: Inner = field(default_factory=Inner)
    rounds: int = 2


def test_shared_fields_reach_every_depth() -> None:
    tables = tomllib.loads(
        "dataset = 'b'\n[cluster]\nnum_cpus = 3\n[train]\nsteps = 4\n[benchmark_train]\nrounds = 5\n"
    )
    read_back = read_section(Outer(), "benchmark_train", tables, "x")
    assert read_back == Outer(dataset="b", train=Inner(steps=4, cluster=ClusterConfig(num_cpus=3)), rounds=5)
    assert read_section(
        Outer(), "benchmark_train", tomllib.loads(write_section(read_back, "benchmark_train")), "x"
    ) == (read_back)
    assert read_section(cifar10().train, "train", {}, "x") == cifar10().train
