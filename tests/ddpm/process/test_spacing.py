"""Which steps are visited, for any pair of lengths, and the places between them."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import NoiseSchedule, ScheduleConfig, Spacing, make_schedule, spaced_timesteps
from ddpm.process.spacing import continuous_timesteps

LINEAR, COSINE = (make_schedule(ScheduleConfig(name=name)) for name in ("linear", "cosine"))
NO_SIGNAL = make_schedule(ScheduleConfig(zero_terminal_snr=True))
ENDS: dict[Spacing, tuple[bool, bool]] = {
    "leading": (True, False),
    "linspace": (True, True),
    "trailing": (False, True),
    "quadratic": (True, True),
    "log_snr": (True, True),
    "karras": (True, False),
}


def schedule_of(num_timesteps: int, *, zero: bool) -> NoiseSchedule:
    """Any length, down to one step."""
    time = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / (num_timesteps + (0 if zero else 1))
    alpha_bar = (time * (math.pi / 2)).cos().square()
    if zero:
        alpha_bar[-1] = 0
    return NoiseSchedule.from_alpha_bar(alpha_bar)


@pytest.mark.parametrize("spacing", ENDS)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero terminal SNR"])
@pytest.mark.parametrize("shift", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_spacing_of_every_schedule_has_the_ends_that_it_promises(
    name: Literal["linear", "cosine"], shift: float, zero: bool, spacing: Spacing
) -> None:
    """With every number of steps of a short chain, and few, many and all of a long one; places between steps too."""
    for num_timesteps, counts in ((24, range(1, 25)), (1000, (1, 2, 3, 10, 250, 999, 1000))):
        schedule = make_schedule(
            ScheduleConfig(name=name, num_timesteps=num_timesteps, shift=shift, zero_terminal_snr=zero)
        )
        whole = list(range(num_timesteps))
        quiet = spacing == "karras" and float(schedule.sigma(torch.tensor([num_timesteps - 1]))) > 80
        for num_steps in counts:
            steps = spaced_timesteps(schedule, num_steps, spacing)
            assert len(steps) == num_steps and steps == sorted(set(steps)) and set(steps) <= set(whole)
            first, last = ENDS[spacing]
            if (first and num_steps > 1) or spacing == "leading":
                assert steps[0] == 0, (num_timesteps, num_steps)
            if last or (spacing == "karras" and not quiet):
                assert steps[-1] == num_timesteps - 1, (num_timesteps, num_steps)
            if spacing not in ("leading", "trailing"):
                places = continuous_timesteps(schedule, num_steps, spacing)
                assert len(places) == num_steps and places == sorted(set(places))
                assert num_steps == 1 or places[0] == 0
                assert quiet or places[-1] == num_timesteps - 1


@given(
    data=st.data(),
    num_timesteps=st.integers(1, 1500),
    spacing=st.sampled_from(sorted(ENDS)),
    zero=st.booleans(),
)
def test_steps_ascend_strictly_within_the_chain(
    data: st.DataObject, num_timesteps: int, spacing: Spacing, zero: bool
) -> None:
    num_steps = data.draw(st.integers(1, num_timesteps))
    schedule = schedule_of(num_timesteps, zero=zero)
    steps = spaced_timesteps(schedule, num_steps, spacing)
    assert len(steps) == num_steps and steps == sorted(set(steps))
    assert steps[0] >= 0 and steps[-1] < num_timesteps
    first, last = ENDS[spacing]
    if first and (num_steps > 1 or spacing == "leading"):
        assert steps[0] == 0
    if last:
        assert steps[-1] == num_timesteps - 1
    if num_steps == num_timesteps:
        assert steps == list(range(num_timesteps))
    if spacing not in ("log_snr", "karras"):
        assert spaced_timesteps(num_timesteps, num_steps, spacing) == steps


def test_known_answers() -> None:
    """Lin et al. 2023, Table 2, for ten of a thousand steps (theirs count from 1); the squares of 0, 1/9, ... 1."""
    assert spaced_timesteps(1000, 10, "leading") == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert spaced_timesteps(1000, 10, "linspace") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spaced_timesteps(1000, 10, "trailing") == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert spaced_timesteps(1000, 10, "quadratic") == [0, 12, 49, 111, 197, 308, 444, 604, 789, 999]


def test_log_snr_and_karras_are_equally_spaced_in_their_variable() -> None:
    """Exactly between the steps; on the steps to half of the gap that the chain has there."""
    for schedule, num_steps in ((LINEAR, 20), (COSINE, 12)):
        t = torch.tensor(continuous_timesteps(schedule, num_steps, "log_snr"), dtype=torch.float64)
        gaps = schedule.log_snr(t).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)
        assert t[0] == 0 and t[-1] == 999
        t = torch.tensor(continuous_timesteps(schedule, num_steps, "karras"), dtype=torch.float64)
        gaps = (schedule.sigma(t) ** (1 / 7)).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)
        assert t[0] == 0 and float(schedule.sigma(t[-1:])) == pytest.approx(80, rel=1e-6)
    low_noise = make_schedule(ScheduleConfig(shift=0.1))  # sigma ends at 15.7: there is nothing to leave out
    assert continuous_timesteps(low_noise, 5, "karras")[-1] == spaced_timesteps(low_noise, 5, "karras")[-1] == 999
    rounded = torch.tensor(spaced_timesteps(LINEAR, 20, "log_snr"))
    places = torch.tensor(continuous_timesteps(LINEAR, 20, "log_snr"))
    assert float((rounded - places)[5:].abs().max()) <= 0.5


def test_places_that_round_to_one_step_are_moved_apart() -> None:
    """Half of the log-SNR of the cosine schedule is within its last few steps."""
    steps, places = spaced_timesteps(COSINE, 40, "log_snr"), continuous_timesteps(COSINE, 40, "log_snr")
    assert len({round(place) for place in places}) < 35
    assert steps[-12:] == list(range(988, 1000))
    assert steps[:20] == [round(place) for place in places[:20]]


def test_without_a_terminal_signal_the_last_step_is_added() -> None:
    t = continuous_timesteps(NO_SIGNAL, 11, "log_snr")
    assert t[-2:] == [998, 999] and t[0] == 0
    gaps = NO_SIGNAL.log_snr(torch.tensor(t[:-1], dtype=torch.float64)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)
    assert continuous_timesteps(NO_SIGNAL, 1, "log_snr") == [999]
    assert continuous_timesteps(NO_SIGNAL, 2, "log_snr") == spaced_timesteps(NO_SIGNAL, 2, "log_snr") == [0, 999]
    assert spaced_timesteps(NO_SIGNAL, 3, "log_snr") == [0, 998, 999]
    assert spaced_timesteps(NO_SIGNAL, 1, "log_snr") == [999]
    assert NO_SIGNAL.sigma(torch.tensor(continuous_timesteps(NO_SIGNAL, 5, "karras")[-1:])) == pytest.approx(80)


def test_continuous_places() -> None:
    assert continuous_timesteps(LINEAR, 4, "linspace") == pytest.approx([0, 333, 666, 999])
    assert continuous_timesteps(LINEAR, 4, "quadratic") == pytest.approx([0, 111, 444, 999])
    assert continuous_timesteps(LINEAR, 1, "linspace") == [999]
    many = continuous_timesteps(LINEAR, 4000, "log_snr")  # more places than there are steps
    assert len(set(many)) == 4000 and many == sorted(many)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_number_of_steps(num_steps: int) -> None:
    with pytest.raises(ValueError, match=r"^num_steps: "):
        spaced_timesteps(1000, num_steps, "linspace")


def test_other_impossible_input() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: "):
        continuous_timesteps(LINEAR, 0, "linspace")
    with pytest.raises(ValueError, match=r"^spacing: .*quadratic, log_snr, karras, got 'exponential'"):
        spaced_timesteps(1000, 10, "exponential")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^spacing: must be one of linspace, quadratic, log_snr, karras, got 'leading'"
    ):
        continuous_timesteps(LINEAR, 10, "leading")
    for spacing in ("log_snr", "karras"):
        with pytest.raises(ValueError, match=rf"^schedule: {spacing} needs the noise schedule"):
            spaced_timesteps(1000, 10, spacing)  # type: ignore[arg-type]
