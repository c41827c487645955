"""The actors of a pool: started, told apart, ended. What they do and what their death means is sampling_pool.py's."""

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from pipeline.cluster_nodes import avoiding, draining_nodes, silent_nodes
from pipeline.generation.output.commits import Commit
from pipeline.generation.pool.pool_config import UNKNOWN_KIND, PoolConfig, PoolStatistics
from pipeline.generation.pool.shard_actor import Place, ShardActor, WorkOrder
from pipeline.generation.spec.sampling_plan import OutputShard
from pipeline.ray_errors import innermost
from pipeline.redact import redact
from pipeline.stores.object_store import one_line

IN_HAND = 2
"""Shards of an actor: one that is drawn, one that waits for the device or is committed."""
_MAX_START_PAUSE_S = 30.0
_MAX_REASON = 300


@dataclass(kw_only=True, slots=True, eq=False)
class Actor:
    """One process."""

    handle: Any
    """Ray's handle."""
    starting: Any
    """The answer of `place`, then of `load`; None: ready."""
    since_s: float
    """When what it does now began: waiting for a place, loading, or the shard in front; of time.monotonic()."""
    place: Place | None = None
    """Where it is; None: it has no place yet."""
    placed_s: float | None = None
    """When it said where it is: from then on it holds a device, of time.monotonic()."""
    first_given_s: float | None = None
    """When it was given its first shard."""
    last_made_s: float | None = None
    """When it had made its last one so far."""
    kind: str = UNKNOWN_KIND
    """Kind of its device, as the first shard that it made says."""
    in_hand: deque[tuple[Any, OutputShard]] = field(default_factory=deque)
    """Its shards, each with Ray's reference to the answer."""
    num_made: int = 0
    """Shards that it has made."""
    num_images: int = 0
    """Images in them."""
    num_bytes: int = 0
    """Their size, bytes."""
    had_outage: bool = False
    """Whether storage did not answer when it last made a shard."""
    broken_by: int | None = None
    """The shard that broke its device. It holds that device, so that nobody else is given it, and gets no shard."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be given a shard."""
        return self.starting is None and self.broken_by is None

    @property
    def awaited(self) -> list[Any]:
        """Ray's references to the answers that are to come from it."""
        return ([] if self.starting is None else [self.starting]) + [ref for ref, _ in self.in_hand]

    @property
    def where(self) -> str:
        """Its node and device, by name; once it has a place."""
        assert self.place is not None, "it has started"
        return self.place.name

    @property
    def node_id(self) -> str:
        """Its node, once it has a place."""
        assert self.place is not None, "it has started"
        return self.place.node_id

    def start(self, shard: OutputShard) -> None:
        """Give it a shard."""
        now_s = time.monotonic()
        if self.first_given_s is None:
            self.first_given_s = now_s
        if not self.in_hand:
            self.since_s = now_s
        self.in_hand.append((self.handle.make.remote(shard), shard))

    def finish(self, ref: Any) -> tuple[OutputShard, float]:
        """Take the shard whose answer has come.

        Returns:
            The shard, and how long it was in front, seconds.
        """
        shard = next(shard for of_shard, shard in self.in_hand if of_shard == ref)
        self.in_hand.remove((ref, shard))
        took_s, self.since_s = time.monotonic() - self.since_s, time.monotonic()
        return shard, took_s

    def drop(self) -> list[OutputShard]:
        """Take all its shards away."""
        shards = [shard for _, shard in self.in_hand]
        self.in_hand.clear()
        return shards


