"""Going back once, to a checkpoint before what was not finite; a driver that is killed half way does the rest later."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config_io import to_json
from pipeline.errors import TrainingDivergedError
from pipeline.presets import digits
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.driver.rollback import finish_roll_back, roll_back, with_rollback
from pipeline.training.run_record import RUN_RECORD, RollbackRecord, RunRecord, read_run_record
from pipeline.training.train_board import Divergence
from pipeline.training.train_config import RunIdentity
from tests.pipeline.training.checkpoint_cases import pieces
from tests.pipeline.training.small_runs import manifest

RECORD = RunRecord(
    run_id=None, run_key="key", identity=RunIdentity.of(digits().train, manifest("a")), has_checkpoints=True
)


@dataclasses.dataclass(frozen=True)
class Task:
    run: Any
    rollback: RollbackRecord | None = None


class Output:
    """A run's folder with checkpoints of some steps, and its tags."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.store, self.tags = open_store(str(folder)), dict[str, str]()
        self.store.create(RUN_RECORD, to_json(RECORD))
        self.checkpoints = CheckpointStore.of_run(str(folder))
        self.saved = [self.checkpoints.save(step, pieces()) for step in steps]
        self.task: Any = Task(run=SimpleNamespace(tag=self.tags.__setitem__))

    def roll_back(self, *bad: int, reached: int = 70) -> RollbackRecord:
        diverged = Divergence(steps=bad, message="step 63: not finite")
        task = roll_back(self.task, diverged, reached, self.store, self.checkpoints)
        assert task.rollback is not None
        return task.rollback

    @property
    def left(self) -> list[int]:
        return [record.step for record in self.checkpoints.records()]


@pytest.mark.parametrize(
    ("kept", "bad", "to_step"),
    [
        ([20, 40, 60], (41, 45, 62), 40),
        ([20, 40, 60], (40, 62), 40),  # the batch of step 40 comes after the checkpoint of step 40
        ([20, 40, 60], (39, 62), 20),
        ([20, 40, 60], (5, 61, 62), 20),  # none is as old: the oldest, rather than nothing
        ([], (3, 5), 0),
    ],
)
def test_where_a_run_goes_back_to(
    tmp_path: Path, kept: list[int], bad: tuple[int, ...], to_step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(tmp_path, *kept)
    rollback = output.roll_back(*bad)
    assert rollback.to_step == to_step and rollback.left_out_steps == bad and rollback.from_step == 70
    assert output.left == [step for step in reversed(kept) if step <= to_step]
    record = read_run_record(output.store)
    assert record.rollback is not None and record.rollback.is_done and record.has_checkpoints == bool(kept)
    assert f"going back to step {to_step} and past the batches" in capsys.readouterr().out
    assert output.tags["ddpm.rolled_back"].startswith(f"from step 70 to {to_step}, left out {bad[0]}, ")
    assert with_rollback(output.task, record).rollback == record.rollback


def test_a_run_goes_back_once(tmp_path: Path) -> None:
    output = Output(tmp_path, 20, 40)
    output.roll_back(41)
    with pytest.raises(TrainingDivergedError, match=r"step 63: not finite; .* once before: start anew with a lower"):
        output.roll_back(50)
    assert output.left == [40, 20]


@pytest.mark.parametrize("num_removed", [0, 1, 2])
def test_what_was_half_done_is_done_when_the_run_goes_on(tmp_path: Path, num_removed: int) -> None:
    """The driver was killed between what it recorded and what it removed, or before it recorded that."""
    output = Output(tmp_path, 20, 40, 60)
    begun = RollbackRecord(to_step=20, from_step=70, left_out_steps=(21,))
    output.store.write(RUN_RECORD, to_json(dataclasses.replace(RECORD, rollback=begun)))
    for record in output.saved[1 : 1 + num_removed]:
        output.store.delete(f"checkpoints/_records/step-{record.step:09d}.json")
    finish_roll_back(output.store, output.checkpoints)
    assert output.left == [20]
    output.checkpoints.save(40, pieces())
    finish_roll_back(output.store, output.checkpoints)
    assert output.left == [40, 20], "what was made since stays"


def test_a_return_to_step_0_that_was_half_done_may_begin_there(tmp_path: Path) -> None:
    output = Output(tmp_path)
    begun = RollbackRecord(to_step=0, from_step=9, left_out_steps=(0, 1))
    output.store.write(RUN_RECORD, to_json(dataclasses.replace(RECORD, rollback=begun)))
    finish_roll_back(output.store, output.checkpoints)
    assert not read_run_record(output.store).has_checkpoints


def test_of_what_was_registered_only_the_record_goes(tmp_path: Path) -> None:
    output = Output(tmp_path, 20, 40)
    output.checkpoints.pin(output.saved[1], "ddpm")
    output.roll_back(21)
    assert output.left == [20]
    folders = {info.key.split("/")[0] for info in open_store(output.checkpoints.root).list("step-")}
    assert folders == {record.prefix for record in output.saved}


def test_without_a_run_there_is_nothing_to_finish(tmp_path: Path) -> None:
    finish_roll_back(open_store(str(tmp_path)), CheckpointStore.of_run(str(tmp_path)))
    assert not list(tmp_path.iterdir())
