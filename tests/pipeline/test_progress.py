"""Durations, sizes and progress as people read them."""

import pytest

from pipeline.progress import Progress, format_bytes, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.44, "8.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (11_220, "3 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (48.2 * 1024**2, "48.2 MiB"),
        (5 * 1024**4, "5.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [100.0]
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_with_the_rate_of_what_was_made_here(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("sampling", 110, "images", done=10) as progress:
        progress.advance(5)
        clock[0] += 20.0
        progress.advance(35, "loss 0.1")
        clock[0] += 1.0
        progress.advance(1)  # too soon for another line
        clock[0] += 20.0
        progress.advance(0)  # nothing new to say
        progress.advance(-31)  # fell back: the rate starts anew
        clock[0] += 20.0
        progress.advance(10)
    assert capsys.readouterr().out.splitlines() == [
        "  sampling: 50/110 images, 2.0/s, 30.0 s left, loss 0.1",
        "  sampling: 30/110 images, 0.5/s, 2 min 40 s left",
    ]


def test_the_rate_is_that_of_the_last_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """A slow hour behind it says nothing of what is left."""
    with Progress("training", 10_000, "steps") as progress:
        for _ in range(60):
            clock[0] += 60.0
            progress.advance(6)
        for _ in range(7):
            clock[0] += 10.0
            progress.advance(100)
    assert capsys.readouterr().out.splitlines()[-1] == "  training: 960/10000 steps, 10.0/s, 15 min 04 s left"


def test_a_terminal_shows_one_line_that_says_the_same(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("training", 400, "steps", done=100) as progress:
        clock[0] += 20.0
        progress.advance(40, "loss 0.3000, 256 img/s")
    shown = capsys.readouterr().err
    assert "training: 35%" in shown and "140/400 steps, 2.0/s, 2 min 10 s left, loss 0.3000, 256 img/s" in shown
