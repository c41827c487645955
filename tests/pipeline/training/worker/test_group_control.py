"""A worker's part in its group: orders come once and to all, and it says where it stands and what ends it."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ShardCorruptError
from pipeline.training.train_board import Board, Orders
from pipeline.training.train_config import WorkerConfig
from pipeline.training.worker import group_control
from pipeline.training.worker.group_control import GroupControl, stacks
from tests.pipeline.training.boards import Direct
from tests.pipeline.training.step_cases import single_rank


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """With signs of life as often as can be, and a process group of one rank."""
    monkeypatch.setattr(group_control.ray, "get", lambda value, timeout=None: value)
    context = SimpleNamespace(get_node_id=lambda: "n", current_actor=None)
    monkeypatch.setattr(group_control.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(group_control, "_BEAT_INTERVAL_S", 0.001)
    board = Board(0)
    board.begin_group(1)
    with single_rank():
        yield board


def control_of(board: Board, rank: int = 0) -> GroupControl:
    task: Any = SimpleNamespace(board=Direct(board), group=1, config=SimpleNamespace(workers=WorkerConfig()))
    return GroupControl(task, rank)


def orders_from(control: GroupControl, step: int, number: int) -> list[Orders]:
    """What is agreed on before the next steps, once something is."""
    found = [control.agreed(step)]
    while found[-1] == Orders.NONE:
        step += 1
        found = [control.agreed(step)]
    return found + [control.agreed(step + 1 + i) for i in range(number - 1)]


def test_an_order_to_save_is_followed_once(board: Board) -> None:
    with control_of(board) as control:
        assert control.agreed(0) == Orders.NONE
        board.order(Orders.SAVE)
        assert orders_from(control, 1, 4) == [Orders.SAVE, Orders.NONE, Orders.NONE, Orders.NONE]
        control.end()


def test_a_worker_starts_until_its_first_step_is_behind_it(board: Board) -> None:
    """The first step waits for the data's readers to start, and may compile."""

    def wait_for(step: int, phase: str) -> None:
        while (shown := board.read().members[0]).step != step:
            pass
        assert shown.phase == phase

    with control_of(board) as control:
        wait_for(-1, "starting")
        control.begin(3)
        wait_for(3, "starting")
        control.agreed(3)
        assert control._phase == "starting"
        control.agreed(4)
        wait_for(4, "training")
        control.end()


def test_after_the_order_to_leave_nothing_is_waited_for(board: Board) -> None:
    with control_of(board) as control:
        board.order(Orders.LEAVE)
        assert Orders.LEAVE in orders_from(control, 0, 1)[0]
        control.end()
        assert board.read().members[0].phase == "ending"
    assert board.read().members[0].phase == "returned"


def test_a_group_that_is_not_wanted_any_more_leaves_before_it_reads_anything(board: Board) -> None:
    with control_of(board) as control:
        assert not control.is_to_leave()
        board.order(Orders.LEAVE)
        assert control.is_to_leave()
        control.end()


def test_preemption_is_looked_for_now_and_then(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_control, "_PREEMPTION_INTERVAL_S", 0.0)
    with control_of(board) as control:
        assert orders_from(control, 0, 1) == [Orders.LOOK_FOR_PREEMPTION]
        info = SimpleNamespace(deadline_ms=None, preempted_node_ids=["n"])
        monkeypatch.setattr(group_control.ray.train, "get_preemption_info", lambda: info)
        control.look_for_preemption()
        assert board.read().drain_deadline_ms == 0 and board.read().draining_nodes == ("n",)
        monkeypatch.setattr(group_control.ray.train, "get_preemption_info", lambda: None)
        control.look_for_preemption()
        control.end()


def test_a_worker_says_what_ends_it_and_where(board: Board) -> None:
    with pytest.raises(ShardCorruptError), control_of(board, rank=1) as control:
        control.agreed(7)
        raise ShardCorruptError("s3://user:secret@b/x.tar: sha256 differs")
    failure = board.read().failure
    assert failure is not None and (failure.rank, failure.step, failure.kind) == (1, 7, "ShardCorruptError")
    assert isinstance(failure.error, ShardCorruptError)
    assert "sha256 differs" in failure.message and "secret" not in failure.message


def test_a_worker_that_cannot_join_the_others_says_so(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(group_control.dist, "new_group", fail)
    with pytest.raises(RuntimeError):
        control_of(board)
    failure = board.read().failure
    assert failure is not None and failure.step == -1 and "no route to host" in failure.message
    assert not [thread for thread in threading.enumerate() if thread.name == "group-control"]


def test_stacks_say_where_every_thread_stands(board: Board) -> None:
    release = threading.Event()

    def wait_for_a_shard_that_never_comes() -> None:
        release.wait()

    thread = threading.Thread(target=wait_for_a_shard_that_never_comes, name="TrainingThread(train)")
    thread.start()
    try:
        text = stacks()
        assert text.rpartition("thread ")[2].startswith("TrainingThread(train):"), "the one that matters comes last"
        assert "in wait_for_a_shard_that_never_comes" in text and "test_stacks_say" not in text
        with control_of(board) as control:
            board.want_stacks()
            while not board.read().stacks:
                pass
            assert "wait_for_a_shard_that_never_comes" in board.read().stacks[0]
            control.end()
    finally:
        release.set()
        thread.join()
