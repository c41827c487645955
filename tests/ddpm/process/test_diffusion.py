"""Bayes' rule, inverses and the two fixed variances, for schedules that hypothesis makes up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import (
    NoiseSchedule,
    Prediction,
    ScheduleConfig,
    make_schedule,
    p_mean_variance,
    q_posterior_mean_variance,
    q_sample,
)

betas = st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=6)
pixel = st.floats(-3, 3)


def image(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def schedule_of(beta: list[float]) -> NoiseSchedule:
    return NoiseSchedule.from_betas(torch.tensor(beta, dtype=torch.float64))


def log_normal(x: float, mean: float, variance: float) -> float:
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))


@given(beta=betas, x_0=pixel, x_prev=pixel, x_t=pixel, data=st.data())
def test_posterior_is_bayes_rule(beta: list[float], x_0: float, x_prev: float, x_t: float, data: st.DataObject) -> None:
    """q(x_{t-1} | x_t, x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0) / q(x_t | x_0), every factor written out by hand."""
    t = data.draw(st.integers(1, len(beta) - 1))
    mean, variance, log_variance = q_posterior_mean_variance(
        schedule_of(beta), image(x_0), image(x_t), torch.tensor([t])
    )
    a, a_prev = math.prod(1 - b for b in beta[: t + 1]), math.prod(1 - b for b in beta[:t])
    expected = (
        log_normal(x_t, math.sqrt(1 - beta[t]) * x_prev, beta[t])
        + log_normal(x_prev, math.sqrt(a_prev) * x_0, 1 - a_prev)
        - log_normal(x_t, math.sqrt(a) * x_0, 1 - a)
    )
    assert log_normal(x_prev, float(mean), float(variance)) == pytest.approx(expected, rel=1e-7, abs=1e-6)
    assert float(log_variance) == pytest.approx(math.log(float(variance)), rel=1e-12)


@given(beta=betas, x_0=pixel, x_t=pixel)
def test_posterior_is_certain_at_the_first_step(beta: list[float], x_0: float, x_t: float) -> None:
    schedule = schedule_of(beta)
    mean, variance, log_variance = q_posterior_mean_variance(schedule, image(x_0), image(x_t), torch.tensor([0]))
    assert float(variance) == 0
    assert float(mean) == pytest.approx(x_0, abs=1e-10)
    assert float(log_variance) == math.log(float(schedule.posterior_variance[1]))


@given(beta=betas, x_0=pixel, data=st.data())
def test_q_sample_has_the_mean_and_variance_of_steps_one_by_one(
    beta: list[float], x_0: float, data: st.DataObject
) -> None:
    """Eq. 2 iterated: mean <- sqrt(1 - beta) mean, variance <- (1 - beta) variance + beta."""
    t = data.draw(st.integers(0, len(beta) - 1))
    mean, variance = x_0, 0.0
    for b in beta[: t + 1]:
        mean, variance = math.sqrt(1 - b) * mean, (1 - b) * variance + b
    step = torch.tensor([t])
    at_0 = float(q_sample(schedule_of(beta), image(x_0), step, image(0)))
    at_1 = float(q_sample(schedule_of(beta), image(x_0), step, image(1)))
    assert at_0 == pytest.approx(mean, rel=1e-10, abs=1e-12)
    assert (at_1 - at_0) ** 2 == pytest.approx(variance, rel=1e-9)


def test_each_sample_of_a_batch_has_its_own_t() -> None:
    schedule = make_schedule(ScheduleConfig())
    x_0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([999, 0, 500])
    batch = q_sample(schedule, x_0, t, eps)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], q_sample(schedule, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1]))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [0, 1, 2])
def test_p_mean_variance_is_the_posterior_at_x_0_hat(variance: str, t: int) -> None:
    """On a respaced chain: the network hears the training index, the coefficients are the chain's."""
    training = make_schedule(ScheduleConfig(num_timesteps=100))
    chain = training.respace([10, 40, 90])
    heard: list[int] = []

    def denoise(x_t: Tensor, step: Tensor, label: Tensor | None) -> Prediction:
        heard.extend(step.tolist())
        return Prediction(x_0_hat=0.5 * x_t, eps_hat=x_t)

    x_t, step = image(0.8), torch.tensor([t])
    p = p_mean_variance(chain, denoise, x_t, step, None, variance=variance)  # type: ignore[arg-type]
    assert heard == [[10, 40, 90][t]]
    assert torch.equal(p.x_0_hat, 0.5 * x_t)
    assert torch.equal(p.mean, q_posterior_mean_variance(chain, 0.5 * x_t, x_t, step)[0])
    a, a_prev = float(training.alpha_bar[[10, 40, 90][t]]), float(training.alpha_bar[[10, 40][t - 1]]) if t else 1.0
    beta = 1 - a / a_prev
    expected = beta if variance == "fixed_large" else beta * (1 - a_prev) / (1 - a)
    assert float(p.variance) == pytest.approx(expected, rel=1e-12)
    # The decoder of L_0 takes its width from the second entry of the posterior, whichever variance was chosen.
    width = expected if t else float(chain.posterior_variance[1])
    assert float(p.log_variance) == pytest.approx(math.log(width), rel=1e-12)


