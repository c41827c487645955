"""Which steps are visited, for any pair of lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.samplers.spacing import Spacing, spaced_timesteps


@given(data=st.data(), num_timesteps=st.integers(1, 1500), spacing=st.sampled_from(["leading", "linspace", "trailing"]))
def test_steps_ascend_strictly_within_the_chain(data: st.DataObject, num_timesteps: int, spacing: Spacing) -> None:
    num_steps = data.draw(st.integers(1, num_timesteps))
    steps = spaced_timesteps(num_timesteps, num_steps, spacing)
    assert len(steps) == num_steps and steps == sorted(set(steps))
    assert steps[0] >= 0 and steps[-1] < num_timesteps
    if spacing == "leading":
        assert steps[0] == 0
    else:
        assert steps[-1] == num_timesteps - 1
    if spacing == "linspace" and num_steps > 1:
        assert steps[0] == 0
    if num_steps == num_timesteps:
        assert steps == list(range(num_timesteps))


def test_known_answers() -> None:
    """Lin et al. 2024, Table 2, for ten of a thousand steps (theirs count from 1)."""
    assert spaced_timesteps(1000, 10, "leading") == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert spaced_timesteps(1000, 10, "linspace") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spaced_timesteps(1000, 10, "trailing") == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_number_of_steps(num_steps: int) -> None:
    with pytest.raises(ValueError, match=r"^num_steps: "):
        spaced_timesteps(1000, num_steps, "linspace")


def test_unknown_spacing() -> None:
    with pytest.raises(ValueError, match=r"^spacing: "):
        spaced_timesteps(1000, 10, "karras")  # type: ignore[arg-type]
