"""Checkpoints are written beside training: of the moment at which they were taken, in order, and no error is lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.data.manifest import DatasetManifest
from pipeline.errors import LeaseLostError, StorageError
from pipeline.models.model_files import read_card
from pipeline.stores.cancellation import Cancellation
from pipeline.stores.lease import LEASE_KEY, hold_lease, holder_token
from pipeline.stores.local_store import LocalStore
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig, SnapshotStore, parse_snapshots
from pipeline.training.checkpoints.state_files import SNAPSHOTS_JSON, decode_tensors
from pipeline.training.metrics.telemetry import STALL_METRIC
from pipeline.training.run_record import RUN_RECORD, read_run_record
from pipeline.training.worker import rank_zero
from tests.pipeline.training.rank_zero_runs import Run
from tests.pipeline.training.small_runs import manifest


def test_training_goes_on_while_a_copy_is_written(make: Callable[..., Run], database: TrackingConfig) -> None:
    run = make()
    run.step(2)
    taken = {name: tensor.clone() for name, tensor in run.state.network.state_dict().items()}
    run.step()  # while the store takes nothing
    assert run.checkpoints.newest() is None
    run.store.open.set()
    run.rank_zero.finish()
    record = run.checkpoints.newest()
    assert record is not None and record.step == 2
    written = decode_tensors(run.checkpoints.read(record, "train_weights.safetensors"))
    assert all(torch.equal(written[name], taken[name]) for name in taken)
    assert not all(torch.equal(tensor, taken[name]) for name, tensor in run.state.network.state_dict().items())
    run.rank_zero.close()
    tracked = run.rank_zero._task.run
    ((step, stall_s),) = tracked.metric_history(STALL_METRIC)
    assert step == 2 and 0 < stall_s < 60


def test_the_runs_record_says_once_that_there_are_checkpoints(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make()
    run.step(2)
    assert not read_run_record(LocalStore(tmp_path)).has_checkpoints
    run.store.open.set()
    run.step(2)
    assert read_run_record(LocalStore(tmp_path)).has_checkpoints
    first = (tmp_path / RUN_RECORD).stat().st_mtime_ns
    run.step(2)
    run.rank_zero.close()
    assert (tmp_path / RUN_RECORD).stat().st_mtime_ns == first


def test_the_next_checkpoint_waits_for_the_one_before_and_says_so(make: Callable[..., Run]) -> None:
    run = make()
    run.step(3)
    threading.Timer(0.5, run.store.open.set).start()
    run.step()
    assert run.checkpoints.newest() is not None, "the one before stands"
    (line,) = run.lines
    assert line.startswith("waited 0.") and line.endswith("s until the checkpoint before was written")
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [4, 2]


@pytest.mark.parametrize("when", ["at the next step", "at the end", "after another error"])
def test_an_error_of_the_writer_is_not_lost(make: Callable[..., Run], when: str) -> None:
    run = make()
    run.store.failing = True
    run.store.open.set()
    run.step(2)
    run.wait_for_writer()
    if when == "at the next step":  # which is long before the next checkpoint
        with pytest.raises(StorageError, match="the disk is full"):
            run.step()
    elif when == "at the end":
        with pytest.raises(StorageError, match="the disk is full"):
            run.rank_zero.finish()
    run.rank_zero.close()
    said = [line for line in run.lines if "writing beside training has failed: the disk is full" in line]
    assert len(said) == (1 if when == "after another error" else 0)
    assert run.checkpoints.is_empty()


def test_closing_finishes_the_checkpoint_that_is_being_written(make: Callable[..., Run]) -> None:
    """As after an exception in training."""
    run = make()
    run.step(2)
    threading.Timer(0.3, run.store.open.set).start()
    run.rank_zero.close()
    record = run.checkpoints.newest()
    assert record is not None and record.step == 2
    run.checkpoints.verify(record)


def test_snapshots_are_stored_before_the_checkpoint_that_names_them(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make(post_hoc_ema=PostHocEmaConfig(snapshot_interval_steps=1), keep_checkpoints=5)
    run.store.open.set()
    run.step(4)
    run.rank_zero.finish()
    snapshots = SnapshotStore.of_run(str(tmp_path))
    for record in run.checkpoints.records():
        named = parse_snapshots(run.checkpoints.read(record, SNAPSHOTS_JSON), SNAPSHOTS_JSON)
        assert [snapshot.step for snapshot in named] == list(range(1, record.step + 1))
        for snapshot in named:
            assert snapshots.read(snapshot, 0.05)


def test_the_datasets_digest_is_computed_once(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, where there are 100,000 shards."""
    digest, computed = manifest(*"0123456789").digest, list[int]()

    def count(_: DatasetManifest) -> str:
        computed.append(1)
        return digest

    monkeypatch.setattr(DatasetManifest, "digest", property(count))
    run = make(keep_checkpoints=5)
    run.store.open.set()
    run.step(8)
    run.rank_zero.finish()
    found = [run.checkpoints.read_model(record) for record in run.checkpoints.records()]
    assert [(read_card(files).dataset_digest, read_card(files).train_step) for files in found] == [
        (digest, step) for step in (8, 6, 4, 2)
    ]
    assert len(computed) == 1


