"""Nothing works: what ends a job before it has tried a million shards.

One sick device or machine is no reason: while somebody else may still make something, the job goes on. Nor is one bad
shard, or several side by side: the queue takes the next ones from ever farther on.
"""

import time
from collections.abc import Collection, Sequence

from pipeline.errors import PipelineError
from pipeline.generation.pool.actors import Actor

_NUM_SHARDS = 6
"""Different shards that fail in a row, where none was ever made."""
_NUM_SHARDS_OF_WORKING = 20
"""The same where some were made, in this attempt or before it."""
_NUM_LOADS, _NUM_NODES = 3, 3
_MOST_NAMED = 10


class EarlyEnd:
    """What has failed so far, and whether that is enough."""

    def __init__(self, actors: Sequence[Actor], num_missing: int, max_retries: int, *, is_proven: bool) -> None:
        """Begin to count.

        Args:
            actors: All that there are, at any time.
            num_missing: Shards that are to be made.
            max_retries: How often one shard is tried again.
            is_proven: Whether earlier attempts have made some: the model can work, though perhaps not here.
        """
        self._actors, self._num_missing, self._max_retries = actors, num_missing, max_retries
        self._is_proven, self._has_loaded, self._num_made = is_proven, False, 0
        self._sick_nodes: set[str] = set()
        self._loads, self._shards = _Failures(), _Failures()
        self._broken: list[tuple[int, str]] = []

    def loaded(self) -> None:
        """A process has loaded the model: another that cannot is no sign any more."""
        self._has_loaded = True

    def made(self) -> None:
        """A shard was made."""
        self._num_made += 1
        self._shards = _Failures()

    def not_loaded(self, actor: Actor, error: PipelineError, fitting: Collection[str]) -> None:
        """A process could not load the model.

        Args:
            actor: Which.
            error: Why.
            fitting: Ids of all nodes where one could be.

        Raises:
            PipelineError: Of the error's class, if nobody has loaded it, on several nodes or all that there are, and
                nobody may who has not tried yet.
        """
        self._loads.add(actor)
        self._sick_nodes.add(actor.node_id)
        is_everywhere = len(self._sick_nodes) >= _NUM_NODES or self._sick_nodes >= set(fitting)
        is_enough = self._loads.number >= _NUM_LOADS and is_everywhere
        if is_enough and not self._has_loaded and not self._loads.leave_hope(self._actors):
            raise self._end(error, f"no process could load the model, of {self._loads.number} that tried")

    def failed(self, actor: Actor, error: PipelineError, shards: Collection[int]) -> None:
        """A shard has failed, or several may have ended a process.

        Args:
            actor: Whose.
            error: Why.
            shards: All to which that has happened since one was last made.

        Raises:
            PipelineError: Of the error's class, if so many different ones, or all that there are, show that nothing
                works, and nobody is left who may show otherwise.
        """
        self._shards.add(actor)
        is_proven = self._is_proven or self._num_made > 0
        is_all = not is_proven and len(shards) >= self._num_missing and self._shards.number > self._max_retries
        most = _NUM_SHARDS_OF_WORKING if is_proven else _NUM_SHARDS
        if (is_all or len(shards) >= most) and not self._shards.leave_hope(self._actors):
            named = ", ".join(map(str, sorted(shards)[:_MOST_NAMED])) + ("..." if len(shards) > _MOST_NAMED else "")
            raise self._end(error, f"{len(shards)} output shards failed and none was made between them ({named})")

    def broke(self, actor: Actor, error: PipelineError, shard: int, *, is_last: bool) -> None:
        """A device broke.

        Args:
            actor: Whose.
            error: How.
            shard: The index of the shard that it made.
            is_last: Whether there is no other device.

        Raises:
            PipelineError: Of the error's class, if devices on several nodes, or all, break at their first shards.
        """
        self._shards.add(actor)
        self._broken.append((shard, actor.node_id))
        shards, nodes = map(set, zip(*self._broken))
        is_everywhere = len(shards) > 1 and (len(nodes) > 1 or is_last)
        if is_everywhere and not self._num_made and not self._shards.leave_hope(self._actors):
            raise self._end(error, f"{len(self._broken)} devices broke at their first shards")

    def is_to_blame(self, shard: int) -> None:
        """A shard is, for the devices that broke over it."""
        self._broken = [one for one in self._broken if one[0] != shard]

    def _end(self, error: PipelineError, what: str) -> PipelineError:
        missing = f"{self._num_missing - self._num_made} of {self._num_missing} that were missing still are"
        return type(error)(f"{error}; {what}: {missing}, run again to go on from there")


class _Failures:
    """Failures of one sort, in a row."""

    def __init__(self) -> None:
        self.number = 0
        self._since_s = time.monotonic()
        self._places: set[str] = set()

    def add(self, actor: Actor) -> None:
        if not self.number:
            self._since_s = time.monotonic()
        self.number += 1
        self._places.add(actor.where)

    def leave_hope(self, actors: Sequence[Actor]) -> bool:
        """Whether somebody was there before the first of them, and none is his."""
        there = [one for one in actors if one.placed_s is not None and one.placed_s < self._since_s]
        return any(not one.is_broken and one.where not in self._places for one in there)
