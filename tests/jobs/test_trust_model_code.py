"""Code that comes with a model runs only where a flag says so: in every job that takes a model, before any work."""

import dataclasses
import sys
import tomllib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ddpm import OwnNetworkConfig
from jobs.cli import run_job
from pipeline.config_io import to_json
from pipeline.config_sections import FLAGS_ALONE, write_section
from pipeline.data.manifest import MANIFEST_KEY, write_manifest
from pipeline.errors import CheckpointError, UntrustedCodeError
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.models.model_files import MODEL_JSON, SOURCE_JSON, WEIGHTS, ModelFiles, load_model, read_model_files
from pipeline.models.model_source import collect_source
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig
from tests.jobs.every_job import EVERY_JOB
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.small_datasets import NUM_CLASSES, make_dataset
from tests.pipeline.tiny_models import write_model
from tests.pipeline.training.small_runs import CARD, make_run

# Importing it leaves a trace; the file is not where the jobs run, so that only the model's own copy can.
SOURCE = """
from pathlib import Path
import torch

Path({marker!r}).touch()


class Scale(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, x_t, t, label):
        return x_t * self.gain


def make(image_size, channels, num_classes, gain):
    return Scale(gain)
"""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What somebody else has stored: models and a run whose network is code, and a dataset that is none."""

    factory: str
    marker: Path
    model: str
    other: str
    run: str
    dataset: str

    @property
    def has_run(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    marker, module = tmp_path / "it has run", f"theirs_{uuid.uuid4().hex[:8]}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{module}.py").write_text(SOURCE.format(marker=str(marker)))
    data = make_dataset(tmp_path / "dataset", [14, 14])
    splits = dict.fromkeys(("train", "held_out"), data.manifest.splits["train"])
    (data.root / MANIFEST_KEY).unlink()
    write_manifest(open_store(data.uri), dataclasses.replace(data.manifest, splits=splits))
    factory = f"{module}:make"

    def network(gain: float) -> OwnNetworkConfig:
        return OwnNetworkConfig(factory=factory, options={"gain": gain})

    with pytest.MonkeyPatch.context() as theirs:
        theirs.syspath_prepend(str(elsewhere))
        classes = {"num_classes": NUM_CLASSES, "num_timesteps": 60, "class_names": tuple("abcdefg")}
        model, other = (
            write_model(tmp_path / f"model-{gain}", network=network(gain), **classes)  # type: ignore[arg-type]
            for gain in (0.1, 0.2)
        )
        config = dataclasses.replace(CARD.config, network=network(0.1), num_classes=NUM_CLASSES)
        card = dataclasses.replace(CARD, config=config, class_names=tuple("abcdefg"))
        make_run(tmp_path / "run", steps=8, card=card, source=collect_source(config.network))
    del sys.modules[module]
    marker.unlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/here/mlflow.db")
    return Stored(factory=factory, marker=marker, model=model, other=other, run=str(tmp_path / "run"), dataset=data.uri)


_SAMPLE = ["--images-per-class", "1", "--shard-size", "7", "--batch-size", "7"]
_INNER = [flag.replace("--", "--sample.") for flag in _SAMPLE]
_NO_CLUSTER = ["--cluster.address", "127.0.0.1:1"]
JOBS: dict[str, Callable[[Stored], list[str]]] = {
    "sample": lambda s: ["--model", s.model, "--output", "out", *_SAMPLE],
    "evaluate": lambda s: ["--dataset", s.dataset, "--sample.model", s.model, "--sample.output", "out", *_INNER],
    "calibrate": lambda s: ["--model", s.model, "--dataset", s.dataset, "--output", "out/c.json"],
    "compare samplers": lambda s: [
        *("--dataset", s.dataset, "--sample.model", s.model, "--sample.output", "out", *_INNER),
        *("--samplers", "heun", "--evaluations", "5"),
    ],
    "compare bounds": lambda s: [
        *("--dataset", s.dataset, "--model", s.model, "--baseline", s.other, "--output", "out", "--max-images", "14"),
    ],
    "compare models": lambda s: [
        *("--models", s.other, "--sample.model", s.model, "--sample.output", "out", *_INNER),
    ],
    "figures": lambda s: ["--dataset", s.dataset, "--sample.model", s.model, "--output", "out/f", *_INNER],
    "ema reconstruct": lambda s: ["--run", s.run, "--output", "out"],
    "ema sweep": lambda s: ["--run", s.run, "--dataset", s.dataset, "--output", "out", *_INNER],
}
STARTS_NO_CLUSTER = ("calibrate", "compare bounds", "ema reconstruct")
TAKES_NO_MODEL = ("benchmark sample", "benchmark train", "prepare_data", "train")


def test_every_job_is_one_that_takes_a_model_or_one_that_does_not() -> None:
    assert sorted([*JOBS, *TAKES_NO_MODEL]) == sorted(EVERY_JOB)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_without_the_flag_a_job_names_model_and_flag_and_runs_nothing(
    name: str, dry_run: bool, stored: Stored, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = JOBS[name](stored) + ["--dry-run"] * dry_run
    flags += [] if name in STARTS_NO_CLUSTER else _NO_CLUSTER  # a job that reaches for it says so instead
    assert run_job(EVERY_JOB[name], flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    place = stored.run if name.startswith("ema") else stored.model
    assert line.startswith(f"error: {place}") and stored.factory in line and "--trust-model-code" in line, line
    assert not stored.has_run
    assert not Path("out").exists()


@pytest.mark.parametrize("name", JOBS)
def test_with_the_flag_a_job_runs_it(name: str, stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    """To its end where that takes no cluster; the others up to their plan, which counts the network's parameters."""
    to_its_end = name in STARTS_NO_CLUSTER
    flags = [*JOBS[name](stored), "--trust-model-code", *([] if to_its_end else ["--dry-run"])]
    assert run_job(EVERY_JOB[name], flags) == 0, capsys.readouterr().err
    needs_no_network = ("compare models", "compare samplers", "figures")  # for their plans
    assert stored.has_run or name in needs_no_network
    printed = capsys.readouterr().out
    if not to_its_end:
        assert "--trust-model-code  " in printed, "the plan says what its file leaves out"
        file = printed.partition("\n#")[0]
        assert "trust" not in file, "and the file does not trust by itself"


