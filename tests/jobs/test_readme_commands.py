"""Every command of the pages is accepted: in a project that has what they name, each job resolves, plans and says 0.

Dry runs start nothing, so that all of it happens in this process. What has no dry run is listed, with the reason.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm import DiTConfig, ModelConfig, ScheduleConfig, UNetConfig, build_network
from ddpm.networks.cost import cost_key
from ddpm.networks.memory import StepMemory, step_memory
from jobs import output
from jobs.benchmark_gpu import make_parser
from jobs.cli import run_job
from pipeline.config_io import to_json
from pipeline.data.manifest import DatasetManifest, Split, write_manifest
from pipeline.data.shard_table import ShardRecord
from pipeline.models.calibration import Calibration
from pipeline.models.model_files import ModelCard, encode_model
from pipeline.models.registration import register_model
from pipeline.models.registry import resolve_model
from pipeline.presets import PRESETS, Preset
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from pipeline.training import cost_plan
from tests.fixtures_s3 import S3Server
from tests.jobs.every_job import EVERY_JOB
from tests.jobs.readme_commands import ROOT, commands, flags, job_words, page_texts
from tests.jobs.readme_flags import WITH_FLAGS
from tests.pipeline.training.small_runs import make_run

pytestmark = pytest.mark.xdist_group("readme commands")  # one project for all

TEXTS = page_texts()
COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))
EVERY = list({tuple(words): command for command in COMMANDS if (words := job_words(command))}.values())
# Jobs without a configuration.
OF_A_GPU = [command for command in EVERY if job_words(command)[:2] == ["benchmark", "gpu"]]
OF_OUTPUTS = [command for command in EVERY if job_words(command)[0] == "output"]
JOBS = [command for command in EVERY if command not in OF_A_GPU + OF_OUTPUTS]
FLAGS = list(dict.fromkeys(span for text in TEXTS.values() for span in flags(text)))

# Programs without a dry run: what is checked of them instead, and who runs them.
NO_DRY_RUN = {
    "make ": "targets exist (below); `.ci/run` makes check, test and test-services, and people the others",
    "pytest": "the files exist (tests/test_readme.py); `make test` and `make test-long` run them",
    "python -m pytest": "as pytest",
    ".ci/run": "is the checks themselves",
    "ray start": "is Ray's own, with flags of the cluster's makers",
    "ray job stop": "tests/integration/test_submit.py stops one",
    "ray drain-node": "tests/integration/test_failures.py drains one",
    "ray job submit": "what it runs is a command of its own here; tests/integration/test_submit.py submits one",
}
# What a reader fills in.
VALUES = {
    "s3://images": "{bucket}/images",
    "s3://models": "{bucket}/models",
    "ddpm-digits/N": "ddpm-digits/2",
    "ddpm-digits/M": "ddpm-digits/1",
    "--source FOLDER --image-size 64 --dataset ...": "--source photos --image-size 64 --dataset artifacts/x",
    "--sample.calibration ...": "--sample.calibration artifacts/digits/train/calibration.json",
    "--post-hoc-ema.snapshot-interval-steps ...": "--post-hoc-ema.snapshot-interval-steps 10",
}
FLAGS_TESTED_ELSEWHERE = {
    "--help": "tests/jobs/test_cli.py asks every job for it",
    "--config photos.toml": "the README's own file, below",
    "--preset": "in the commands",
    "--anonymous-source": "tests/pipeline/stores/test_anonymous.py has a public bucket",
    "--fork-from models:/ddpm/3": "tests/pipeline/training/test_fork.py and test_claim.py have models that fit",
    f"--preset {' | '.join(PRESETS)}": "names every preset, as it stands here",
}
OWN_NETWORK = """
import torch

class Network(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x_t, t, label):
        return self.layer(x_t)

def factory(image_size, channels, num_classes):
    return Network(channels)