@pytest.mark.parametrize("timesteps", [None, [10, 40, 90], [90]], ids=["whole", "respaced", "one"])
@pytest.mark.parametrize("last", [False, True], ids=["t=0", "t=T-1"])
def test_learned_range_lies_between_the_fixed_variances(timesteps: list[int] | None, last: bool) -> None:
    """Nichol and Dhariwal, Eq. 15: geometrically between the posterior's and beta, of the chain that is walked."""
    chain = make_schedule(ScheduleConfig(num_timesteps=100))
    chain = chain.respace(timesteps) if timesteps else chain
    t = torch.tensor([chain.num_timesteps - 1 if last else 0])
    x_t = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    fraction = torch.tensor([0.0, 1.0, 0.5, 1.25], dtype=torch.float64).reshape(1, 1, 2, 2)

    def denoise(x_t: Tensor, step: Tensor, label: Tensor | None) -> Prediction:
        return Prediction(x_0_hat=0.5 * x_t, eps_hat=x_t, variance_fraction=fraction)

    p = p_mean_variance(chain, denoise, x_t, t, None, variance="learned_range")
    low, high = float(chain.posterior_log_variance[t]), math.log(float(chain.beta[t]))
    expected = [low, high, (low + high) / 2, low + 1.25 * (high - low)]
    assert p.log_variance.flatten().tolist() == pytest.approx(expected, rel=1e-13)
    assert p.variance.flatten().tolist() == pytest.approx([math.exp(v) for v in expected], rel=1e-12)
    fixed = p_mean_variance(chain, denoise, x_t, t, None, variance="fixed_small")
    assert torch.equal(p.mean, fixed.mean) and torch.equal(p.x_0_hat, fixed.x_0_hat)


def test_learned_range_needs_a_prediction() -> None:
    schedule, x = make_schedule(ScheduleConfig()), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^variance: learned_range needs a network"):
        p_mean_variance(
            schedule,
            lambda x, t, label: Prediction(x_0_hat=x, eps_hat=x),
            x,
            torch.tensor([3]),
            None,
            variance="learned_range",
        )


def test_wrong_shapes_and_names_are_refused() -> None:
    schedule = make_schedule(ScheduleConfig())
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^eps: "):
        q_sample(schedule, x, t, x[:, :, :2])
    with pytest.raises(ValueError, match=r"^x_0: "):
        q_posterior_mean_variance(schedule, x[:, :, :2], x, t)
    with pytest.raises(ValueError, match=r"^variance: "):
        p_mean_variance(schedule, lambda x, t, label: Prediction(x_0_hat=x, eps_hat=x), x, t, None, variance="learned")  # type: ignore[arg-type]
