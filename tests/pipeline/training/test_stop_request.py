"""A driver is asked to end by SIGTERM or by the clock; a second SIGTERM is what it was before."""

import os
import signal
import threading

import pytest

from pipeline.training.stop_request import StopRequest, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4h", 14400), ("1h30m", 5400), ("1h 30min", 5400), ("90min", 5400), ("45s", 45), ("0.5h", 1800), ("2h1s", 7201)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "4 hours", "0s", "-1h", "4d", "1h x", "1..5h", "4hh"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="write 4h"):
        parse_duration(text)


def test_the_clock() -> None:
    assert StopRequest(None).reason is None
    assert StopRequest(3600).reason is None
    assert StopRequest(1e-9).reason == "--stop-after (0.0 s)"


def test_the_first_sigterm_is_a_request_and_the_second_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    try:
        handler, stop = signal.getsignal(signal.SIGTERM), StopRequest(None)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.reason, came) == ("SIGTERM", [])
            assert "a second one ends at once" in capsys.readouterr().out
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
        assert stop.reason == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_sigterm_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        stop = StopRequest(None)
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_beside_the_main_thread_only_the_clock_counts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def listen() -> None:
        with StopRequest(None).listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]