"""

# Bytes of a PNG in its tar, headers and label included. Measured on digits; the others are usual for photographs.
BYTES_PER_IMAGE = {"digits": 2_100, "cifar10": 4_600, "imagenet64": 11_000, "celebahq256": 115_000}
NUM_IMAGES = {"digits": 1_797, "cifar10": 50_000, "imagenet64": 1_281_167, "celebahq256": 30_000}
NUM_CLASSES = {"digits": 10, "imagenet64": 1000}


def realistic_manifest(preset: Preset, name: str, shard_size: int | None = None) -> DatasetManifest:
    """What `prepare` would have written of the real images: how many, in shards of how many bytes."""
    size = shard_size or preset.prepare.shard_size
    num_held_out = NUM_IMAGES[name] // 10
    splits = {}
    for split, total in (("train", NUM_IMAGES[name] - num_held_out), ("held_out", num_held_out)):
        counts = [min(size, total - first) for first in range(0, total, size)]
        splits[split] = Split(
            shards=tuple(
                ShardRecord(
                    key=f"{split}/{number:09d}-0123456789abcdef.tar",
                    size_bytes=count * BYTES_PER_IMAGE[name],
                    sha256="0" * 64,
                    num_samples=count,
                )
                for number, count in enumerate(counts)
            )
        )
    return DatasetManifest(
        name=name,
        source=preset.prepare.source,
        image_size=preset.prepare.image_shape[:2],
        channels=preset.prepare.image_shape[2],
        class_names=tuple(f"class {index:04d}" for index in range(NUM_CLASSES.get(name, 0))),
        splits=splits,
        num_quarantined=0,
    )


def small_model(preset: Preset, manifest: DatasetManifest) -> ModelConfig:
    """A model for the preset's images, classes and variance that is made in milliseconds."""
    learned = preset.train.network.learned_variance
    network: UNetConfig | DiTConfig = UNetConfig(
        base_channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_groups=4,
        learned_variance=learned,
    )
    if preset.train.network.name == "dit":
        network = DiTConfig(patch_size=4, hidden_size=8, depth=1, num_heads=1, learned_variance=learned)
    return ModelConfig(
        network=network,
        schedule=preset.train.schedule,
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=manifest.num_classes if preset.train.class_conditional else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Project:
    """A folder in which the commands of the pages make sense."""

    folder: Path
    bucket: str

    def register(self, name: str, config: ModelConfig, class_names: tuple[str, ...], seed: int = 0) -> None:
        tracking = TrackingConfig(uri=f"sqlite:///{self.folder}/artifacts/mlflow.db")
        card = ModelCard(config=config, class_names=class_names if config.num_classes else ())
        files = encode_model(card, build_network(config, seed=seed).state_dict(), None)
        run = TrackingRun.open(tracking, new_run_key(), name)
        register_model(run, files, name)
        if name == "ddpm-digits" and seed == 0:
            register_model(run, files, name, "champion")
        run.finish("FINISHED")


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """A hundred commands are of a few networks: the memory of each is counted once."""
    known: dict[str, StepMemory] = {}

    def count(config: ModelConfig, batch: int, **how: bool) -> StepMemory:
        key = f"{cost_key(config)} {batch} {how}"
        if key not in known:
            known[key] = step_memory(config, batch, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_plan, "step_memory", count)
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Project:
    """The README's photos, the presets' images, datasets and models, and a digits run with snapshots."""
    folder = tmp_path_factory.mktemp("project")
    made = Project(folder=folder, bucket=s3_server.uri)
    for source in ("photos", *(f"data/{name}" for name in NUM_IMAGES if name != "digits")):
        for label in ("bright", "dark"):
            (folder / source / label).mkdir(parents=True)
            for number in range(12):
                (folder / source / label / f"{number}.png").touch()
    (folder / "package").mkdir()
    (folder / "package" / "module.py").write_text(OWN_NETWORK)
    (folder / "labels.csv").write_text("label,noise_id,id\nclass 0003,7,a-1\n3,,\n")
    manifests = {name: realistic_manifest(PRESETS[name](), name) for name in NUM_IMAGES}
    photos = dataclasses.replace(manifests["cifar10"], name="photos", class_names=("bright", "dark"))
    for place, manifest in [
        *((f"{folder}/artifacts/{name}/dataset", manifest) for name, manifest in manifests.items()),
        (f"{folder}/artifacts/photos/dataset", photos),
        (f"{s3_server.uri}/images/cifar10", manifests["cifar10"]),
    ]:
        write_manifest(open_store(place), manifest)
    for name, make in PRESETS.items():
        manifest = manifests[name.removesuffix("_dit")]
        for seed in range(2 if name == "digits" else 1):  # versions 1 and 2
            made.register(f"ddpm-{name}", small_model(make(), manifest), manifest.class_names, seed)
    colour = dataclasses.replace(small_model(PRESETS["cifar10"](), photos), schedule=ScheduleConfig(name="cosine"))
    made.register("photos", colour, photos.class_names)
    make_run(folder / "artifacts/digits/train", steps=32)
    digits = resolve_model("models:/ddpm-digits/2", TrackingConfig(uri=f"sqlite:///{folder}/artifacts/mlflow.db"))
    measured = Calibration(
        model_digest=digits.files.digest,
        dataset_digest=manifests["digits"].digest,
        num_images=10,
        clip_x_0=True,
        x_0_error=tuple(0.5 for _ in range(1000)),
    )
    (folder / "artifacts/digits/train/calibration.json").write_bytes(to_json(measured))
    return made


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield project
    for name in [name for name in sys.modules if name.split(".")[0] == "package"]:
        del sys.modules[name]


def dry_run(project: Project, command: str, *more: str) -> int:
    """The command with the reader's values, and --dry-run: its exit code."""
    for name, value in VALUES.items():
        command = command.replace(name, value.format(bucket=project.bucket))
    file, *words = job_words(command)
    if file in EVERY_JOB:
        job = EVERY_JOB[file]
    else:
        job = EVERY_JOB[f"{file} {words.pop(0)}"]
    return run_job(job, [*words, *more, "--dry-run"])


@pytest.mark.parametrize("command", JOBS)
def test_a_command_is_accepted(command: str, here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    code = dry_run(here, command)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "\n# " in printed.out, "the plan"


@pytest.mark.parametrize("command", OF_A_GPU)
def test_a_command_for_a_gpu_is_accepted(command: str) -> None:
    if "--help" not in command:
        make_parser().parse_args(job_words(command)[2:])


@pytest.mark.parametrize("command", OF_OUTPUTS)
def test_a_command_for_a_finished_run_is_accepted(command: str) -> None:
    output.make_parser().parse_args(job_words(command)[1:])


def test_what_has_no_dry_run_is_listed() -> None:
    others = [command for command in COMMANDS if not job_words(command)]
    assert [one for one in others if not one.removeprefix(".venv/bin/").startswith(tuple(NO_DRY_RUN))] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {one.split()[1] for one in others if one.startswith("make ")} <= targets
    assert len(JOBS) > 20 and any("--workers.num-workers 8" in command for command in JOBS), "they are found at all"


@pytest.mark.parametrize("span", FLAGS)
def test_flags_in_the_text_are_accepted(span: str, here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    if span in FLAGS_TESTED_ELSEWHERE:
        return
    command = WITH_FLAGS[span]
    assert span in command
    assert dry_run(here, command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("job", ["prepare_data", "train", "sample", "evaluate"])
def test_the_readmes_project_file_is_accepted(job: str, here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Of images of 24x40 pixels, as it says."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    wide = realistic_manifest(PRESETS["cifar10"](), "cifar10")
    wide = dataclasses.replace(wide, name="wide", image_size=(24, 40), class_names=("bright", "dark"))
    write_manifest(open_store("artifacts/wide/dataset"), wide)
    if not (here.folder / "photos.toml").exists():
        here.register("wide", small_model(PRESETS["cifar10"](), wide), wide.class_names)
    text = text.replace("artifacts/photos/dataset", "artifacts/wide/dataset").replace(
        "models:/photos@", "models:/wide@"
    )
    (here.folder / "photos.toml").write_text(text)
    assert dry_run(here, f"jobs/{job}.py --config photos.toml") == 0, capsys.readouterr().err


# --- presets ----------------------------------------------------------------------------------------------------------

README_WORKERS = sorted({int(number) for number in re.findall(r"--workers\.num-workers (\d+)", TEXTS["README.md"])})


def test_the_readme_names_a_number_of_workers() -> None:
    assert README_WORKERS and min(README_WORKERS) > 2


@pytest.mark.parametrize("workers", [None, *README_WORKERS])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_its_images(
    name: str, workers: int | None, here: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many workers as it says itself, and as the README's commands ask for, which are none of the digits'."""
    if workers is not None and name.startswith("digits"):
        return
    asked = [] if workers is None else ["--workers.num-workers", str(workers)]
    code = dry_run(here, f"jobs/train.py --preset {name}", *asked)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert re.search(r"^# shards +[\d,]+, [\d.]+ (MiB|GiB)$", printed.out, re.MULTILINE), printed.out


@pytest.mark.parametrize("job", ["prepare_data", "sample", "evaluate"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_accepted_by_the_other_jobs(
    name: str, job: str, here: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(here, f"jobs/{job}.py --preset {name}") == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("digits")])
def test_the_shards_of_a_preset_are_of_a_useful_size(name: str) -> None:
    """At most about 50 MiB, as the text of shard_size says, and not one that a window of a few lanes does not fit."""
    preset = PRESETS[name]()
    source = name.removesuffix("_dit")
    assert preset.prepare.shard_size * BYTES_PER_IMAGE[source] < 55 << 20


def test_a_preset_that_refuses_itself_is_seen(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """More workers than lanes, and shards of 256-pixel images of which a window does not fit the read buffer."""
    assert dry_run(here, "jobs/train.py --preset cifar10 --workers.num-workers 16") == 2
    assert "workers.num_workers: at most data.lanes (8), got 16" in capsys.readouterr().err
    large = realistic_manifest(PRESETS["celebahq256"](), "celebahq256", shard_size=1000)
    write_manifest(open_store("artifacts/large"), large)
    assert dry_run(here, "jobs/train.py --preset celebahq256 --dataset artifacts/large") == 2
    assert "data.read_buffer_limit_bytes: at least the estimated read buffer" in capsys.readouterr().err


def test_a_command_that_is_wrong_is_seen(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (train,) = [command for command in JOBS if "--register-as photos" in command]
    for wrong in (train.replace("--preset", "--prset"), train.replace("cifar10", "cifar100"), train + " --steps many"):
        assert dry_run(here, wrong) == 2, wrong
        assert capsys.readouterr().err.startswith("error: ")
