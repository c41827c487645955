"""How long a request is tried again, and what ends that early."""

import threading
import time

import pytest

from pipeline.errors import ConfigError
from pipeline.stores.patience import PATIENCE_VARIABLE, patience_s, patiently


class Away:
    """A server that is away until a moment."""

    def __init__(self, until_s: float) -> None:
        self.back_s = time.monotonic() + until_s
        self.num_asked = 0

    def ask(self) -> str:
        self.num_asked += 1
        if time.monotonic() < self.back_s:
            raise ConnectionRefusedError("away")
        return "here"


def always(_: BaseException) -> bool:
    return True


def test_the_last_attempt_is_at_the_end_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pauses have become: a server that is back just before is found."""
    monkeypatch.setattr("pipeline.stores.patience._FIRST_PAUSE_S", 100.0)
    monkeypatch.setattr("pipeline.stores.patience._LONGEST_PAUSE_S", 100.0)
    server = Away(0.7)
    assert patiently(always, "server", at_most_s=0.8)(server.ask) == "here"
    server, started_s = Away(3600.0), time.monotonic()
    with pytest.raises(ConnectionRefusedError, match="away"):
        patiently(always, "server", at_most_s=0.8)(server.ask)
    assert 0.8 <= time.monotonic() - started_s < 100 and server.num_asked >= 2


def test_what_nobody_needs_any_more_is_not_asked_again() -> None:
    server, ended = Away(3600.0), threading.Event()
    started_s = time.monotonic()
    threading.Timer(0.5, ended.set).start()
    with pytest.raises(ConnectionRefusedError):
        patiently(always, "server", ended=ended)(server.ask)
    assert 0.5 <= time.monotonic() - started_s < 100


def test_what_is_no_outage_is_asked_once() -> None:
    server = Away(3600.0)
    with pytest.raises(ConnectionRefusedError):
        patiently(lambda error: False, "server")(server.ask)
    assert server.num_asked == 1


def test_short_outages_are_not_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.patience._SILENT_S", 60.0)  # for whom the machine keeps waiting
    assert patiently(always, "server of a short outage")(Away(0.3).ask) == "here"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("text", "seconds"), [("10", 600.0), ("0.5", 30.0), ("0", 0.0)])
def test_minutes(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, text)
    assert patience_s() == seconds


@pytest.mark.parametrize("text", ["", "ten", "-1", "inf", "nan"])
def test_no_number_of_minutes(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, text)
    with pytest.raises(ConfigError, match=PATIENCE_VARIABLE):
        patience_s()
