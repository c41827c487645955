"""Output shards made by plain Ray actors all over a cluster: who is given what, and what a failure means.

Ray places actors, notices deaths and asks an autoscaler for room. Nothing but commit records passes through the driver.
"""

import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.cluster_nodes import gone_nodes
from pipeline.errors import PipelineError
from pipeline.generation.output.commits import Commit
from pipeline.generation.pool.actors import IN_HAND, Actor, Actors, has_died, why_dead
from pipeline.generation.pool.early_end import EarlyEnd
from pipeline.generation.pool.idle_watch import IdleWatch
from pipeline.generation.pool.pool_config import PoolConfig, PoolStatistics
from pipeline.generation.pool.shard_actor import Answer, Place, WorkOrder
from pipeline.generation.pool.shard_queue import FailureKind, Retried, ShardLimits, ShardQueue
from pipeline.generation.spec.sampling_plan import OutputShard
from pipeline.progress import format_duration, say

_LOOK_INTERVAL_S, _WATCH_INTERVAL_S = 1.0, 2.0


class SamplingPool:
    """Actors that make shards until none waits."""

    def __init__(
        self, order: WorkOrder, shards: Iterable[OutputShard], config: PoolConfig, num_shards: int, *, is_proven: bool
    ) -> None:
        """Start nothing yet; needs an initialised Ray.

        Args:
            order: What the actors make.
            shards: Which, in order; drawn lazily.
            config: How many actors of what size, and what they are forgiven.
            num_shards: How many shards there are, so that no more actors are started.
            is_proven: Whether others of the run have been made before.
        """
        self._queue = ShardQueue(shards, config.max_shard_retries)
        self._limits = ShardLimits(floor_s=config.shard_timeout_s, first_s=config.start_timeout_s)
        self.statistics = PoolStatistics()
        self._actors = Actors(order, config, self.statistics)
        self._num_actors, self._batch_size = min(config.num_actors, num_shards), order.spec.batch_size
        self._idle, self._watched_s = IdleWatch(config), time.monotonic()
        self._early_end = EarlyEnd(self._actors.all, num_shards, config.max_shard_retries, is_proven=is_proven)

    @property
    def set_aside(self) -> Sequence[Retried]:
        """The shards that could not be made, each with its failures."""
        return self._queue.set_aside

    def commits(self) -> Generator[Commit, None, None]:
        """What becomes of each shard, in any order, as soon as it is committed.

        Raises:
            PipelineError: If nothing works (early_end.py), or nobody for idle_limit_s. Shards that fail beside others
                are `set_aside`.
        """
        try:
            while self._queue.is_open:
                self._actors.launch(self._num_actors if self._queue.has_waiting else 0)
                self._feed()
                yield from self._collect()
                if time.monotonic() - self._watched_s >= _WATCH_INTERVAL_S:
                    self._watch()
        finally:
            for actor in [*self._actors.all]:
                self._actors.remove(actor)

    def _feed(self) -> None:
        places = self._actors.places
        for number in range(IN_HAND):  # everybody one before anybody two
            for actor in self._actors.that_hold(number):
                if shard := self._queue.take(actor.where, places, in_hand=actor.shards, has_made=actor.num_made > 0):
                    self._actors.give(actor, shard)

    def _collect(self) -> Generator[Commit, None, None]:
        actors = {ref: actor for actor in self._actors.all for ref in actor.awaited}
        if not actors:
            time.sleep(_LOOK_INTERVAL_S)
            return
        ray.wait([*actors], num_returns=1, timeout=_LOOK_INTERVAL_S)
        for ref in ray.wait([*actors], num_returns=len(actors), timeout=0)[0]:
            actor = actors[ref]
            if actor not in self._actors.all or actor.is_broken:
                continue  # ended over an answer before this one
            try:
                answer = ray.get(ref)
            except RayError as error:
                self._lose(actor, error)
                continue
            if isinstance(answer, Answer):
                actor.num_waits = answer.num_waits
            if actor.starting is not None:
                self._go_on_starting(actor, answer)
            elif commit := self._take(actor, ref, answer):
                yield commit

    def _go_on_starting(self, actor: Actor, answer: Place | Answer) -> None:
        if isinstance(answer, Place):
            actor.place, actor.starting = answer, actor.handle.load.remote()
            actor.placed_s = time.monotonic()
        elif answer.kind is None:
            actor.starting, self._actors.num_failed_starts = None, 0
            self._early_end.loaded()
            if self.statistics.num_lost:
                say(f"an actor is at work in {actor.where}")
        else:
            self._fail_start(actor, answer.kind, answer.error)
        actor.since_s = time.monotonic()

    def _take(self, actor: Actor, ref: Any, answer: Answer) -> Commit | None:
        shard, took_s = actor.finish(ref)
        actor.had_outage = answer.kind == "outage"
        if answer.commit is None:
            self._fail(actor, shard, answer.kind or "shard", answer.error)
            return None
        self._queue.made(shard)
        self._early_end.made()
        self._limits.add(took_s, is_first=actor.num_made == 0)
        self._actors.count(actor, answer.commit)
        return answer.commit

    def _fail(self, actor: Actor, shard: OutputShard, kind: FailureKind, error: PipelineError) -> None:
        """Hold a failure against a shard, and perhaps a device; an outage against nobody."""
        if kind == "outage":  # the actor's own requests have been repeated for minutes
            self._idle.last_error = str(error)
            return self._queue.give_back(shard)
        self.statistics.num_retries += 1
        is_held = kind == "device" and self._give_up_device(actor, shard, error)
        if self._queue.fail(shard, kind, actor.where, error):
            say(f"shard {shard.index} is set aside: {error}")
            if self._queue.set_aside[-1].num_device_failures > 1:  # the devices are not to blame
                self._early_end.is_to_blame(shard.index)
                self._actors.release(shard.index)
        elif kind == "device":
            self._early_end.broke(actor, error, shard.index, is_last=not is_held)
        self._early_end.failed(actor, error, self._queue.failed_in_a_row)

    def _give_up_device(self, actor: Actor, shard: OutputShard, error: PipelineError) -> bool:
        """Its process computes no more; whether it stays and holds the device, which so gets no work."""
        for other in actor.drop():
            self._queue.give_back(other)
        if not self._actors.hold(actor, shard.index):
            self._actors.remove(actor)
            return False
        say(f"{actor.where} is given up: {error}")
        return True

    def _lose(self, actor: Actor, error: RayError) -> None:
        """It does not answer any more, which is a shard's fault only on a node that lives."""
        reason, is_on_node = why_dead(error), actor.place is not None and has_died(error)
        is_fault = is_on_node and not gone_nodes([actor.node_id])
        if actor.starting is not None:
            return self._fail_start(actor, "shard" if is_fault else "outage", PipelineError(reason))
        if is_fault:
            return self._end(actor, f"its process died ({reason})")
        self._actors.avoids_silent = True
        self.statistics.num_lost += 1
        say(f"the actor in {actor.where} is lost, its shards are made elsewhere: {reason}")
        for shard in actor.drop():
            self._queue.give_back(shard)
        self._actors.remove(actor)

    def _end(self, actor: Actor, what: str) -> None:
        """End an actor over what it had in hand: one shard's fault; of two neither's, and each is tried alone."""
        first, *more = shards = actor.drop()
        self._actors.remove(actor)
        advice = f"if memory ran out, choose fewer actors or batch_size={max(self._batch_size // 2, 1)}"
        error = PipelineError(f"output shard {first.index} (ids from {first.first_id}): {what}; {advice}")
        if not more:
            return self._fail(actor, first, "shard", error)
        for shard in shards:
            self._queue.give_back(shard, is_suspect=True)
        self._early_end.failed(actor, error, self._queue.failed_in_a_row)

    def _fail_start(self, actor: Actor, kind: FailureKind, error: PipelineError) -> None:
        """Start another: elsewhere, if it is the node's fault (kind "shard") or the device's."""
        is_held = kind == "device" and self._actors.hold(actor, None)
        if str(error) != self._idle.last_error:
            say(f"an actor did not start: {error}")
        self._idle.last_error = str(error)
        if not is_held:
            self._actors.fail_start(actor, is_sick=kind == "shard")
            if kind != "outage":
                self._early_end.not_loaded(actor, error, self._actors.fitting_nodes)

    def _watch(self) -> None:
        """Look for what no answer tells: nodes that will go, what hangs, and that nobody works."""
        self._watched_s = time.monotonic()
        self._actors.look_for_notices()
        for actor, limit_s in self._actors.hanging(self._limits).items():
            what = f"no answer for {format_duration(limit_s)} (shard_timeout_s, start_timeout_s)"
            self._fail_start(actor, "shard", PipelineError(what)) if actor.starting else self._end(actor, what)
        self._idle.look(self._actors.all, self._actors.num_failed_starts)
