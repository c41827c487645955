"""Which shard is made next: lazily, elsewhere after a failure, alone where it may have ended somebody."""

from collections.abc import Iterator

import pytest

from pipeline.errors import PipelineError
from pipeline.generation.pool.shard_queue import ShardLimits, ShardQueue
from pipeline.generation.spec.sampling_plan import OutputShard

ERROR = PipelineError("no")


def shard(index: int) -> OutputShard:
    return OutputShard(index=index, first_id=10 * index, num_samples=10)


def queue_of(number: int, max_retries: int = 2) -> ShardQueue:
    return ShardQueue([shard(index) for index in range(number)], max_retries)


def take(queue: ShardQueue, place: str = "a", places: str = "ab", *, is_alone: bool = True) -> int | None:
    taken = queue.take(place, places, is_alone=is_alone)
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
    queue = queue_of(3)
    assert (take(queue), take(queue, is_alone=False)) == (0, 1)
    for index in (0, 1):
        queue.give_back(shard(index), is_suspect=True)
    assert queue.is_suspect(shard(0)) and queue.is_suspect(shard(1)) and not queue.is_suspect(shard(2))
    assert take(queue, is_alone=False) == 2, "somebody who has another in hand gets none of them"
    assert take(queue) == 0
    queue.made(shard(0))
    assert not queue.is_suspect(shard(0)) and queue.is_suspect(shard(1))
    assert take(queue) == 1
    queue.give_back(shard(1))
    assert queue.is_suspect(shard(1)), "a lost node does not clear it"
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


@pytest.mark.parametrize(
    ("durations_s", "usual_s", "first_s"),
    [([], 60, 600), ([1, 2, 3], 60, 600), ([10, 100, 1000], 1000, 1000), ([7.0] * 500, 70, 600)],
)
def test_the_limit_is_a_floor_or_ten_times_the_median(durations_s: list[float], usual_s: int, first_s: int) -> None:
    limits = ShardLimits(floor_s=60, first_s=600)
    limits.add(1e9, is_first=True)
    for duration_s in durations_s:
        limits.add(duration_s, is_first=False)
    assert (limits.limit_s(is_first=False), limits.limit_s(is_first=True)) == (usual_s, first_s)


def test_the_median_follows_what_shards_take_lately() -> None:
    limits = ShardLimits(floor_s=60, first_s=600)
    for duration_s in [1.0] * 1000 + [100.0] * 101:
        limits.add(duration_s, is_first=False)
    assert limits.limit_s(is_first=False) == 1000
