"""Checkpoints measured on held-out images by tasks of their own, which end no run."""

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.errors import CheckpointError
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.driver import validation
from pipeline.training.driver.validation import Validator, measure_checkpoint
from pipeline.training.train_config import ValidationConfig
from pipeline.training.train_task import TrainTask
from tests.pipeline.training.small_runs import make_run
from tests.pipeline.training.step_cases import make_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    digits = PrepareConfig(dataset=str(folder / "dataset"), shard_size=500)
    prepare_source(digits, open_source(digits), map)
    make_run(folder / "run", steps=16, interval=0)
    return folder


def task_of(folder: Path, logged: list[Any], **changes: Any) -> TrainTask:
    task = make_task(
        dataset=str(folder / "dataset"),
        output=str(folder / "run"),
        validation=ValidationConfig(**{"num_images": 40, "draws": 2, "interval_s": 0.0} | changes),
    )
    run = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    return dataclasses.replace(task, run=run, manifest=load_manifest(open_store(task.config.dataset)))  # type: ignore[arg-type]


def test_the_figures_are_those_of_the_checkpoint(folder: Path) -> None:
    task = task_of(folder, [])
    figures = measure_checkpoint(task.config, 16, None)
    assert figures.keys() == {
        f"validation_{name}{suffix}" for name in ("loss", "bits_per_dim") for suffix in ("", "_standard_error")
    }
    assert 0.3 < figures["validation_loss"] < 3 and 0 < figures["validation_loss_standard_error"] < 0.5
    assert figures == measure_checkpoint(task.config, 16, None)


class Tasks:
    """In the place of Ray: tasks end when they are told to."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.ended: set[int] = set()
        self.failing = False

    def remote(self, **_: Any) -> Any:
        return lambda function: SimpleNamespace(remote=self._start)

    def _start(self, step: int, *_: Any) -> int:
        self.started.append(step)
        return step

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        if timeout:
            self.ended |= set(refs)
        return [ref for ref in refs if ref in self.ended], []

    def get(self, ref: int) -> dict[str, float]:
        if self.failing:
            raise RuntimeError("the process was killed")
        return {"validation_loss": ref / 10}

    def cancel(self, ref: int, force: bool) -> None:
        self.cancelled.append(ref)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    made = Tasks()
    monkeypatch.setattr(validation, "ray", made)
    return made


def test_a_checkpoint_that_is_gone_is_one_line(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 12 is gone; keep more of them$"):
        measure_checkpoint(task_of(folder, []).config, 12, None)


def test_one_at_a_time_and_the_last_in_any_case(folder: Path, tasks: Tasks) -> None:
    logged: list[Any] = []
    validator = Validator(task_of(folder, logged), CheckpointStore.of_run(str(folder / "run")))
    validator.look(-1)
    assert tasks.started == []
    validator.look(4)
    validator.look(8)  # comes while the one before is measured
    validator.look(12)
    assert tasks.started == [4] and logged == []
    tasks.ended.add(4)
    validator.look(12)
    assert tasks.started == [4, 12] and logged == [(4, {"validation_loss": 0.4})]
    validator.finish()
    assert tasks.cancelled == [12] and tasks.started == [4, 12, 16]
    assert logged[1:] == [(16, {"validation_loss": 1.6})]


def test_not_more_often_than_asked_for(folder: Path, tasks: Tasks) -> None:
    validator = Validator(task_of(folder, [], interval_s=1000.0), CheckpointStore.of_run(str(folder / "run")))
    for step in (4, 8):
        tasks.ended.add(step)
        validator.look(step)
    assert tasks.started == [4]


def test_a_task_that_fails_is_a_line(folder: Path, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(validation, "say", lines.append)
    logged: list[Any] = []
    validator = Validator(task_of(folder, logged), CheckpointStore.of_run(str(folder / "run")))
    tasks.failing = True
    tasks.ended |= {4, 8}
    for step in (4, 8, 12):
        validator.look(step)
    validator.finish()
    assert logged == [] and lines[0].startswith("measuring a checkpoint on held-out images failed at step 4 (")
    assert lines[1:] == ["measuring a checkpoint on held-out images failed 3 times"]


def test_nothing_is_measured_where_nothing_is_held_out_or_asked_for(folder: Path, tasks: Tasks) -> None:
    checkpoints = CheckpointStore.of_run(str(folder / "run"))
    task = task_of(folder, [])
    without = dataclasses.replace(task.manifest, splits={"train": task.manifest.splits["train"]})
    for one in (task_of(folder, [], num_images=0), dataclasses.replace(task, manifest=without)):
        validator = Validator(one, checkpoints)
        validator.look(4)
        validator.finish()
    assert tasks.started == []


def test_it_does_not_wait_for_ever(folder: Path, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(validation, "say", lines.append)
    monkeypatch.setattr(tasks, "wait", lambda refs, timeout: ([], refs))
    started_s = time.monotonic()
    validator = Validator(task_of(folder, []), CheckpointStore.of_run(str(folder / "run")))
    validator.finish()
    assert lines[0] == "measuring the last checkpoint on held-out images, for up to 600 s"
    assert lines[1:] == ["the last checkpoint is not measured on held-out images after 600 s: given up"]
    assert tasks.cancelled == [16] and time.monotonic() - started_s < 60
