"""Which shard is made next: lazily, elsewhere after a failure, alone where it may have ended somebody."""

from collections import deque
from collections.abc import Collection, Iterator

import pytest

from pipeline.errors import PipelineError
from pipeline.generation.pool.shard_queue import ShardLimits, ShardQueue
from pipeline.generation.spec.sampling_plan import OutputShard

ERROR = PipelineError("no")


def shard(index: int) -> OutputShard:
    return OutputShard(index=index, first_id=10 * index, num_samples=10)


def queue_of(number: int, max_retries: int = 2) -> ShardQueue:
    return ShardQueue([shard(index) for index in range(number)], max_retries)


def take(
    queue: ShardQueue, place: str = "a", places: str = "ab", *, in_hand: Collection[int] = (), has_made: bool = True
) -> int | None:
    taken = queue.take(place, [*places], in_hand=[shard(index) for index in in_hand], has_made=has_made)
    return None if taken is None else taken.index


def test_shards_are_drawn_as_they_are_asked_for() -> None:
    drawn = []

    def endless() -> Iterator[OutputShard]:
        for index in range(10**9):
            drawn.append(index)
            yield shard(index)

    queue = ShardQueue(endless(), 2)
    assert [take(queue) for _ in range(3)] == [0, 1, 2] and len(drawn) <= 4


def test_a_queue_is_open_until_every_shard_is_made_or_set_aside() -> None:
    queue = queue_of(2, max_retries=0)
    assert queue.is_open and queue.has_waiting
    assert (take(queue), take(queue), take(queue)) == (0, 1, None)
    assert queue.is_open and not queue.has_waiting, "both are in hand"
    queue.made(shard(0))
    assert queue.is_open
    assert queue.fail(shard(1), "shard", "a", ERROR)
    assert not queue.is_open
    assert not ShardQueue([], 2).is_open


def test_what_has_failed_is_tried_elsewhere_while_there_is_an_elsewhere() -> None:
    queue = queue_of(1)
    take(queue, "a")
    assert not queue.fail(shard(0), "shard", "a", ERROR)
    assert take(queue, "a") is None, "b is there"
    assert take(queue, "b") == 0
    assert not queue.fail(shard(0), "shard", "b", ERROR)
    assert take(queue, "a") == 0, "both have failed"
    assert queue.fail(shard(0), "shard", "a", ERROR), "two retries"
    assert [(one.shard.index, one.places, one.error) for one in queue.set_aside] == [(0, ["a", "b", "a"], ERROR)]


def test_one_place_tries_again_itself() -> None:
    queue = queue_of(1)
    take(queue, "a", "a")
    queue.fail(shard(0), "shard", "a", ERROR)
    assert take(queue, "a", "a") == 0


def test_a_failure_does_not_hold_up_others() -> None:
    queue = queue_of(3)
    take(queue, "a")
    queue.fail(shard(0), "shard", "a", ERROR)
    assert [take(queue, "a") for _ in range(2)] == [1, 2]


def test_what_is_given_back_comes_first_and_counts_for_nothing() -> None:
    queue = queue_of(3, max_retries=0)
    for _ in range(10):
        assert take(queue) == 0
        queue.give_back(shard(0))
    assert not queue.set_aside


def test_of_two_that_may_have_ended_an_actor_each_is_tried_alone() -> None:
    queue = queue_of(6)
    assert (take(queue), take(queue, in_hand=[0])) == (0, 1)
    for index in (0, 1):
        queue.give_back(shard(index), is_suspect=True)
    assert take(queue) == 0 and take(queue, in_hand=[0]) is None, "alone"
    queue.made(shard(0))
    assert take(queue) == 1
    queue.give_back(shard(1))
    assert take(queue) == 1 and take(queue, in_hand=[1]) is None, "a lost node does not clear it"
    queue.made(shard(1))
    assert (take(queue), take(queue, in_hand=[2])) == (2, 3), "nothing is left of it"
    assert not queue.set_aside


def test_two_devices_that_break_over_a_shard_are_its_doing() -> None:
    queue = queue_of(1, max_retries=9)
    take(queue, "a")
    assert not queue.fail(shard(0), "device", "a", ERROR)
    take(queue, "b")
    assert queue.fail(shard(0), "device", "b", ERROR)


def test_a_shard_that_was_made_after_a_failure_is_forgiven() -> None:
    queue = queue_of(1, max_retries=0)
    take(queue)
    queue.give_back(shard(0), is_suspect=True)
    take(queue)
    queue.made(shard(0))
    assert not queue.is_open and not queue.set_aside


def test_whoever_has_a_shard_in_hand_gets_no_second_one_while_one_that_failed_waits_for_him() -> None:
    """One of them, for each: the others work on as before."""
    queue = queue_of(9)
    assert (take(queue, "a"), take(queue, "b", in_hand=[7]), take(queue, "c", in_hand=[8])) == (0, 1, 2)
    queue.fail(shard(0), "shard", "a", ERROR)
    assert take(queue, "a", "abc", in_hand=[7]) == 3, "it failed there"
    assert take(queue, "b", "abc", in_hand=[1]) is None and take(queue, "b", "abc", in_hand=[1]) is None
    assert take(queue, "c", "abc", in_hand=[2]) == 4, "b has its hands free soon"
    assert take(queue, "c", "ac", in_hand=[2]) is None, "b is gone"
    assert take(queue, "c", "ac") == 0


def feed(queue: ShardQueue, hands: dict[str, deque[int]], *, has_made: bool = True) -> None:
    """Everybody one before anybody two, as the pool does."""
    for number in range(2):
        for place, hand in hands.items():
            if len(hand) == number:
                taken = queue.take(place, hands, in_hand=[shard(index) for index in hand], has_made=has_made)
                hand.extend([] if taken is None else [taken.index])


