"""Which output shard is made next, and what becomes of one that fails. Pure: no Ray, no clock.

New shards are drawn lazily: what is kept are those in hand, those that have failed, of which only so many may wait, and
those put off while nothing works, so that a plan of ten million shards needs little more than one of ten.
"""

import statistics
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import PipelineError
from pipeline.generation.spec.sampling_plan import OutputShard

FailureKind = Literal["shard", "device", "outage"]
"""shard: tried again elsewhere, then set aside; device: that device gets no more; outage: nobody's fault."""

_REMEMBERED_DURATIONS = 101
_MOST_RETRIED = 50
"""Failed shards that wait: then nobody gets a new one, so that a sick machine does not fail them all once."""
_LEAPS = (0, 0, 1, 4, 16, 64, 256, 1024)
"""By failures in a row: so many shards are put off after the second, the third, ...; the last after all that follow."""


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
    kept_free: str | None = None
    """The place whose actor gets no second shard, so that it has its hands free for this one soon."""

    def may_be_tried(self, place: str, places: Collection[str]) -> bool:
        """Whether it has not failed in a place, or has in all of them."""
        return place not in self.places or set(places) <= set(self.places)


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
        self.failed_in_a_row: set[int] = set()
        """Shards that have failed since one was last made, or may have ended an actor."""
        self.set_aside: list[Retried] = []

    @property
    def is_open(self) -> bool:
        """Whether a shard waits or is being made."""
        return self.has_waiting or self._num_in_hand > 0

    @property
    def has_waiting(self) -> bool:
        """Whether a shard waits for somebody to make it."""
        return bool(self._next or self._given_back or self._retried)

    def take(
        self, place: str, places: Collection[str], *, in_hand: Collection[OutputShard] = (), has_made: bool = True
    ) -> OutputShard | None:
        """The next shard for somebody, to be answered by `made`, `give_back` or `fail`.

        A shard that has failed, or may have ended somebody, is made by somebody who has no other in hand, so that no
        other is blamed; soon, by whoever gets no second shard for it; and rather not by somebody who has made none yet,
        whose first shard has a long limit.

        Args:
            place: Where they work. What has failed there is left to others while there are others.
            places: Where anybody works.
            in_hand: What they have already.
            has_made: Whether they have made one.

        Returns:
            A shard; None if none waits that should be made there.
        """
        if in_hand and (self._suspects & {shard.index for shard in in_hand} or self._is_kept_free(place, places)):
            return None
        shard = self._failed_one(place, places) if has_made and not in_hand else None
        if shard is None and len(self._retried) < _MOST_RETRIED:
            shard = self._fresh_one()
        if shard is None and not in_hand:
            shard = self._failed_one(place, places)
        self._num_in_hand += shard is not None
        return shard

    def _is_kept_free(self, place: str, places: Collection[str]) -> bool:
        for retried in self._retried:
            is_another_s = retried.kept_free != place and retried.kept_free in places
            if not is_another_s and retried.may_be_tried(place, places):
                retried.kept_free = place
                return True
        return False

    def _failed_one(self, place: str, places: Collection[str]) -> OutputShard | None:
        for number, retried in enumerate(self._retried):
            if retried.may_be_tried(place, places):
                retried.kept_free = None
                return self._retried.pop(number).shard
        return None

    def _fresh_one(self) -> OutputShard | None:
        """One that has not failed; after failures in a row from as far on as there are any."""
        leaps = len(self.failed_in_a_row) > 1
        if self._given_back and not (leaps and self._next):
            return self._given_back.pop() if leaps else self._given_back.popleft()
        shard = self._next
        self._next = next(self._new, None)
        return shard

    def _note_failure(self, shard: OutputShard) -> None:
        """Of shards that fail in a row, each puts off more of those that follow: bad ones may lie side by side."""
        self._suspects.add(shard.index)
        if shard.index in self.failed_in_a_row:
            return
        self.failed_in_a_row.add(shard.index)
        for _ in range(_LEAPS[min(len(self.failed_in_a_row), len(_LEAPS) - 1)]):
            if self._next is not None:
                self._given_back.append(self._next)
                self._next = next(self._new, None)

    def made(self, shard: OutputShard) -> None:
        """A shard has been committed."""
        self._num_in_hand -= 1
        self.failed_in_a_row.clear()
        self._failures.pop(shard.index, None)
        self._suspects.discard(shard.index)

    def give_back(self, shard: OutputShard, *, is_suspect: bool = False) -> None:
        """A shard was not made, and nothing is held against it.

        Args:
            shard: The shard.
            is_suspect: Whether it is one of several that may have ended an actor.
        """
        self._num_in_hand -= 1
        if is_suspect:
            self._note_failure(shard)
        if shard.index in self._suspects:
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
        self._note_failure(shard)
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
            first_s: The first of a process, with compiling, not before so many, while nobody has made a first one.
            factor: Times the median of the last hundred.
        """
        self._floor_s, self._first_s, self._factor = floor_s, first_s, factor
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)
        self._firsts_s: deque[float] = deque(maxlen=_REMEMBERED_DURATIONS)

    def add(self, duration_s: float, *, is_first: bool) -> None:
        """A shard has taken so long; the first of a process is a measure for first ones alone."""
        (self._firsts_s if is_first else self._durations_s).append(duration_s)

    def limit_s(self, *, is_first: bool) -> float:
        """How long one may take.

        Args:
            is_first: Whether its process has made none yet.
        """
        usual_s = max(self._floor_s, self._times_median(self._durations_s))
        if not is_first:
            return usual_s
        first_s = min(self._first_s, self._times_median(self._firsts_s)) if self._firsts_s else self._first_s
        return max(first_s, usual_s)

    def _times_median(self, durations_s: Sequence[float]) -> float:
        return self._factor * statistics.median(durations_s) if durations_s else 0.0
