"""That a driver is asked to end: by SIGTERM, as `ray job stop` and Kubernetes send it, or because its time is over."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipeline.progress import format_duration, say

_UNITS_S = {"h": 3600, "min": 60, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `4h`, `1h30m`, `90min` or `45s`.

    Raises:
        ValueError: If it is none, or 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", text)
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != "".join(text.split()) or not seconds > 0:
        raise ValueError(f"must be a duration above 0, got {text!r}; write 4h, 1h30m or 45s")
    return seconds


class StopRequest:
    """Whether the driver is to end after a checkpoint, and why.

    Args:
        after_s: Seconds from now after which it is; None: never.
    """

    def __init__(self, after_s: float | None) -> None:
        """Begin to count."""
        self._after_s, self._started_s = after_s, time.monotonic()
        self._signalled = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why it is to end; None: it is not."""
        if self._signalled.is_set():
            return "SIGTERM"
        if self._after_s is not None and time.monotonic() - self._started_s >= self._after_s:
            return f"--stop-after ({format_duration(self._after_s)})"
        return None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM for a request while the block runs; a second one does what it did before the block."""
        before = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
            yield
            return

        def request(signum: int, frame: Any) -> None:
            self._signalled.set()
            signal.signal(signal.SIGTERM, before)
            say("SIGTERM: ending after a checkpoint; a second one ends at once")

        signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
