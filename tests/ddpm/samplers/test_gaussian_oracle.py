"""The whole reverse process against a closed form: data that is Gaussian, and the network that is exact for it.

For x_0 ~ N(mu, s^2) the best prediction of the noise is known, and with it every step of every sampler is affine in
x_t: x_{t-1} = a x_t + b + c eps. The three numbers are read off the real code by calling it with x_t and eps of 0 and
1; mean and variance then carry through all T steps without any Monte Carlo, and a wrong coefficient shows in the last
digits.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ddpm import (
    DiffusionModel,
    NetworkDenoiser,
    NoiseSchedule,
    ScheduleConfig,
    TrainingBatch,
    Variance,
    ddim_step,
    make_schedule,
    p_sample,
    per_sample_loss,
    q_sample,
    simple_loss,
)

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def exact_denoiser(schedule: NoiseSchedule, mu: float, s2: float) -> NetworkDenoiser:
    """eps*(x_t, t) = sqrt(1 - abar) (x_t - sqrt(abar) mu) / (abar s^2 + 1 - abar)."""

    def eps_star(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = schedule.alpha_bar[t][:, None, None, None]
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mu) / (abar * s2 + 1 - abar)

    return NetworkDenoiser(network=eps_star, schedule=schedule, clip_x_0=False)


def carry(step: Step, num_timesteps: int, mean: float = 0.0, variance: float = 1.0) -> list[tuple[float, float]]:
    """Mean and variance of x_{t-1} for t = T-1 .. 0, from those of x_T."""
    x, eps = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    moments = []
    for t in reversed(range(num_timesteps)):
        b, a_plus_b, c_plus_b = step(x, torch.full((3,), t), eps).flatten().tolist()
        a, c = a_plus_b - b, c_plus_b - b
        mean, variance = a * mean + b, a * a * variance + c * c
        moments.append((mean, variance))
    return moments


def ancestral(schedule: NoiseSchedule, mu: float, s2: float, variance: Variance) -> list[tuple[float, float]]:
    denoise = exact_denoiser(schedule, mu, s2)
    return carry(
        lambda x, t, eps: p_sample(schedule, denoise, x, t, None, variance=variance, eps=eps), schedule.num_timesteps
    )


@pytest.mark.parametrize(
    ("variance", "T", "error"),
    [
        ("fixed_large", 125, "6.17e-03"),
        ("fixed_large", 250, "3.04e-03"),
        ("fixed_large", 500, "1.51e-03"),
        ("fixed_large", 1000, "7.52e-04"),
        ("fixed_small", 125, "2.55e-02"),
        ("fixed_small", 250, "1.39e-02"),
        ("fixed_small", 500, "7.42e-03"),
        ("fixed_small", 1000, "3.87e-03"),
    ],
)
def test_error_of_the_final_variance(variance: Variance, T: int, error: str) -> None:
    """N(0.7, 0.25), linear schedule: the error halves when T doubles; beta_t errs upwards, the posterior downwards."""
    mean, final = ancestral(make_schedule(ScheduleConfig(num_timesteps=T)), 0.7, 0.25, variance)[-1]
    signed = final - 0.25
    assert f"{abs(signed):.2e}" == error
    assert (signed > 0) is (variance == "fixed_large")
    assert mean == pytest.approx(0.7, abs=2e-3)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_beta_is_exact_for_unit_noise(name: str) -> None:
    """mu = 0, s = 1: with beta_t the variance is 1 after every step but the last, which adds no noise."""
    schedule = make_schedule(ScheduleConfig(name=name, num_timesteps=1000))  # type: ignore[arg-type]
    moments = ancestral(schedule, 0.0, 1.0, "fixed_large")
    assert all(abs(mean) < 1e-12 and abs(variance - 1) < 1e-10 for mean, variance in moments[:-1])
    assert moments[-1][1] == pytest.approx(1 - float(schedule.beta[0]), abs=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_posterior_variance_is_exact_for_a_point(name: str) -> None:
    """s = 0: the posterior variance returns mu, and before that has the true marginals q(x_t)."""
    schedule = make_schedule(ScheduleConfig(name=name, num_timesteps=1000))  # type: ignore[arg-type]
    denoise = exact_denoiser(schedule, 0.7, 0.0)
    moments = carry(
        lambda x, t, eps: p_sample(schedule, denoise, x, t, None, variance="fixed_small", eps=eps),
        1000,
        mean=float(schedule.alpha_bar[-1].sqrt()) * 0.7,
        variance=1 - float(schedule.alpha_bar[-1]),
    )
    for (mean, variance), abar in zip(moments, schedule.alpha_bar_prev.flip(0).tolist(), strict=True):
        assert mean == pytest.approx(abar**0.5 * 0.7, abs=1e-9)
        assert variance == pytest.approx(1 - abar, abs=1e-9)
    mean, variance = ancestral(schedule, 0.7, 0.0, "fixed_small")[-1]
    assert mean == pytest.approx(0.7, abs=1e-10) and variance == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_every_eta_has_the_true_marginals_for_a_point(eta: float, num_steps: int) -> None:
    """Song et al., Lemma 1: the sampler is built so that q(x_t | x_0) is the same for every eta, over any subset."""
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=1000))
    chain = schedule.respace([round(i * 999 / (num_steps - 1)) for i in range(num_steps)])
    denoise = exact_denoiser(schedule, 0.7, 0.0)
    moments = carry(
        lambda x, t, eps: ddim_step(chain, denoise, x, t, None, eta=eta, eps=eps),
        num_steps,
        mean=float(chain.alpha_bar[-1].sqrt()) * 0.7,
        variance=1 - float(chain.alpha_bar[-1]),
    )
    for (mean, variance), abar in zip(moments, chain.alpha_bar_prev.flip(0).tolist(), strict=True):
        assert mean == pytest.approx(abar**0.5 * 0.7, abs=1e-9)
        assert variance == pytest.approx(1 - abar, abs=1e-9)


def test_deterministic_ddim_converges_at_first_order() -> None:
    """eta = 0 is Euler's method for the probability-flow ODE: the error of the final variance halves when T doubles."""

    def deterministic_step(
        schedule: NoiseSchedule, denoise: NetworkDenoiser, x: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        return ddim_step(schedule, denoise, x, t, None, eta=0.0, eps=eps)

    errors = []
    for T in (250, 500, 1000):
        schedule = make_schedule(ScheduleConfig(num_timesteps=T))
        step = partial(deterministic_step, schedule, exact_denoiser(schedule, 0.7, 0.25))
        errors.append(carry(step, T)[-1][1] - 0.25)
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("t", [0, 1, 200, 500, 999])
def test_floor_of_the_simple_loss(t: int) -> None:
    """No network can be better than abar s^2 / (abar s^2 + 1 - abar) per dimension, and the exact one reaches it.

    The loss is quadratic in (x_0 - mu) / s and eps, so its mean over the points (+-1, +-1) is the exact expectation.
    """
    schedule = make_schedule(ScheduleConfig(num_timesteps=1000))
    mu, s2 = 0.7, 0.25
    corner = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    x_0, eps = (mu + s2**0.5 * corner[:, 0])[:, None, None, None], corner[:, 1][:, None, None, None]
    step = torch.full((4,), t)
    x_t = q_sample(schedule, x_0, step, eps)
    batch = TrainingBatch(x_t=x_t, t=step, eps=eps, x_0=x_0, weight=torch.ones(4), label=None)
    model = DiffusionModel(network=exact_denoiser(schedule, mu, s2).network, schedule=schedule, image_shape=(1, 1, 1))
    abar = float(schedule.alpha_bar[t])
    floor = abar * s2 / (abar * s2 + 1 - abar)
    assert float(per_sample_loss(model, batch).mean()) == pytest.approx(floor, rel=1e-10)
    for factor in (0.99, 1.01):
        worse = simple_loss(eps, factor * model.network(batch.x_t, step, None))
        assert float(worse.mean()) > floor
