"""The driver's look at a group, every second: what it asks of it, and that nothing ends the looking."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.training.driver import group_watch
from pipeline.training.driver.group_watch import GroupTerms, GroupWatch
from pipeline.training.stop_request import StopRequest
from pipeline.training.train_board import Board, Member, Orders
from tests.pipeline.training.boards import Direct


def member(**changes: Any) -> Member:
    return Member(node_id="n", pid=1, actor=None, **changes)


def watch_of(
    board: Board, monkeypatch: pytest.MonkeyPatch, stop: StopRequest | None = None, num_workers: int = 1
) -> GroupWatch:
    monkeypatch.setattr(group_watch.ray, "get", lambda value, timeout=None: value)
    terms = GroupTerms(
        number=1, num_workers=num_workers, min_workers=num_workers, max_workers=num_workers, resources={"CPU": 1.0},
        resize_interval_s=1e9, hang_timeout_s=10_000.0,
    )  # fmt: skip
    progress: Any = SimpleNamespace(advance=lambda *_: None)
    board.begin_group(1)
    return GroupWatch(
        Direct(board), progress, stop or StopRequest(None), lambda text: None, lambda state: None, terms, 0
    )


def asked_to_stop() -> StopRequest:
    stop = StopRequest(None)
    stop._signalled.set()
    return stop


def hangs_of(watch: GroupWatch, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    hung = list[bool]()
    monkeypatch.setattr(watch, "_end_hung", lambda: hung.append(True))
    watch._read()
    watch._look()
    return hung


@pytest.mark.parametrize(
    ("phases", "stuck_s", "is_hung"),
    [
        (("training", "training"), 9_900, False),
        (("training", "training"), 10_100, True),
        (("starting", "training"), 10_100, True),
        (("starting", "starting"), 10_100, False),
        (("starting", "starting"), 20_100, True),
        (("ending", "training"), 10_100, True),
        (("ending", "returned"), 10_100, False),
        (("ending", "returned"), 20_100, True),
        (("returned", "returned"), 1e6, False),
        ((), 1e6, False),
    ],
)
def test_who_hangs(monkeypatch: pytest.MonkeyPatch, phases: tuple[Any, ...], stuck_s: float, is_hung: bool) -> None:
    """Rank 0 may take its time with the last checkpoint; who has returned is waited for by nobody."""
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    board._state.members = {rank: member(step=9, phase=phase) for rank, phase in enumerate(phases)}
    board._changed_s -= stuck_s
    assert hangs_of(watch, monkeypatch) == [True] * is_hung


@pytest.mark.parametrize("phase", ["starting", "training", "ending"])
def test_a_stop_asks_a_group_to_leave_whatever_it_does(monkeypatch: pytest.MonkeyPatch, phase: Any) -> None:
    """Also one that has not come to its first step: it finds the order there."""
    board = Board(0)
    watch = watch_of(board, monkeypatch, asked_to_stop())
    watch._look_for_stop()
    board.join(1, 0, member(phase=phase))
    assert watch.leaving == "SIGTERM"
    assert board.beat(1, 0, 9, phase)[0] == Orders.LEAVE


def test_a_board_that_is_slow_once_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    watch = watch_of(board, monkeypatch)
    board._state.members = {0: member(step=100, phase="training")}
    board._state.drain_deadline_ms = int((time.time() + 300) * 1000)
    calls = list[object]()

    def slow_once(value: object, timeout: float | None = None) -> object:
        calls.append(value)
        if value is None and calls.count(None) == 1:  # the order to save
            raise ray.exceptions.GetTimeoutError
        return value

    monkeypatch.setattr(group_watch.ray, "get", slow_once)
    monkeypatch.setattr(group_watch, "silent_nodes", list)
    monkeypatch.setattr(group_watch, "Places", lambda *_: SimpleNamespace(num_given=lambda: 0, release=lambda: None))
    watch._read()
    with pytest.raises(ray.exceptions.RayError):
        watch._look()
    watch._look()
    assert board.beat(1, 0, 100, "training")[0] & Orders.SAVE


def test_a_second_node_that_goes_sooner_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(0)
    watch = watch_of(board, monkeypatch, num_workers=2)
    monkeypatch.setattr(group_watch, "silent_nodes", list)
    monkeypatch.setattr(group_watch, "Places", lambda *_: SimpleNamespace(num_given=lambda: 0, release=lambda: None))
    board._state.members = {0: member(step=9, phase="training"), 1: member(step=9, phase="training")}
    board.drain(1, int((time.time() + 3600) * 1000), ("n",))
    watch._read()
    watch._look()
    assert watch.leaving is None
    board.drain(1, int((time.time() + 10) * 1000), ("n", "m"))
    watch._read()
    watch._look()
    assert watch.leaving is not None


def test_a_slow_board_at_the_end_does_not_hide_a_finished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of(Board(0), monkeypatch)
    watch.begin()

    def never(value: object, timeout: float | None = None) -> object:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(group_watch.ray, "get", never)
    watch.end()


def test_a_reader_that_has_gone_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the driver's output has gone: the watch thread dies, and with it SIGTERM, drains and hangs."""
    board = Board(0)
    stop = StopRequest(None)
    watch = watch_of(board, monkeypatch, stop)
    board.say("line")
    board._state.members = {0: member(step=1, phase="training")}

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
