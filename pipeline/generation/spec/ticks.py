"""Ticks: the moments for which a scheduler asks for images. Pure: no storage, no clock.

A tick is a name in the form of a time, `2026-11-22T03:00Z`: UTC, to the minute. It is the time that a run is scheduled
for, never that of an attempt, so that every attempt names the same tick. Names sort as their times do.
"""

import hashlib
import re
from datetime import UTC, datetime

_FORM = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?", re.ASCII)
_EXAMPLE = "2026-11-22T03:00Z"


def normal_tick(text: str) -> str:
    """A tick in the form in which it is stored, compared and shown.

    Args:
        text: ISO 8601 with a zone: 2026-11-22T03:00Z, or 2026-11-22T04:00:00+01:00 for the same tick.

    Returns:
        The same moment as 2026-11-22T03:00Z.

    Raises:
        ValueError: If it is no such time, names no zone, or does not stand on a whole minute: the time of an attempt
            would be another tick in each of them.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"tick: must be a time with its zone, got {text!r}; write it as {_EXAMPLE}")
    if match[3] is None:
        raise ValueError(f"tick: must name its zone, got {text!r}; add Z for UTC, or an offset such as +01:00")
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"tick: is no moment of the calendar ({error}), got {text!r}; write it as {_EXAMPLE}"
        ) from None
    if moment.second or moment.microsecond:
        raise ValueError(
            f"tick: must be a whole minute, got {text!r}; name the time that the run is scheduled for, not the present "
            "one, which the next attempt would not name again"
        )
    return f"{moment:%Y-%m-%dT%H:%M}Z".rjust(len(_EXAMPLE), "0")  # not every C library pads years below 1000


def tick_seed(seed: int, tick: str) -> int:
    """The seed of one tick's noise: the first 8 bytes, big-endian, of the sha256 of "ddpm tick <seed> <tick>".

    Args:
        seed: That of the whole series, in [0, 2^64), as decimal digits in the hashed text.
        tick: As `normal_tick` gives it.

    Returns:
        A seed in [0, 2^64): the same for each attempt, unrelated for each tick and series.
    """
    return int.from_bytes(hashlib.sha256(f"ddpm tick {seed} {tick}".encode()).digest()[:8], "big")
