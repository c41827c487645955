"""Findings of a review, each as a test that fails while the finding stands."""

import dataclasses
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.config_io import to_json
from pipeline.errors import StoppedError, StorageError
from pipeline.presets import digits
from pipeline.stores.storage import open_store
from pipeline.training import group_control, group_watch, supervisor, train
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.failures import Failure, FailureCount
from pipeline.training.group_control import GroupControl
from pipeline.training.group_watch import GroupTerms, GroupWatch
from pipeline.training.places import avoiding
from pipeline.training.rollback import roll_back
from pipeline.training.run_record import RUN_RECORD, RollbackRecord, RunRecord
from pipeline.training.stop_request import StopRequest
from pipeline.training.supervisor import Supervisor
from pipeline.training.train_board import Board, BoardState, Divergence, Member, WorkerFailure
from pipeline.training.train_config import RunIdentity
from tests.pipeline.training.checkpoint_cases import pieces
from tests.pipeline.training.small_runs import manifest

RECORD = RunRecord(run_id=None, run_key="key", identity=RunIdentity.of(digits().train, manifest("a")))


class Direct:
    """A board in this process: `board.method.remote(...)` does it at once."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.board, name))


@dataclasses.dataclass(frozen=True)
class Task:
    run: Any
    rollback: RollbackRecord | None = None


def member(**changes: Any) -> Member:
    return Member(node_id="n", pid=1, actor=None, **changes)


def watch_of(board: Board, monkeypatch: pytest.MonkeyPatch, stop: StopRequest | None = None) -> GroupWatch:
    monkeypatch.setattr(group_watch.ray, "get", lambda value, timeout=None: value)
    progress = SimpleNamespace(advance=lambda *_: None)
    watch = GroupWatch(Direct(board), progress, stop or StopRequest(None), lambda text: None)  # type: ignore[arg-type]
    watch._terms = GroupTerms(
        number=1, num_workers=1, min_workers=1, max_workers=1, resources={"CPU": 1.0}, resize_interval_s=1e9,
        hang_timeout_s=100.0,
    )  # fmt: skip
    watch._shown_step, watch._drained_s, watch._room = 0, None, None
    return watch


# ---- 1


def test_going_back_keeps_the_checkpoints_that_there_are(tmp_path: Path) -> None:
    """One batch was skipped long ago, a burst just now; what is kept lies between them: all of it is removed."""
    output = open_store(str(tmp_path))
    output.create(RUN_RECORD, to_json(RECORD))
    checkpoints = CheckpointStore.of_run(str(tmp_path))
    for step in (6100, 6200, 6300):  # keep_checkpoints = 3
        checkpoints.save(step, pieces())
    diverged = Divergence(steps=(5500, 6301, 6302, 6303), message="x")  # within skip_window_steps = 1000
    task: Any = Task(run=SimpleNamespace(tag=lambda *_: None))
    task = roll_back(task, diverged, 6304, output, checkpoints)
    assert task.rollback.to_step > 0
    assert checkpoints.newest() is not None


# ---- 2


def test_a_worker_that_returns_is_not_taken_for_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    board.begin_group(1)
    monkeypatch.setattr(group_control.ray, "get", lambda value, timeout=None: value)
    context = SimpleNamespace(get_node_id=lambda: "n", current_actor=None)
    monkeypatch.setattr(group_control.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(group_control.dist, "new_group", lambda backend: None)
    task: Any = SimpleNamespace(board=Direct(board), group=1)
    with GroupControl(task, 1) as control:
        control._step, control._phase = 100, "training"
        begun = threading.Event()
        while board.read().members[1].phase != "training":
            begun.wait(0.05)
        control.end()
    assert board.read().members[1].phase == "ending"


def test_a_rank_that_ends_is_not_killed_as_hung_beside_one_that_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    board._state.members = {0: member(step=100, phase="ending"), 1: member(step=99, phase="training")}
    board._changed_s -= 200  # rank 0 writes the last checkpoint to a store that is away
    hung = list[bool]()
    monkeypatch.setattr(watch, "_end_hung", lambda: hung.append(True))
    monkeypatch.setattr(watch, "_look_for_room", lambda terms: None)
    watch._read()
    watch._look()
    assert not hung


# ---- 3


def test_sigterm_while_the_last_checkpoint_is_written_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    board, stop = Board(0), StopRequest(None)
    stop._signalled.set()
    watch = watch_of(board, monkeypatch, stop)
    board._state.members = {0: member(step=100, phase="ending")}
    sent = list[int]()
    monkeypatch.setattr(group_watch.signal, "pthread_kill", lambda thread, signum: sent.append(signum))
    watch._read()
    watch._look()
    assert signal.SIGINT not in sent


# ---- 4


def test_a_board_that_is_slow_once_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    board._state.members = {0: member(step=100, phase="training")}
    board._state.drain_deadline_ms = int((time.time() + 300) * 1000)
    calls = list[object]()

    def slow_once(value: object, timeout: float | None = None) -> object:
        calls.append(value)
        if value is None and calls.count(None) == 1:  # the order
            raise ray.exceptions.GetTimeoutError
        return value

    monkeypatch.setattr(group_watch.ray, "get", slow_once)
    monkeypatch.setattr(group_watch, "silent_nodes", list)
    monkeypatch.setattr(group_watch, "Places", lambda *_: SimpleNamespace(num_given=lambda: 0, release=lambda: None))
    watch._read()
    with pytest.raises(ray.exceptions.RayError):
        watch._look()
    watch._look()  # AssertionError here: no RayError, so it ends the thread


def test_a_second_node_that_goes_sooner_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    monkeypatch.setattr(group_watch, "silent_nodes", list)
    monkeypatch.setattr(group_watch, "Places", lambda *_: SimpleNamespace(num_given=lambda: 0, release=lambda: None))
    watch._terms = dataclasses.replace(watch._terms, num_workers=2, min_workers=2, max_workers=2)  # type: ignore[type-var]
    board._state.members = {0: member(step=9, phase="training"), 1: member(step=9, phase="training")}
    board._group = 1
    board.drain(1, int((time.time() + 3600) * 1000), ("n",))
    watch._read()
    watch._look()
    assert watch.leaving is None
    board.drain(1, int((time.time() + 10) * 1000), ("n", "m"))
    watch._read()
    watch._look()
    assert watch.leaving is not None


# ---- 5


def test_a_return_to_step_0_that_was_half_done_is_done_to_the_end(tmp_path: Path, monkeypatch: Any) -> None:
    """The driver was killed after the checkpoints were removed and before that was recorded."""
    output = open_store(str(tmp_path))
    rollback = RollbackRecord(to_step=0, from_step=9, left_out_steps=(0, 1))
    record = dataclasses.replace(RECORD, rollback=rollback, has_checkpoints=True)
    output.create(RUN_RECORD, to_json(record))
    config = dataclasses.replace(digits().train, output=str(tmp_path), resume=True)

    def reached(*_: object) -> None:
        raise StopIteration

    monkeypatch.setattr(train, "ray_session", reached)
    run: Any = SimpleNamespace(untag=lambda key: None)
    lease: Any = SimpleNamespace(confirm=lambda: None)
    checkpoints = CheckpointStore.of_run(str(tmp_path))
    with pytest.raises(StopIteration):
        train._train(config, None, checkpoints, record, run, lease, StopRequest(None))  # type: ignore[arg-type]


# ---- 6


def test_a_store_that_is_away_longer_than_patience_is_no_deterministic_error() -> None:
    """Restoring failed twice, after ten minutes of patience each: max_failures = 3 allows two more."""
    count = FailureCount(3, 5000)
    away = Failure(error=StorageError("s3://b: no answer for 10 min"), kind="StorageError", message="x", step=0)
    assert count.why_not_again(away, 5000) is None
    assert count.why_not_again(away, 5000) is None


def test_a_checkpoint_after_a_return_is_progress() -> None:
    count, lost = FailureCount(1, 6300), Failure(error=None, kind="", message="lost worker 1", step=6150)
    assert count.why_not_again(lost, 6100) is None  # the run has gone back to 6100
    assert count.why_not_again(lost, 6150) is None
    assert count.why_not_again(lost, 6200) is None


# ---- 7


def supervisor_of(tmp_path: Path, monkeypatch: Any, stop: StopRequest, lines: list[str]) -> Supervisor:
    monkeypatch.setattr(supervisor, "say", lines.append)
    made = Supervisor.__new__(Supervisor)
    made._stop, made._checkpoints = stop, CheckpointStore.of_run(str(tmp_path))
    return made


def test_that_the_checkpoint_on_stopping_failed_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    stop, lines = StopRequest(None), list[str]()
    stop._signalled.set()
    made = supervisor_of(tmp_path, monkeypatch, stop, lines)
    failure = WorkerFailure(rank=0, step=7, error=None, kind="StorageError", message="disk full")
    error: Any = RuntimeError("x")
    with pytest.raises(StoppedError) as raised:
        made._after(error, BoardState(step=7, failure=failure))
    assert "disk full" in str(raised.value) + "".join(lines)


def test_a_slow_board_at_the_end_does_not_hide_a_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of(Board(0), monkeypatch)
    watch._thread = threading.Thread(target=lambda: None)
    watch._thread.start()

    def never(value: object, timeout: float | None = None) -> object:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(group_watch.ray, "get", never)
    watch.end()


def test_a_reader_that_has_gone_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the driver's output has gone: the watch thread dies, and with it SIGTERM, drains and hangs."""
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    board.say("line")

    def gone(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(group_watch, "say", gone)
    monkeypatch.setattr(group_watch, "_LOOK_INTERVAL_S", 0.01)
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    thread = threading.Thread(target=watch._watch)
    thread.start()
    thread.join(1)
    watch._ended.set()
    thread.join()
    assert not died


# ---- 8


def test_of_several_silent_nodes_every_one_is_left_out() -> None:
    """Ray 2.60 takes what stands after each comma, the space included: measured, "!in(a, b)" leaves out a alone."""
    assert avoiding(["a", "b"]) == {"ray.io/node-id": "!in(a,b)"}
