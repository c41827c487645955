"""A checkpoint at once, for whoever has seconds left: neither behind an upload that hangs nor behind MLflow."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import LeaseLostError, StorageError
from pipeline.stores.lease import hold_lease
from pipeline.stores.local_store import LocalStore
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig, parse_snapshots
from pipeline.training.checkpoints.state_files import SNAPSHOTS_JSON, decode_tensors
from pipeline.training.metrics.telemetry import STALL_METRIC
from pipeline.training.worker import rank_zero
from tests.pipeline.training.rank_zero_runs import Run


def named_snapshots(run: Run, record: CheckpointRecord) -> list[int]:
    named = parse_snapshots(run.checkpoints.read(record, SNAPSHOTS_JSON), SNAPSHOTS_JSON)
    return [snapshot.step for snapshot in named]


def test_saving_now_does_not_wait_for_an_upload_that_hangs(make: Callable[..., Run]) -> None:
    run = make(keep_checkpoints=5)
    run.step(3)
    run.store.reached.wait()
    run.store.held = "step-000000002-"  # of the other steps, everything is written
    record = run.rank_zero.save_now()
    assert record is not None and record.step == 3
    assert list(run.checkpoints.records()) == [record], "of step 2, nothing but what hangs"
    written = decode_tensors(run.checkpoints.read(record, "train_weights.safetensors"))
    assert all(torch.equal(written[name], tensor) for name, tensor in run.state.network.state_dict().items())
    run.store.open.set()
    run.step(3)
    run.rank_zero.finish()
    run.rank_zero.close()
    assert [record.step for record in run.checkpoints.records()] == [6, 4, 3], "the run has gone on"
    assert list(run.store.list("step-000000002-")) == []
    run.checkpoints.verify(record)
    assert run.lines == [] or all(line.startswith("waited") for line in run.lines)
    assert [step for step, _ in run.rank_zero._task.run.metric_history(STALL_METRIC)] == [2, 3, 4, 6]


def test_saving_now_twice_is_one_checkpoint(make: Callable[..., Run]) -> None:
    run = make()
    assert run.rank_zero.save_now() is None, "what the run began with need not be saved"
    run.store.open.set()
    run.step()
    record = run.rank_zero.save_now()
    assert record is not None and record.step == 1 and run.rank_zero.save_now() is None
    run.step()
    run.rank_zero.finish()
    assert run.rank_zero.save_now() is None, "the ordinary checkpoint stands"
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [2, 1]
    assert len({key.partition("/")[0] for key in (info.key for info in run.store.list("step-"))}) == 2


def test_saving_now_finishes_a_checkpoint_of_this_very_step(make: Callable[..., Run]) -> None:
    run = make()
    run.step(2)
    run.store.reached.wait()
    writing = run.rank_zero._writing
    assert writing is not None
    with writing.patience.calling(run.store.open.set):
        record = run.rank_zero.save_now()
    assert record is not None and list(run.checkpoints.records()) == [record] and record.step == 2
    assert not writing.cancellation.is_cancelled


def test_saving_now_names_the_snapshots_up_to_its_step(make: Callable[..., Run], tmp_path: Path) -> None:
    """Also of one that waits for its turn behind the checkpoint that is cancelled."""
    run = make(post_hoc_ema=PostHocEmaConfig(snapshot_interval_steps=1), keep_checkpoints=5)
    run.step(3)
    run.store.reached.wait()
    run.store.held = "step-000000002-"
    record = run.rank_zero.save_now()
    assert record is not None and named_snapshots(run, record) == [1, 2, 3]
    run.store.open.set()
    run.step()
    run.rank_zero.finish()
    assert named_snapshots(run, next(run.checkpoints.records())) == [1, 2, 3, 4]


@pytest.mark.parametrize("at_step", [2, 3])
def test_saving_now_does_not_wait_for_mlflow(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    """Neither does a checkpoint of this step that waits for it already, nor one before it that is to be cancelled."""
    monkeypatch.setattr(rank_zero, "_FLUSH_TIMEOUT_S", 10_000.0)
    run, go, sending = make(), threading.Event(), threading.Event()
    run.store.open.set()
    run.rank_zero._task.run._queue.put_task("a server that hangs", lambda: (sending.set(), go.wait()))
    run.step(at_step)
    sending.wait()
    try:
        record = run.rank_zero.save_now()
        assert record is not None and list(run.checkpoints.records()) == [record] and record.step == at_step
    finally:
        go.set()
    run.rank_zero.finish()
    assert run.rank_zero._task.run.flush() == 0
    assert [step for step, _ in run.rank_zero._task.run.metric_history(STALL_METRIC)] == list(range(2, at_step + 1))
    assert run.lines == []


def test_a_checkpoint_that_stands_when_it_is_cancelled_is_kept(make: Callable[..., Run]) -> None:
    """What is left to be done after it, such as removing others, is not waited for."""
    run = make(keep_checkpoints=1)
    run.store.open.set()
    run.step(3)
    run.rank_zero.finish()
    run.store.after_create = lambda: run.rank_zero._writer._cancellations["checkpoint"].cancel()
    run.step()
    run.rank_zero.finish()
    run.store.after_create = lambda: None
    assert [record.step for record in run.checkpoints.records()] == [4, 2]
    run.step()
    assert run.rank_zero.save_now() is not None
    run.step()
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [6], "the next ordinary one tidies"
    for record in run.checkpoints.records():
        run.checkpoints.verify(record)


@pytest.mark.parametrize("when", ["before", "now"])
def test_saving_now_raises_what_has_gone_wrong(make: Callable[..., Run], when: str) -> None:
    run = make()
    run.store.open.set()
    run.store.failing = when == "before"
    run.step(2)
    run.wait_for_writer()
    run.store.failing = True
    if when == "now":
        run.step()
    with pytest.raises(StorageError, match="the disk is full"):
        run.rank_zero.save_now()
    assert [record.step for record in run.checkpoints.records()] == ([] if when == "before" else [2])


def test_saving_now_is_not_for_whoever_has_lost_the_lease(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(lease_token="0123456789abcdef")
    run.store.open.set()
    run.step()
    with hold_lease(LocalStore(tmp_path), duration_s=60), pytest.raises(LeaseLostError):
        run.rank_zero.save_now()
    assert run.checkpoints.is_empty()
