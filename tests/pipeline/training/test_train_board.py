"""What workers and driver tell each other, without Ray: the actor's class is plain."""

from pipeline.training.train_board import Board, Divergence, Member, Orders, WorkerFailure

MEMBER = Member(node_id="a", pid=1, actor=None)


def failure(rank: int) -> WorkerFailure:
    return WorkerFailure(rank=rank, step=3, error=None, kind="ValueError", message="x")


def group_of_two() -> Board:
    board = Board(0)
    board.begin_group(1)
    for rank in (0, 1):
        board.join(1, rank, MEMBER)
    return board


def test_lines_are_handed_out_once_and_outlive_a_group() -> None:
    board = group_of_two()
    board.update(1, 5, "loss 1")
    board.say("one")
    board.begin_group(2)
    assert (board.read().lines, board.read().lines) == (["one"], [])
    assert (board.read().step, board.read().note) == (5, "loss 1")


def test_orders_go_to_rank_0_and_only_leaving_stays() -> None:
    board = group_of_two()
    board.order(Orders.SAVE | Orders.LEAVE)
    assert board.beat(1, 1, 0, "training") == (Orders.NONE, False)
    assert board.beat(1, 0, 0, "training")[0] == Orders.SAVE | Orders.LEAVE
    assert board.beat(1, 0, 0, "training")[0] == Orders.LEAVE, "an order that was sent to a group that restarts"
    board.begin_group(2)
    board.join(2, 0, MEMBER)
    assert board.beat(2, 0, 0, "starting")[0] == Orders.NONE


def test_a_group_that_was_given_up_is_not_heard() -> None:
    board = group_of_two()
    board.begin_group(2)
    board.join(1, 0, MEMBER)
    board.update(1, 9, "of a run that was given up")
    board.fail(1, failure(0))
    board.drain(1, 5, ("a",))
    board.diverge(1, Divergence(steps=(1,), message="x"))
    board.put_stacks(1, 0, "x")
    assert board.beat(1, 0, 9, "training") == (Orders.NONE, False)
    state = board.read()
    assert not state.members and not state.stacks
    assert state.step == 0
    assert (state.failure, state.divergence, state.drain_deadline_ms) == (None, None, None)


def test_of_several_failures_the_first_is_kept() -> None:
    board = group_of_two()
    board.fail(1, failure(1))
    board.fail(1, failure(0))
    assert board.read().failure == failure(1)


def test_a_step_or_a_phase_of_any_worker_is_a_sign_of_progress() -> None:
    board = group_of_two()
    board._changed_s -= 100
    assert board.read().stuck_s >= 100
    board.beat(1, 1, -1, "starting")
    assert board.read().stuck_s >= 100, "that it lives is no progress"
    board.beat(1, 1, -1, "training")
    assert board.read().stuck_s < 100
    board._changed_s -= 100
    board.beat(1, 0, 0, "starting")
    assert board.read().stuck_s < 100
    board._changed_s -= 100
    board.beat(1, 0, 0, "starting", 1)
    assert board.read().stuck_s < 100, "it waits for a server, which is no hang"
    assert [member.step for member in board.read().members.values()] == [0, -1]


def test_stacks_are_asked_for_once_of_each() -> None:
    board = group_of_two()
    board.want_stacks()
    assert board.beat(1, 0, 0, "training")[1]
    board.put_stacks(1, 0, "here")
    assert not board.beat(1, 0, 0, "training")[1]
    assert board.beat(1, 1, 0, "training")[1]
    assert board.read().stacks == {0: "here"}
