"""eps, x_0 and v: each follows from another, at every t, as precisely as x_t allows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import PredictionType, ScheduleConfig, make_schedule, predict_x_0_and_eps, prediction_target, q_sample
from ddpm.process.prediction import (
    check_prediction_type,
    predict_eps_from_v,
    predict_eps_from_x_0,
    predict_v,
    predict_x_0_from_eps,
    predict_x_0_from_v,
)

COSINE = make_schedule(ScheduleConfig(name="cosine"))
NO_SIGNAL = make_schedule(ScheduleConfig(name="linear", zero_terminal_snr=True))
SCHEDULES = {"cosine": COSINE, "no signal": NO_SIGNAL}
NAMES = st.sampled_from(sorted(SCHEDULES))
STEPS = st.one_of(st.sampled_from([0, 1, 998, 999]), st.integers(0, 999))
TYPES: list[PredictionType] = ["eps", "x_0", "v"]
ROUNDING = 2e-14  # roundings of the numbers below 6 that make up x_t, and of coefficients near 0.01


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(name=NAMES, seed=st.integers(0, 2**31), t=STEPS)
def test_every_conversion_undoes_q_sample(name: str, seed: int, t: int) -> None:
    """v loses nothing at any t, alpha_bar of 0 included; x_0 from eps and eps from x_0 lose what must be lost."""
    schedule, step = SCHEDULES[name], torch.tensor([t])
    x_0, eps = draw(seed, 1, 3, 4, 4)
    x_t, v = q_sample(schedule, x_0, step, eps), predict_v(schedule, x_0, step, eps)
    signal, noise = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
    torch.testing.assert_close(predict_x_0_from_v(schedule, x_t, step, v), x_0, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(predict_eps_from_v(schedule, x_t, step, v), eps, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(predict_eps_from_x_0(schedule, x_t, step, x_0), eps, rtol=1e-11, atol=ROUNDING / noise)
    if signal > 0:
        got = predict_x_0_from_eps(schedule, x_t, step, eps)
        torch.testing.assert_close(got, x_0, rtol=1e-11, atol=ROUNDING / signal)


@given(name=NAMES, seed=st.integers(0, 2**31), t=STEPS)
@pytest.mark.parametrize("kind", TYPES)
def test_pair_belongs_to_x_t_and_the_answer_is_kept(kind: PredictionType, name: str, seed: int, t: int) -> None:
    schedule, step = SCHEDULES[name], torch.tensor([t])
    x_t, output = draw(seed, 1, 2, 3, 3)
    if kind == "eps" and schedule.alpha_bar[t] == 0:
        return
    x_0_hat, eps_hat = predict_x_0_and_eps(schedule, x_t, step, output, kind)
    assert kind != "eps" or eps_hat is output
    assert kind != "x_0" or x_0_hat is output
    torch.testing.assert_close(q_sample(schedule, x_0_hat, step, eps_hat), x_t, rtol=0, atol=1e-10)
    if kind == "v":
        torch.testing.assert_close(predict_v(schedule, x_0_hat, step, eps_hat), output, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", TYPES)
def test_the_target_is_what_the_conversion_expects(kind: PredictionType) -> None:
    x_0, eps = draw(3, 4, 1, 2, 2)
    t = torch.tensor([0, 1, 500, 900])
    target = prediction_target(NO_SIGNAL, x_0, t, eps, kind)
    x_0_hat, eps_hat = predict_x_0_and_eps(NO_SIGNAL, q_sample(NO_SIGNAL, x_0, t, eps), t, target, kind)
    torch.testing.assert_close(x_0_hat, x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-11)


def test_without_any_signal_v_is_minus_x_0() -> None:
    """In float32 and exactly: nothing is divided by the alpha_bar of 0."""
    x_t, v = draw(0, 1, 1, 2, 2).float()
    t = torch.tensor([999])
    assert torch.equal(predict_x_0_from_v(NO_SIGNAL, x_t, t, v), -v)
    assert torch.equal(predict_eps_from_v(NO_SIGNAL, x_t, t, v), x_t)
    assert torch.equal(predict_eps_from_x_0(NO_SIGNAL, x_t, t, v), x_t)


def test_float_t_is_the_same_at_steps_and_lies_between_elsewhere() -> None:
    x_t, output = draw(1, 3, 1, 2, 2)
    t = torch.tensor([3, 500, 998])
    for kind in TYPES:
        of_int = predict_x_0_and_eps(COSINE, x_t, t, output, kind)
        of_float = predict_x_0_and_eps(COSINE, x_t, t.double(), output, kind)
        for a, b in zip(of_int, of_float, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    between = [predict_v(COSINE, x_t[:1], torch.tensor([s]), output[:1]) for s in (500.0, 500.5, 501.0)]
    assert float(((between[0] - between[1]) * (between[1] - between[2])).min()) > 0


def test_the_cast_comes_last() -> None:
    """Coefficients are rounded once: x_0_hat of float32 images is within a rounding of that in float64."""
    x_t, v = draw(2, 1000, 1, 1, 1)
    t = torch.arange(1000)
    exact = predict_x_0_from_v(COSINE, x_t.float().double(), t, v.float().double())
    got = predict_x_0_from_v(COSINE, x_t.float(), t, v.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6)


def test_impossible_kinds_are_refused() -> None:
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor([0])
    with pytest.raises(ValueError, match=r"^prediction_type: .*'flow'"):
        predict_x_0_and_eps(COSINE, x, t, x, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prediction_type: .*'flow'"):
        prediction_target(COSINE, x, t, x, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^prediction_type: .*'flow'"):
        check_prediction_type("flow", COSINE)
    with pytest.raises(ValueError, match=r"^prediction_type: must be v or x_0 .* zero terminal SNR"):
        check_prediction_type("eps", NO_SIGNAL)
    check_prediction_type("v", NO_SIGNAL)
    check_prediction_type("eps", COSINE)
