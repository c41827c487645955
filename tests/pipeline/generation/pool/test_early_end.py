"""When nothing works, and when it is one machine, one device or some shards alone."""

import time

import pytest

from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.pool.actors import Actor
from pipeline.generation.pool.early_end import EarlyEnd
from pipeline.generation.pool.shard_actor import Place

ERROR = PipelineError("a reason")


def actor_on(node: str, device: str = "GPU 0", *, placed_s: float = -1.0, is_loading: bool = False) -> Actor:
    """One that has been there from the start, unless it was placed later."""
    place = Place(node_id=node, device=device)
    return Actor(handle=None, starting=object() if is_loading else None, since_s=0.0, place=place, placed_s=placed_s)


def fail(end: EarlyEnd, actor: Actor, number: int) -> None:
    """So many different shards, one after the other."""
    for index in range(number):
        end.failed(actor, ERROR, range(index + 1))


def test_six_shards_that_fail_where_none_was_ever_made() -> None:
    actor = actor_on("a")
    fail(EarlyEnd([actor], 1000, 4, is_proven=False), actor, 5)
    with pytest.raises(PipelineError, match=r"^a reason; 6 output shards failed .* \(0, 1, 2, 3, 4, 5\): 1000 of 1000"):
        fail(EarlyEnd([actor], 1000, 4, is_proven=False), actor, 6)


def test_twenty_where_some_were_made_now_or_before() -> None:
    actor = actor_on("a")
    for is_proven in (True, False):
        end = EarlyEnd([actor], 1000, 4, is_proven=is_proven)
        if not is_proven:
            end.made()
        fail(end, actor, 19)
        with pytest.raises(PipelineError, match=rf"20 output shards .*8, 9\.\.\.\): {1000 - (not is_proven)} of 1000"):
            fail(end, actor, 20)


def test_one_shard_that_fails_ever_again_is_no_sign_unless_there_is_no_other() -> None:
    actor = actor_on("a")
    end = EarlyEnd([actor], 2, 4, is_proven=False)
    for _ in range(99):
        end.failed(actor, ERROR, [0])
    end, told = EarlyEnd([actor], 1, 4, is_proven=False), EarlyEnd([actor], 1, 4, is_proven=True)
    for _ in range(4):
        end.failed(actor, ERROR, [0])
    with pytest.raises(PipelineError, match="a reason; 1 output shards failed"):
        end.failed(actor, ERROR, [0])
    for _ in range(5):
        told.failed(actor, ERROR, [0])


def test_an_error_keeps_its_class_and_so_its_exit_code() -> None:
    actor = actor_on("a")
    with pytest.raises(ConfigError):
        EarlyEnd([actor], 1, 0, is_proven=False).failed(actor, ConfigError("a field"), [0])


def test_whoever_may_still_make_one_is_waited_for_but_not_a_newcomer() -> None:
    """A sick machine fails a hundred in a second while another is busy with its first."""
    sick, busy = actor_on("a"), actor_on("b")
    actors = [sick, busy, actor_on("c", is_loading=True)]
    end = EarlyEnd(actors, 1000, 4, is_proven=False)
    fail(end, sick, 100)
    del actors[2]
    fail(end, sick, 100)
    busy.is_broken = True
    actors.append(actor_on("d", placed_s=time.monotonic() + 60))  # whoever replaces a process that ended
    with pytest.raises(PipelineError, match="a reason"):
        fail(end, sick, 100)


def test_devices_that_break_at_first_shards_on_two_nodes_or_all_that_there_are() -> None:
    def new() -> EarlyEnd:
        return EarlyEnd([], 1000, 99, is_proven=False)

    first, beside, elsewhere = actor_on("a"), actor_on("a", "GPU 1"), actor_on("b")
    end = new()
    end.broke(first, ERROR, 0, is_last=False)
    end.broke(beside, ERROR, 1, is_last=False)  # one sick node
    with pytest.raises(PipelineError, match="a reason; 3 devices broke at their first shards: 1000 of 1000"):
        end.broke(elsewhere, ERROR, 2, is_last=False)
    end = new()
    end.broke(first, ERROR, 0, is_last=False)
    with pytest.raises(PipelineError, match="2 devices broke"):
        end.broke(beside, ERROR, 1, is_last=True)
    end = new()
    end.broke(first, ERROR, 0, is_last=False)
    end.broke(elsewhere, ERROR, 0, is_last=True)  # one shard breaks both
    end.is_to_blame(0)
    end.broke(first, ERROR, 1, is_last=True)
    end = new()
    end.made()
    end.broke(first, ERROR, 0, is_last=False)
    end.broke(elsewhere, ERROR, 1, is_last=True)


def test_a_model_that_cannot_be_loaded_on_three_nodes_or_three_times_on_all_there_are() -> None:
    def new(*actors: Actor) -> EarlyEnd:
        return EarlyEnd(actors, 1000, 4, is_proven=False)

    nodes = [actor_on(name) for name in "abc"]
    end = new()
    for _ in range(9):
        end.not_loaded(nodes[0], ERROR, "ab")  # one sick node
    end = new()
    for one in nodes[:2]:
        end.not_loaded(one, ERROR, "abcdef")
    with pytest.raises(PipelineError, match="a reason; no process could load the model, of 3 that tried: 1000 of 1000"):
        end.not_loaded(nodes[2], ERROR, "abcdef")
    end = new()
    for _ in range(2):
        end.not_loaded(nodes[0], ERROR, "a")
    with pytest.raises(PipelineError, match="of 3 that tried"):
        end.not_loaded(nodes[0], ERROR, "a")
    end = new(actor_on("a", "GPU 7", is_loading=True))
    for _ in range(9):
        end.not_loaded(nodes[0], ERROR, "a")  # another device of this node is loading still
    end = new()
    end.loaded()
    for one in nodes * 3:
        end.not_loaded(one, ERROR, "abc")
