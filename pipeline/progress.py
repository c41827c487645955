"""What the terminal shows: plain lines, and progress with rate and time left.

On a terminal a progress is one line that updates itself (tqdm); in a log it is a plain line now and then. Nothing else
in the project writes to the terminal but the command line's help and errors. No line holds the password of a URI.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from pipeline.redact import redact

_LOG_INTERVAL_S = 15.0
_RATE_S = 60.0


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
    """Progress of a known number of units, with the rate of the last minute and the time that is left at that rate.

    A context manager.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        """Start at `done` of `total` units; the rate counts only what is made from here on."""
        self._title, self._total, self._unit = title, total, unit
        self._done, self._logged_s = done, time.monotonic()
        self._marks = deque([(self._logged_s, done)])  # when how much was done, a minute back
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=unit,
                bar_format="{desc}: {percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}",
                dynamic_ncols=True,
                leave=False,
            )
            if sys.stderr.isatty()
            else None
        )

    def advance(self, num_units: int, note: str = "") -> None:
        """Count finished units; `note` stands behind the rate (the loss, say)."""
        self._done += num_units
        now_s = time.monotonic()
        if num_units < 0:  # fallen back: a rate from here on
            self._marks.clear()
        self._marks.append((now_s, self._done))
        while len(self._marks) > 2 and self._marks[1][0] <= now_s - _RATE_S:
            self._marks.popleft()
        if self._bar is not None:
            self._bar.n = self._done
            self._bar.set_postfix_str(self._speed(note))
        elif self._done > self._marks[0][1] and num_units and now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            say(f"  {self._title}: {self._done}/{self._total} {self._unit}, {self._speed(note)}")

    def _speed(self, note: str) -> str:
        (since_s, before), (now_s, done) = self._marks[0], self._marks[-1]
        parts = [note] if note else []
        if done > before:
            rate = (done - before) / max(now_s - since_s, 1e-9)
            parts = [f"{rate:.1f}/s", f"{format_duration((self._total - done) / rate)} left", *parts]
        return ", ".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