def test_a_shard_that_failed_is_tried_again_soon_and_not_when_all_others_are_made() -> None:
    """10,000 shards and 8 actors with up to two each, all equally fast; every 1000th shard fails once."""
    queue, order, pauses, failed_at = queue_of(10_000), list[int](), list[int](), dict[int, int]()
    hands = {str(actor): deque[int]() for actor in range(8)}
    while queue.is_open:
        feed(queue, hands)
        for place, hand in hands.items():
            if not hand:
                continue
            index = hand.popleft()
            if index % 1000 == 0 and index not in failed_at:
                failed_at[index] = len(order)
                queue.fail(shard(index), "shard", place, ERROR)
                continue
            queue.made(shard(index))
            pauses += [len(order) - failed_at[index]] if index in failed_at else []
            order.append(index)
    assert sorted(order) == list(range(10_000)) and not queue.set_aside
    assert len(pauses) == 10 and max(pauses) <= 3 * len(hands)


def test_who_has_made_none_rather_gets_one_that_has_not_failed() -> None:
    """His first has a long limit: a shard that hangs would use it up whenever it is tried."""
    queue = queue_of(3)
    take(queue, "a")
    queue.fail(shard(0), "shard", "a", ERROR)
    assert take(queue, "b", "b", has_made=False) == 1
    queue.made(shard(1))
    assert take(queue, "b", "b", has_made=True) == 0
    queue.fail(shard(0), "shard", "b", ERROR)
    assert [take(queue, "c", "c", has_made=False) for _ in range(2)] == [2, 0], "there is no other"


def test_one_actor_that_a_shard_ends_again_and_again_makes_others_between() -> None:
    """Each process that it ends is replaced by one that has made none yet."""
    queue, order, num_processes = queue_of(40, max_retries=4), "", 0
    while queue.is_open:
        place, hand, has_made = str(num_processes), deque[int](), False
        num_processes += 1
        while queue.is_open:
            feed(queue, {place: hand}, has_made=has_made)
            if hand[0] == 5:
                break
            queue.made(shard(hand.popleft()))
            order, has_made = order + ".", True
        if len(hand) == 1:
            queue.fail(shard(5), "shard", place, ERROR)
        for index in hand if len(hand) == 2 else ():
            queue.give_back(shard(index), is_suspect=True)
        order += "x"
    assert order.count(".") == 39 and [len(one.places) for one in queue.set_aside] == [5]
    assert order.count("x") == 7 and "xx" not in order.removesuffix("x"), "six processes, one of them with two; the end"


def test_after_failures_in_a_row_the_next_ones_come_from_farther_on() -> None:
    """Bad shards may lie side by side; what was put off comes as soon as one is made."""
    queue, tried = queue_of(10_000, max_retries=0), []
    while (index := take(queue, has_made=False)) is not None and index < 1000:
        tried.append(index)
        queue.fail(shard(index), "shard", "a", ERROR)
    assert tried == [0, 1, 3, 8, 25, 90, 347] and index == 1372
    queue.made(shard(1372))
    assert [take(queue) for _ in range(3)] == [2, 4, 5]


def test_what_was_put_off_is_tried_when_there_is_nothing_else() -> None:
    queue, tried = queue_of(8, max_retries=0), set[int | None]()
    while queue.has_waiting:
        tried.add(index := take(queue, has_made=False))
        assert index is not None
        queue.fail(shard(index), "shard", "a", ERROR)
    assert tried == set(range(8)) and not queue.is_open


def test_a_sick_machine_does_not_fail_all_shards_once() -> None:
    """It fails in a second, and another takes an hour: what has failed waits for the other, and nothing new fails."""
    queue, num_failed = queue_of(10_000), 0
    while (index := take(queue, "sick")) is not None:
        queue.fail(shard(index), "shard", "sick", ERROR)
        num_failed += 1
    assert num_failed == 50
    assert take(queue, "b") == 0
    queue.made(shard(0))
    assert take(queue, "sick") is not None and take(queue, "b") == 1


@pytest.mark.parametrize(
    ("durations_s", "usual_s", "first_s"),
    [([], 60, 600), ([1, 2, 3], 60, 600), ([10, 100, 1000], 1000, 1000), ([7.0] * 500, 70, 600)],
)
def test_the_limit_is_a_floor_or_ten_times_the_median(durations_s: list[float], usual_s: int, first_s: int) -> None:
    limits = ShardLimits(floor_s=60, first_s=600)
    for duration_s in durations_s:
        limits.add(duration_s, is_first=False)
    assert (limits.limit_s(is_first=False), limits.limit_s(is_first=True)) == (usual_s, first_s)


def test_the_median_follows_what_shards_take_lately() -> None:
    limits = ShardLimits(floor_s=60, first_s=600)
    for duration_s in [1.0] * 1000 + [100.0] * 101:
        limits.add(duration_s, is_first=False)
    assert limits.limit_s(is_first=False) == 1000


@pytest.mark.parametrize(("firsts_s", "limit_s"), [([], 600), ([1, 2, 3], 60), ([10, 20, 30], 200), ([500], 600)])
def test_the_long_limit_of_a_first_shard_ends_when_others_have_made_theirs(firsts_s: list[float], limit_s: int) -> None:
    limits = ShardLimits(floor_s=60, first_s=600)
    for duration_s in firsts_s:
        limits.add(duration_s, is_first=True)
    assert (limits.limit_s(is_first=True), limits.limit_s(is_first=False)) == (limit_s, 60)