def test_what_is_kept_follows_the_configuration(make: Callable[..., Run]) -> None:
    run = make(keep_checkpoints=1, keep_every_steps=4)
    run.store.open.set()
    run.step(10)
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [10, 8, 4]
    assert run.lines == [] or all(line.startswith("waited") for line in run.lines)


def test_after_a_takeover_nothing_is_recorded_or_removed(make: Callable[..., Run], tmp_path: Path) -> None:
    output = LocalStore(tmp_path)
    with hold_lease(output, duration_s=60):
        run = make(lease_token=str(holder_token(output)), keep_checkpoints=1)
    run.store.open.set()
    run.step(4)
    run.wait_for_writer()
    assert [record.step for record in run.checkpoints.records()] == [4], "that it was given back is no takeover"
    with hold_lease(output, duration_s=60):
        run.step(2)
        with pytest.raises(LeaseLostError, match="another driver has taken over its lease"):
            run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [4]
    with pytest.raises(LeaseLostError):
        run.rank_zero._tidy(next(run.checkpoints.records()), run.checkpoints, Cancellation())


@pytest.mark.parametrize("lease", [None, b"damaged"])
def test_without_a_readable_lease_the_run_goes_on(
    make: Callable[..., Run], tmp_path: Path, lease: bytes | None
) -> None:
    if lease is not None:
        LocalStore(tmp_path).write(LEASE_KEY, lease)
    run = make(lease_token="0123456789abcdef")
    run.store.open.set()
    run.step(2)
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [2]


def test_a_grid_that_fails_is_a_line_and_a_count(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(rank_zero, "generate", generate)
    run = make(grid_interval_steps=1)
    run.store.open.set()
    run.step(3)
    said = [line for line in run.lines if "grid" in line]
    reason = "CUDA out of memory. Tried to allocate 1 GiB"
    assert said == [f"drawing a grid failed at step 1 ({reason}); the run goes on"]
    run.rank_zero.finish()
    run.rank_zero.close()
    assert run.lines[-1] == "drawing a grid failed 3 times"
    assert [record.step for record in run.checkpoints.records()] == [2]


def test_an_unknown_error_in_removing_is_no_end_of_a_run(make: Callable[..., Run]) -> None:
    run = make(keep_checkpoints=1)
    run.store.forbidding = True
    run.store.open.set()
    run.step(6)
    run.rank_zero.finish()
    assert [record.step for record in run.checkpoints.records()] == [6, 4, 2]
    said = [line for line in run.lines if "removing older checkpoints failed at step 4" in line]
    assert len(said) == 1 and "an error that nobody thought of" in said[0]


@pytest.mark.parametrize("has_finished", [True, False])
def test_at_the_end_of_training_mlflow_is_waited_for(
    make: Callable[..., Run], database: TrackingConfig, monkeypatch: pytest.MonkeyPatch, has_finished: bool
) -> None:
    """Rank 0 joins a run that its driver could not make yet."""
    monkeypatch.setattr(rank_zero, "_CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setenv(PATIENCE_VARIABLE, "10")
    key = new_run_key()
    tracking = TrackingRun(str(database.uri), None, experiment=database.experiment, run_key=key)
    run = make(tracking=tracking, keep_checkpoints=5)
    run.store.open.set()
    run.step(4)
    run.wait_for_writer()
    said = [line for line in run.lines if "the metrics are kept with the checkpoint" in line]
    assert len(said) == 1 and said[0].startswith("checkpoint of step 2: MLflow has not got ")
    if has_finished:
        run.rank_zero.finish()
    opened: list[TrackingRun] = []
    timer = threading.Timer(3, lambda: opened.append(TrackingRun.open(database, key)))
    timer.start()
    run.rank_zero.close()
    timer.join()
    steps = [step for step, _ in opened[0].metric_history(STALL_METRIC)]
    assert steps == ([2, 4] if has_finished else [])
    opened[0].finish()
