"""How long a server that is away is waited for: minutes, for each request on its own.

$DDPM_PATIENCE_MINUTES says how many; it is no part of a run's configuration, because it changes nothing that a run
computes, and it is needed where there is no configuration, in every process that touches a store.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tenacity

from pipeline.errors import ConfigError
from pipeline.progress import say

PATIENCE_VARIABLE = "DDPM_PATIENCE_MINUTES"
_DEFAULT_MINUTES = 10.0
_SAY_INTERVAL_S = 60.0
_SILENT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.4, 20.0

_num_waits = 0
_said_lock = threading.Lock()
_said_at_s: dict[str, float] = {}


def patience_s() -> float:
    """Seconds for which one request is tried again while its server is away.

    Raises:
        ConfigError: If the variable is no number of minutes.
    """
    text = os.environ.get(PATIENCE_VARIABLE, str(_DEFAULT_MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise ConfigError(f"{PATIENCE_VARIABLE}: a number of minutes, at least 0, got {text!r}; 10 is the default")
    return 60 * minutes


def patiently(
    passes: Callable[[BaseException], bool],
    where: str,
    *,
    describe: Callable[[BaseException], str] = str,
    at_most_s: float | None = None,
    ended: threading.Event | None = None,
) -> tenacity.Retrying:
    """Retries of one request while its server is away, with growing and random pauses.

    The last attempt starts when the patience ends; how long it may take is the client's time-out.

    Args:
        passes: Whether an error is an outage; all others are raised at once.
        where: What lines call the server; of many threads that wait some seconds for one server, one says so, once a
            minute.
        describe: An error in one line.
        at_most_s: Less patience than $DDPM_PATIENCE_MINUTES, for whoever has somebody waiting.
        ended: Set when nobody needs the request any more; pauses end then, and no attempt follows.

    Returns:
        A callable that takes the request and its arguments; it raises the request's own last error.

    Raises:
        ConfigError: As patience_s.
    """
    whole_s = patience_s() if at_most_s is None else min(patience_s(), at_most_s)

    ended = ended or threading.Event()
    drawn_s = tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)

    def pause_s(state: tenacity.RetryCallState) -> float:
        return min(drawn_s(state), max(0.0, whole_s - (state.seconds_since_start or 0.0)))

    def say_that_it_waits(state: tenacity.RetryCallState) -> None:
        global _num_waits
        _num_waits += 1
        error = state.outcome.exception() if state.outcome else None
        assert error is not None, "only a failure is tried again"
        if (state.seconds_since_start or 0.0) + state.upcoming_sleep >= _SILENT_S and _is_to_be_said(where):
            say(f"{where} gives no answer ({describe(error)}); tried again for up to {whole_s / 60:.3g} minutes")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(passes),
        stop=tenacity.stop_any(tenacity.stop_after_delay(whole_s), tenacity.stop_when_event_set(ended)),
        wait=pause_s,
        sleep=tenacity.sleep_using_event(ended),
        before_sleep=say_that_it_waits,
        reraise=True,
    )


def num_waits() -> int:
    """Pauses of this process so far: while it grows, somebody waits for a server and does not hang."""
    return _num_waits


@contextmanager
def said_if_slow(line: str, say_it: Callable[[str], object], *, after_s: float) -> Iterator[None]:
    """Has a line said if the block is not done after so many seconds."""
    timer = threading.Timer(after_s, say_it, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_to_be_said(where: str) -> bool:
    """Whether nobody has said so within the last minute."""
    with _said_lock:
        now_s, before_s = time.monotonic(), _said_at_s.get(where)
        if before_s is not None and now_s - before_s < _SAY_INTERVAL_S:
            return False
        _said_at_s[where] = now_s
        return True
