"""Nobody works: a line now and then says what is waited for, and after a while the job ends by name."""

import time
from collections.abc import Mapping

from pipeline.cluster_nodes import whole_cluster
from pipeline.errors import PipelineError
from pipeline.generation.pool.actors import Actor
from pipeline.generation.pool.pool_config import PoolConfig
from pipeline.progress import format_duration, say

_FIRST_SAY_S = 30.0
_SAY_INTERVAL_S = 60.0
_MAX_FAILED_STARTS = 3
"""In a row: an actor that starts after so many is no sign of work any more."""


class IdleWatch:
    """How long nobody has worked."""

    def __init__(self, config: PoolConfig) -> None:
        """Begin to count."""
        self._config = config
        self._worked_s = time.monotonic()
        self._said_s = 0.0
        self.last_error = ""
        """Why the last actor did not start, or storage was not reached."""

    def look(self, actors: list[Actor], num_failed_starts: int) -> None:
        """Say what is waited for, if nobody works.

        Args:
            actors: All that there are.
            num_failed_starts: In a row.

        Raises:
            PipelineError: If nobody has worked for idle_limit_s.
        """
        now_s = time.monotonic()
        is_starting = any(actor.place is not None and actor.starting is not None for actor in actors)
        at_work = any(actor.in_hand and not actor.had_outage for actor in actors)
        if at_work or (is_starting and num_failed_starts < _MAX_FAILED_STARTS):
            self._worked_s = now_s
            return
        idle_s, there = now_s - self._worked_s, whole_cluster()
        if idle_s > self._config.idle_limit_s:
            raise PipelineError(self._end(there, sum(actor.is_broken for actor in actors)))
        if idle_s > _FIRST_SAY_S and now_s - self._said_s > _SAY_INTERVAL_S:
            self._said_s = now_s
            say(f"waiting for an actor: {self._needs(there)}; {format_duration(idle_s)} so far")

    def _end(self, there: Mapping[str, float], num_held: int) -> str:
        reasons = [self._needs(there)]
        if num_held:
            reasons.append(f"{num_held} broken devices are given up")
        if self.last_error:
            reasons.append(f"the last failure was: {self.last_error}")
        return (
            f"sampling: nobody was at work for {format_duration(self._config.idle_limit_s)} (idle_limit_s): "
            f"{'; '.join(reasons)}; run again to go on from what is committed"
        )

    def _needs(self, there: Mapping[str, float]) -> str:
        needs = " and ".join(f"{amount:g} {kind}" for kind, amount in self._config.resources.items())
        has = " and ".join(f"{there.get(kind, 0.0):g} {kind}" for kind in self._config.resources)
        return f"each needs {needs} of one node, the cluster has {has} in all"
