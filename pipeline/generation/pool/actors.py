"""The actors of a pool: started, told apart, ended. What they do and what their death means is sampling_pool.py's."""

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from pipeline.cluster_nodes import avoiding, draining_nodes, fitting_nodes, has_room, silent_nodes
from pipeline.generation.output.commits import Commit
from pipeline.generation.pool.pool_config import UNKNOWN_KIND, PoolConfig, PoolStatistics
from pipeline.generation.pool.shard_actor import Place, ShardActor, WorkOrder
from pipeline.generation.pool.shard_queue import ShardLimits
from pipeline.generation.spec.sampling_plan import OutputShard
from pipeline.ray_errors import innermost
from pipeline.redact import redact
from pipeline.stores.object_store import one_line

IN_HAND = 2
"""Shards of an actor: one that is drawn, one that waits for the device or is committed."""
_MAX_START_PAUSE_S = 30.0
_SICK_S = 600.0
_ANSWER_TIMEOUT_S = 10.0
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
    num_waits: int = 0
    """How often it had paused for a server when it last answered."""
    is_broken: bool = False
    """Whether its device is. It holds that device, so that nobody else is given it, and gets no shard."""
    broken_by: int | None = None
    """The shard that broke it; None: loading did."""
    avoided: frozenset[str] = frozenset()
    """Nodes where it may not be, since processes did not start there."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be given a shard."""
        return self.starting is None and not self.is_broken

    @property
    def awaited(self) -> list[Any]:
        """Ray's references to the answers that are to come from it."""
        return ([] if self.starting is None else [self.starting]) + [ref for ref, _ in self.in_hand]

    @property
    def shards(self) -> list[OutputShard]:
        """What it has in hand."""
        return [shard for _, shard in self.in_hand]

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
        shards = self.shards
        self.in_hand.clear()
        return shards


class Actors:
    """Those that there are."""

    def __init__(self, order: WorkOrder, config: PoolConfig, statistics: PoolStatistics) -> None:
        """Start none yet; needs an initialised Ray. The time of those that end is added to the statistics."""
        actor_class: Any = ray.remote(ShardActor)
        self._options = {"max_concurrency": IN_HAND + 1, **config.ray_options}  # num_waits beside its shards
        self._config = config
        self._class = actor_class
        self._order = ray.put(order)
        self._statistics = statistics
        self._not_before_s = 0.0
        self._first_given_s: float | None = None
        self._draining: frozenset[str] = frozenset()
        self._sick_until_s: dict[str, float] = {}
        self._avoided: frozenset[str] = frozenset()
        self.all: list[Actor] = []
        self.num_failed_starts = 0
        """In a row."""
        self.avoids_silent = False
        """Whether a node has been lost: Ray takes half a minute to learn of it, and starts actors there meanwhile."""

    @property
    def places(self) -> set[str]:
        """Where shards can be made."""
        return {actor.where for actor in self.all if actor.place is not None and not actor.is_broken}

    @property
    def fitting_nodes(self) -> frozenset[str]:
        """Ids of all nodes where an actor could be."""
        return fitting_nodes(self._config.resources)

    def that_hold(self, number: int) -> list[Actor]:
        """Those that have so many shards in hand and may be given another."""
        return [one for one in self.all if one.is_ready and len(one.in_hand) == number and not self._is_leaving(one)]

    def launch(self, number: int) -> None:
        """Ask for actors until there are so many that can work; after one that did not start there is a pause.

        Those that hold a broken device do not count: another device may be free, or come.
        """
        now_s, missing = time.monotonic(), number - sum(not actor.is_broken for actor in self.all)
        if missing <= 0 or now_s < self._not_before_s:
            return
        selector = avoiding([*self._avoided, *(silent_nodes() if self.avoids_silent else [])])
        for _ in range(missing):
            handle = self._class.options(**self._options, label_selector=selector).remote(self._order)
            starting = handle.place.remote()
            self.all.append(Actor(handle=handle, starting=starting, since_s=now_s, avoided=self._avoided))

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

    def fail_start(self, actor: Actor, *, is_sick: bool) -> None:
        """End an actor that did not start.

        Args:
            actor: Which.
            is_sick: Whether that is its node's fault: for a while others start elsewhere, while there is an elsewhere.
        """
        self.remove(actor)
        self.num_failed_starts += 1
        self._not_before_s = time.monotonic() + min(2.0**self.num_failed_starts, _MAX_START_PAUSE_S)
        if is_sick:
            self._sick_until_s[actor.node_id] = time.monotonic() + _SICK_S
            self._look_who_is_sick()

    def _look_who_is_sick(self) -> None:
        """Those that wait for a place on other terms than the present ones wait anew."""
        now_s = time.monotonic()
        self._sick_until_s = {node: until_s for node, until_s in self._sick_until_s.items() if now_s < until_s}
        sick = frozenset(self._sick_until_s)
        self._avoided = sick if sick and self.fitting_nodes - sick else frozenset()
        for actor in [one for one in self.all if one.place is None and one.avoided != self._avoided]:
            self.remove(actor)

    def hold(self, actor: Actor, broken_by: int | None) -> bool:
        """Have an actor hold its broken device and do nothing any more, if there are other devices.

        Args:
            actor: Which.
            broken_by: As of Actor.

        Returns:
            Whether it does.
        """
        if not (self.places - {actor.where} or has_room(self._config.resources)):
            return False
        actor.is_broken, actor.broken_by, actor.starting = True, broken_by, None
        return True

    def release(self, shard: int) -> None:
        """End those that hold a device which a shard broke."""
        for actor in [one for one in self.all if one.broken_by == shard]:
            self.remove(actor)

    def hanging(self, limits: ShardLimits) -> dict[Actor, float]:
        """Those that take longer than they may, and their limits, seconds.

        Who has paused for a server since the last answer does not hang, and has the same time again.
        """
        now_s, late, asked = time.monotonic(), dict[Actor, float](), dict[Any, Actor]()
        for actor in self.all:
            usual_s = limits.limit_s(is_first=actor.num_made == 0)
            limit_s = self._config.start_timeout_s if actor.starting is not None else usual_s
            if actor.place is not None and actor.awaited and now_s - actor.since_s > limit_s:
                late[actor] = limit_s
                asked[actor.handle.num_waits.remote()] = actor
        for ref in ray.wait([*asked], num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)[0] if asked else []:
            actor = asked[ref]
            with suppress(RayError):
                num_waits = ray.get(ref)
                if num_waits > actor.num_waits:
                    actor.num_waits, actor.since_s = num_waits, time.monotonic()
                    del late[actor]
        return late

    def _is_leaving(self, actor: Actor) -> bool:
        """Whether its node has given notice."""
        return actor.place is not None and actor.place.node_id in self._draining

    def look_for_notices(self) -> None:
        """Ask Ray which nodes have given notice; an actor there ends when it has nothing in hand."""
        self._draining = draining_nodes()
        if self._sick_until_s:
            self._look_who_is_sick()
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
