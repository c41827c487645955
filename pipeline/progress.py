"""What the terminal shows: plain lines, and progress with rate and time left.

On a terminal a progress is one line that updates itself (tqdm); in a log it is a plain line now and then. Nothing else
in the project writes to the terminal but the command line's help and errors. No line holds the password of a URI.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from pipeline.redact import redact

_LOG_INTERVAL_S = 15.0


_send: Callable[[str], object] | None = None


def say(line: str) -> None:
    """Print one line, flushed at once, so that lines of several processes keep their order."""
    if _send is not None:
        _send(redact(line))
        return
    tqdm.write(redact(line), file=sys.stdout)
    sys.stdout.flush()


def send_lines_to(send: Callable[[str], object]) -> None:
    """Send this process's lines to somebody who can show them: nobody sees what a worker prints."""
    global _send
    _send = send


def format_duration(seconds: float) -> str:
    """A duration as people say it: `8.4 s`, `2 min 05 s`, `3 h 07 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(num_bytes: float) -> str:
    """A size in binary units with one decimal: `48.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(abs(num_bytes), 1) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


class Progress:
    """Progress of a known number of units, with rate and time left; use it as a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        """Start at `done` of `total` units; the rate counts only what is made from here on."""
        self._title, self._total, self._unit = title, total, unit
        self._done = self._first = done
        self._started_s = self._logged_s = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, unit=f" {unit}", dynamic_ncols=True, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def advance(self, num_units: int, note: str = "") -> None:
        """Count finished units; `note` stands behind the rate (the loss, say)."""
        self._done += num_units
        if num_units < 0:  # fallen back: a rate from here on
            self._first, self._started_s = self._done, time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(num_units)
        elif self._done > self._first and num_units and time.monotonic() - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            say(self._line(note))

    def _line(self, note: str) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._started_s, 1e-9)
        left = format_duration((self._total - self._done) / rate)
        tail = f", {note}" if note else ""
        return f"  {self._title}: {self._done}/{self._total} {self._unit}, {rate:.1f}/s, {left} left{tail}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
