"""Ticks: one form for one moment, and seeds that do not change from one version of this program to the next."""

import pytest

from pipeline.generation.spec.ticks import normal_tick, tick_seed


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T03:00Z",
        "2026-11-22T03:00:00Z",
        "2026-11-22T03:00:00.000+00:00",
        "2026-11-22T04:00+01:00",
        "2026-11-21T22:30-0430",
    ],
)
def test_one_moment_has_one_form(text: str) -> None:
    assert normal_tick(text) == "2026-11-22T03:00Z"


def test_names_sort_as_their_times_do() -> None:
    assert normal_tick("0999-01-01T00:00Z") == "0999-01-01T00:00Z" < normal_tick("1000-01-01T00:00Z")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2026-11-22T03:00", "must name its zone"),
        ("2026-11-22T03:00:07Z", "must be a whole minute"),
        ("2026-11-22T03:00:00.5Z", "must be a whole minute"),
        ("2026-02-30T03:00Z", "no moment of the calendar"),
        ("2026-11-22T24:00Z", "no moment of the calendar"),
        ("0001-01-01T00:00+14:00", "no moment of the calendar"),
        ("2026-11-22T03:00+99:00", "no moment of the calendar"),
        ("2026-11-22", "must be a time with its zone"),
        ("2026-11-22 03:00Z", "must be a time with its zone"),
        ("2026-11-22T03:00Z\n", "must be a time with its zone"),
        ("../../2026", "must be a time with its zone"),
        ("٢٠٢٦-11-22T03:00Z", "must be a time with its zone"),
        ("now", "must be a time with its zone"),
        ("", "must be a time with its zone"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^tick: .*{reason}") as caught:
        normal_tick(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_seeds_are_golden() -> None:
    """sha256sum of "ddpm tick 0 2026-11-22T03:00Z" begins with these digits; images of past ticks depend on them."""
    assert f"{tick_seed(0, '2026-11-22T03:00Z'):016x}" == "669a8fd6adb77978"
    assert len({tick_seed(seed, f"2026-11-22T0{hour}:00Z") for seed in range(9) for hour in range(9)}) == 81
