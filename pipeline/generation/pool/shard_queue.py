"""Which output shard is made next, and what becomes of one that fails. Pure: no Ray, no clock.

New shards are drawn lazily: what is kept are those in hand and those that have failed, so that a plan of ten million
shards needs no more than one of ten.
"""

import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import PipelineError
from pipeline.generation.spec.sampling_plan import OutputShard

FailureKind = Literal["shard", "device", "outage"]
"""shard: tried again elsewhere, then set aside; device: that device gets no more; outage: nobody's fault."""

_REMEMBERED_DURATIONS = 101


@dataclass(kw_only=True, slots=True)
class Retried:
    """A shard that has failed, and where."""

    shard: OutputShard
    """The shard."""
    places: list[str] = field(default_factory=list)
    """Nodes and devices where it failed, one for each failure."""
    num_device_failures: int = 0
    """How many of them broke the device."""
    error: PipelineError | None = None
    """The latest failure; None: it was only near one."""


class ShardQueue:
    """The shards of a run that are still to be made."""

    def __init__(self, shards: Iterable[OutputShard], max_retries: int) -> None:
        """Take the shards as they are asked for.

        Args:
            shards: In the order in which they are to be made.
            max_retries: How often a shard is tried again before it is set aside.
        """
        self._new = iter(shards)
        self._next = next(self._new, None)
        self._given_back: deque[OutputShard] = deque()
        self._retried: list[Retried] = []
        self._failures: dict[int, Retried] = {}
        self._suspects: set[int] = set()
        self._num_in_hand = 0
        self._max_retries = max_retries
        self.set_aside: list[Retried] = []

    @property
    def is_open(self) -> bool:
        """Whether a shard waits or is being made."""
        return self.has_waiting or self._num_in_hand > 0

    @property
    def has_waiting(self) -> bool:
        """Whether a shard waits for somebody to make it."""
        return bool(self._next or self._given_back or self._retried)

    def is_suspect(self, shard: OutputShard) -> bool:
        """Whether a shard may have ended an actor, or has failed: it is tried alone, so that no other is blamed."""
        return shard.index in self._suspects

    def take(self, place: str, places: Collection[str], *, is_alone: bool) -> OutputShard | None:
        """The next shard for somebody, to be answered by `made`, `give_back` or `fail`.

        Args:
            place: Where they work. What has failed there is left to others while there are others.
            places: Where anybody works.
            is_alone: Whether they have no other in hand.

        Returns:
            A shard; None if none waits that should be made there.
        """
        shard = self._suspect_for(place, places) if is_alone else None
        if shard is None and self._given_back:
            shard = self._given_back.popleft()
        if shard is None and self._next is not None:
            shard, self._next = self._next, next(self._new, None)
        self._num_in_hand += shard is not None
        return shard

    def _suspect_for(self, place: str, places: Collection[str]) -> OutputShard | None:
        for number, retried in enumerate(self._retried):
            if place not in retried.places or set(places) <= set(retried.places):
                return self._retried.pop(number).shard
        return None

    def made(self, shard: OutputShard) -> None:
        """A shard has been committed."""
        self._num_in_hand -= 1
        self._failures.pop(shard.index, None)
        self._suspects.discard(shard.index)

    def give_back(self, shard: OutputShard, *, is_suspect: bool = False) -> None:
        """A shard was not made, and nothing is held against it.

        Args:
            shard: The shard.
            is_suspect: Whether it is one of several that may have ended an actor.
        """
        self._num_in_hand -= 1
        if is_suspect or shard.index in self._suspects:
            self._suspects.add(shard.index)
            self._retried.append(self._failures.setdefault(shard.index, Retried(shard=shard)))
        else:
            self._given_back.append(shard)

    def fail(self, shard: OutputShard, kind: FailureKind, place: str, error: PipelineError) -> bool:
        """A shard has failed: it waits to be tried elsewhere, or is set aside.

        Two devices that broke over one shard are that shard's doing.

        Returns:
            Whether it was set aside.
        """
        self._num_in_hand -= 1
        self._suspects.add(shard.index)
        retried = self._failures.setdefault(shard.index, Retried(shard=shard))
        retried.places.append(place)
        retried.num_device_failures += kind == "device"
        retried.error = error
        if len(retried.places) > self._max_retries or retried.num_device_failures > 1:
            self.set_aside.append(self._failures.pop(shard.index))
            self._suspects.discard(shard.index)
            return True
        self._retried.append(retried)
        return False


class ShardLimits:
    """How long a shard may take: a floor, or a multiple of what shards have taken lately, whichever is longer."""

    def __init__(self, *, floor_s: float, first_s: float, factor: float = 10.0) -> None:
        """Take the limits.

        Args:
            floor_s: No shard is given up before so many seconds.
            first_s: The first of a process, with loading and compiling, not before so many.
            factor: Times the median of the last hundred.
        """
        self._floor_s, self._first_s, self._factor = floor_s, first_s, factor
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)

    def add(self, duration_s: float, *, is_first: bool) -> None:
        """A shard has taken so long; the first of a process is no measure for others."""
        if not is_first:
            self._durations_s.append(duration_s)

    def limit_s(self, *, is_first: bool) -> float:
        """How long one may take.

        Args:
            is_first: Whether its process has made none yet.
        """
        usual_s = self._factor * statistics.median(self._durations_s) if self._durations_s else 0.0
        return max(self._first_s if is_first else self._floor_s, usual_s)