class Actors:
    """Those that there are."""

    def __init__(self, order: WorkOrder, config: PoolConfig, statistics: PoolStatistics) -> None:
        """Start none yet; needs an initialised Ray. The time of those that end is added to the statistics."""
        actor_class: Any = ray.remote(ShardActor)
        self._options = {"max_concurrency": IN_HAND, **config.ray_options}
        self._class = actor_class
        self._order = ray.put(order)
        self._statistics = statistics
        self._not_before_s = 0.0
        self._first_given_s: float | None = None
        self._draining: frozenset[str] = frozenset()
        self.all: list[Actor] = []
        self.num_failed_starts = 0
        """In a row."""
        self.avoids_silent = False
        """Whether a node has been lost: Ray takes half a minute to learn of it, and starts actors there meanwhile."""

    @property
    def places(self) -> set[str]:
        """Where shards can be made."""
        return {actor.where for actor in self.all if actor.place is not None and actor.broken_by is None}

    def that_hold(self, number: int) -> list[Actor]:
        """Those that have so many shards in hand and may be given another."""
        return [one for one in self.all if one.is_ready and len(one.in_hand) == number and not self._is_leaving(one)]

    def launch(self, number: int) -> None:
        """Ask for actors until there are so many that can work; after one that did not start there is a pause.

        Those that hold a broken device do not count: another device may be free, or come.
        """
        now_s, missing = time.monotonic(), number - sum(actor.broken_by is None for actor in self.all)
        if missing <= 0 or now_s < self._not_before_s:
            return
        selector = avoiding(silent_nodes()) if self.avoids_silent else None
        for _ in range(missing):
            handle = self._class.options(**self._options, label_selector=selector).remote(self._order)
            self.all.append(Actor(handle=handle, starting=handle.place.remote(), since_s=now_s))

    def give(self, actor: Actor, shard: OutputShard) -> None:
        """Have an actor make a shard."""
        actor.start(shard)
        if self._first_given_s is None:
            self._first_given_s = actor.since_s

    def count(self, actor: Actor, commit: Commit) -> None:
        """Note what an actor has made."""
        assert self._first_given_s is not None, "what was made was given"
        actor.last_made_s = time.monotonic()
        if commit.outcome == "first":  # another's record says where that one was made
            actor.kind = commit.record.made.device
        actor.num_made += 1
        actor.num_images += commit.record.num_samples
        actor.num_bytes += commit.record.size_bytes
        self._statistics.num_made += 1
        self._statistics.making_s = actor.last_made_s - self._first_given_s

    def remove(self, actor: Actor) -> None:
        """End an actor."""
        with suppress(RayError):
            ray.kill(actor.handle)
        self.all.remove(actor)
        if actor.placed_s is None:
            return
        of_kind = self._statistics.kind(actor.kind)
        of_kind.actor_s += time.monotonic() - actor.placed_s
        of_kind.num_images += actor.num_images
        of_kind.num_bytes += actor.num_bytes
        if actor.first_given_s is not None and actor.last_made_s is not None:
            of_kind.busy_s += actor.last_made_s - actor.first_given_s

    def fail_start(self, actor: Actor) -> None:
        """End an actor that did not start."""
        self.remove(actor)
        self.num_failed_starts += 1
        self._not_before_s = time.monotonic() + min(2.0**self.num_failed_starts, _MAX_START_PAUSE_S)

    def _is_leaving(self, actor: Actor) -> bool:
        """Whether its node has given notice."""
        return actor.place is not None and actor.place.node_id in self._draining

    def look_for_notices(self) -> None:
        """Ask Ray which nodes have given notice; an actor there ends when it has nothing in hand."""
        self._draining = draining_nodes()
        for actor in [one for one in self.all if self._is_leaving(one) and not one.in_hand]:
            self.remove(actor)


def has_died(error: RayError) -> bool:
    """Whether an answer that did not come says that the process has ended; otherwise it may just not be reached."""
    return isinstance(error, ActorDiedError | OutOfMemoryError | RayTaskError)


def why_dead(error: RayError) -> str:
    """What Ray knows about a death, in one line: its own account, without the actor's numbers before it."""
    whole = redact(one_line(innermost(error)))
    reason = whole.partition("The actor is dead because ")[2] or whole
    return reason.replace("Worker exit detail: ", "").strip()[:_MAX_REASON]
