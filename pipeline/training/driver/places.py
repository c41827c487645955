"""Room for workers in a Ray cluster: reserved one worker at a time, so that a count is what Ray really has.

A reservation is a placement group of one worker's resources. While it waits an autoscaler sees it as demand; it is
given only by a node that answers and is not being drained; nodes that have died without a word are left out
(pipeline/cluster_nodes.py).
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pipeline.cluster_nodes import avoiding, silent_nodes
from pipeline.progress import format_duration

_LOOK_INTERVAL_S = 0.2
_SETTLED_S = 3.0
_ASK_INTERVAL_S = 10.0
_FIRST_SAY_S = 5.0
_SAY_INTERVAL_S = 60.0


class Places:
    """Reservations for workers, given back at the end of the block.

    Args:
        resources: What one worker needs, by Ray's names.
        number: How many workers.
        avoided: Ids of nodes that are left out.
    """

    def __init__(self, resources: Mapping[str, float], number: int, avoided: list[str]) -> None:
        """Ask for all of them; nothing is waited for."""
        selector = avoiding(avoided)
        self._groups: list[PlacementGroup] = [
            placement_group([dict(resources)], bundle_label_selector=None if selector is None else [selector])
            for _ in range(number)
        ]

    def num_given(self) -> int:
        """How many are given at the moment."""
        return sum(placement_group_table(group)["state"] == "CREATED" for group in self._groups)

    def release(self) -> None:
        """Give all of them back; safe to repeat."""
        while self._groups:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self._groups.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def wait_for_places(
    resources: Mapping[str, float],
    at_least: int,
    at_most: int,
    *,
    report: Callable[[str], None],
    check: Callable[[], object] = lambda: None,
    say_interval_s: float = _SAY_INTERVAL_S,
) -> tuple[int, list[str]]:
    """Wait until a cluster has room for enough workers; a line soon, and one every minute, say what is waited for.

    Args:
        resources: What one worker needs, by Ray's names.
        at_least: Fewest workers to begin with.
        at_most: Most workers; where there is room for fewer, the number is taken once it stays the same for a moment.
        report: Takes the lines.
        check: Called between two looks; what it raises ends the waiting.
        say_interval_s: Seconds between two lines.

    Returns:
        How many workers there is room for, at most `at_most`; ids of nodes that do not answer.
    """
    started_s = changed_s = asked_s = time.monotonic()
    said_s = started_s - say_interval_s + min(_FIRST_SAY_S, say_interval_s)
    avoided, before = silent_nodes(), -1
    places = Places(resources, at_most, avoided)
    try:
        while True:
            check()
            number, now_s = places.num_given(), time.monotonic()
            if number != before:
                before, changed_s = number, now_s
            if number >= at_most or (number >= at_least and now_s - changed_s >= _SETTLED_S):
                return number, avoided
            if now_s - said_s >= say_interval_s:
                said_s = now_s
                report(_waiting(resources, at_least, number, avoided, now_s - started_s))
            if now_s - asked_s >= _ASK_INTERVAL_S:
                asked_s = now_s
                if (silent := silent_nodes()) != avoided:
                    avoided, before = silent, -1
                    places.release()
                    places = Places(resources, at_most, avoided)
            time.sleep(_LOOK_INTERVAL_S)
    finally:
        places.release()


def _waiting(resources: Mapping[str, float], at_least: int, number: int, avoided: list[str], waited_s: float) -> str:
    needs = " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
    silent = f"; no answer from {len(avoided)} of its nodes" if avoided else ""
    return (
        f"waiting for {at_least} workers with {needs} each: Ray has room for {number}{silent}; "
        f"{format_duration(waited_s)} so far"
    )