def test_jobs_that_take_no_model_have_no_such_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Training imports the user's own factory from the folder where it was started, resuming too."""
    for name in TAKES_NO_MODEL:
        assert run_job(EVERY_JOB[name], ["--trust-model-code", "--dry-run"]) == 2
        assert "--trust-model-code" in capsys.readouterr().err


def test_a_guide_needs_the_flag_too(stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_model(tmp_path / "plain", num_classes=NUM_CLASSES, num_timesteps=60, class_names=tuple("abcdefg"))
    flags = ["--model", plain, "--guide-model", stored.model, "--sampler.guidance-scale", "1.5", "--output", "out"]
    assert run_job(EVERY_JOB["sample"], [*flags, "--dry-run"]) == 2
    assert f"error: {stored.model}: " in capsys.readouterr().err and not stored.has_run
    config = SampleConfig(
        model=plain, guide_model=stored.model, output="out", images_per_class=1, shard_size=7, batch_size=7
    )
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, num_steps=2, guidance_scale=1.5))
    assert list(make_in_process(dataclasses.replace(config, trust_model_code=True))) == [0]
    assert stored.has_run


def test_the_flag_decides_no_image_and_stands_in_no_file(stored: Stored) -> None:
    trusting = SampleConfig(model=stored.model, output="out", trust_model_code=True)
    for section in ("sample", "evaluate"):
        assert not set(FLAGS_ALONE) & set(tomllib.loads(write_section(trusting, section))[section])
    spec = resolve_job(trusting).spec
    assert b"trust" not in to_json(spec)
    with pytest.raises(UntrustedCodeError):
        resolve_job(dataclasses.replace(trusting, trust_model_code=False))
    trusted, plain = (read_model_files(open_store(stored.model)) for _ in range(2))
    trusted = dataclasses.replace(trusted, trusted=True)
    assert (trusted.digest, trusted.as_dict()) == (plain.digest, plain.as_dict()) and trusted == plain


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("trust_model_code = true", "trust_model_code"),
        ("[sample]\ntrust_model_code = true", "sample.trust_model_code"),
        ("[sample]\ntrust_model_code = false", "sample.trust_model_code"),
    ],
)
def test_a_file_cannot_trust(text: str, place: str, stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text(text)
    flags = ["--config", "mine.toml", *JOBS["sample"](stored), "--dry-run"]
    for more in ([], ["--trust-model-code"]):
        assert run_job(EVERY_JOB["sample"], [*flags, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: mine.toml: {place}: ") and line.endswith("pass --trust-model-code for the run")
    assert not stored.has_run


def test_altered_code_is_found_before_it_runs_even_where_it_is_trusted(stored: Stored) -> None:
    source = Path(stored.model) / SOURCE_JSON
    source.write_bytes(source.read_bytes().replace(b"x_t * self.gain", b"x_t + self.gain"))
    folder = Path(stored.model)
    files = ModelFiles(
        card_json=(folder / MODEL_JSON).read_bytes(),
        weights=(folder / WEIGHTS).read_bytes(),
        source=source.read_bytes(),
        trusted=True,
    )
    with pytest.raises(CheckpointError, match=SOURCE_JSON):
        load_model(files)
    with pytest.raises(CheckpointError, match=SOURCE_JSON):
        resolve_job(SampleConfig(model=stored.model, output="out", trust_model_code=True, tracking=TrackingConfig()))
    assert not stored.has_run


def test_a_card_that_names_installed_code_is_code_too(tmp_path: Path) -> None:
    """Without a source file: what a card names is imported all the same."""
    network = OwnNetworkConfig(factory="tests.integration.jobs:scaled_noise")
    files = read_model_files(open_store(write_model(tmp_path / "model", network=network)))
    without = dataclasses.replace(files, source=None, card_json=_without_source(files.card_json))
    with pytest.raises(
        UntrustedCodeError, match=r"^s3://b/m: .*tests.integration.jobs:scaled_noise.*--trust-model-code"
    ):
        load_model(without, "s3://b/m")
    load_model(dataclasses.replace(without, trusted=True))


def _without_source(card_json: bytes) -> bytes:
    head, _, tail = card_json.partition(b'"source_sha256":"')
    return head + b'"source_sha256":null' + tail[65:]
