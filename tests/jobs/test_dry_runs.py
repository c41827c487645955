"""--dry-run of every job on a project in which something is wrong everywhere: nothing is changed, nothing is made."""

import dataclasses
import sqlite3
import sys
from pathlib import Path

import pytest

from ddpm import build_network
from jobs.cli import run_job
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample_config import SampleConfig
from pipeline.models.model_files import encode_model, read_model_files
from pipeline.models.registration import register_model
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.jobs.every_job import EVERY_JOB
from tests.pipeline.runs_in_process import make_in_process, snapshot
from tests.pipeline.training.small_runs import CARD, MODEL, make_run

OWN_NETWORK = """
import torch

class Network(torch.nn.Conv2d):
    def forward(self, x_t, t, label):
        return super().forward(x_t)

def make(image_size, channels, num_classes):
    return Network(channels, channels, 1)
"""
TRACKING = ["--tracking.uri", "sqlite:///mlflow.db"]
SAMPLE = ["--sample.model", "models:/digits@candidate", "--sample.output", "samples", "--sample.sampler.num-steps", "5"]
MEASURED = ["--dataset", "dataset", *SAMPLE, *TRACKING]
FLAGS = {
    "benchmark sample": [],
    "benchmark train": [],
    "calibrate": ["--model", "models:/digits@candidate", "--dataset", "dataset", "--output", "c.json", *TRACKING],
    "compare bounds": ["--model", "models:/digits@candidate", "--baseline", "other", "--dataset", "dataset",
                       "--output", "bounds", *TRACKING],
    "compare models": ["--models", "other", *SAMPLE, *TRACKING],
    "compare samplers": [*MEASURED, "--evaluations", "5", "10"],
    "ema reconstruct": ["--run", "train", "--output", "ema", *TRACKING],
    "ema sweep": ["--run", "train", "--output", "ema", "--dataset", "dataset", *TRACKING],
    "evaluate": MEASURED,
    "figures": [*MEASURED, "--output", "figures", "--evaluations", "5"],
    "prepare_data": ["--dataset", "dataset"],
    "sample": ["--model", "models:/digits@candidate", "--output", "samples", "--sampler.num-steps", "5", *TRACKING],
    "train": ["--dataset", "dataset", "--output", "train", "--network.name", "own", "--network.factory",
              "own_net_of_a_dry_run:make", *TRACKING],
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a shard that nobody names; a run whose newest checkpoint is damaged; a registered model; a
    generation run with a lost shard and without its manifest."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "own_net_of_a_dry_run.py").write_text(OWN_NETWORK)
    digits = PrepareConfig(dataset=str(folder / "dataset"), shard_size=500)
    prepare_source(digits, open_source(digits), map)
    (folder / "dataset/train/000000009-0123456789abcdef.tar").write_bytes(b"left over")
    make_run(folder / "train", steps=16)
    for name, data in encode_model(CARD, build_network(MODEL, seed=5).state_dict(), None).as_dict().items():
        open_store(str(folder / "other")).write(name, data)
    checkpoints = CheckpointStore.of_run(str(folder / "train"))
    good = checkpoints.newest()
    assert good is not None
    damaged = checkpoints.save(32, [lambda: {name: checkpoints.read(good, name) for name in good.names}])
    (folder / "train/checkpoints" / damaged.prefix / "weights.safetensors").write_bytes(b"cut")
    (folder / "train/checkpoints/_records/step-000000048.json").write_bytes(b"<html>404</html>")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    run = TrackingRun.open(tracking, new_run_key(), "train")
    register_model(run, read_model_files(open_store(checkpoints.uri(good))), "digits")
    run.finish("FINISHED")
    asked = SampleConfig(
        model="models:/digits@candidate", output=str(folder / "samples"), tracking=tracking, request=Generate(),
        images_per_class=4, shard_size=20, batch_size=20,
    )  # fmt: skip
    made = make_in_process(dataclasses.replace(asked, sampler=dataclasses.replace(asked.sampler, num_steps=5)))
    next((folder / "samples").rglob(f"*{made[0]}.tar")).unlink()
    return folder


@pytest.mark.parametrize("name", EVERY_JOB)
def test_a_dry_run_changes_nothing(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = snapshot(project)
    assert run_job(EVERY_JOB[name], [*FLAGS[name], "--dry-run"]) == 0, capsys.readouterr().err
    after = snapshot(project)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == set()


@pytest.mark.parametrize("content", ["nothing", "empty", "other"])
def test_a_database_without_a_registry_stays_as_it_is(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow makes its tables in whatever file it is asked to look into."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if content != "nothing":
        Path("mlflow.db").touch()
    if content == "other":
        with sqlite3.connect("mlflow.db") as database:
            database.execute("create table mine (x)")
        database.close()
    before = snapshot(tmp_path)
    assert run_job(EVERY_JOB["sample"], [*FLAGS["sample"], "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no registry at " in line and snapshot(tmp_path) == before
