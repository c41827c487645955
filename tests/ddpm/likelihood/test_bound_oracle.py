"""Every term of the bound against its closed form: data that is Gaussian, and the network that is exact for it.

For x_0 ~ N(mu, s^2) and the exact prediction, x_0 - x_0_hat has the variance s^2 (1 - abar) / (abar s^2 + 1 - abar) of
x_0 given x_t, and so each KL of the bound has a closed expectation. A term is a quadratic in (x_0, eps), for which
Gauss-Hermite quadrature is exact: no Monte Carlo. The closed forms are built from alpha_bar alone, by conditioning the
joint Gaussian of (x_{t-1}, x_t), not by the formulas of the tables.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm import (
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
    ScheduleConfig,
    Variance,
    bound_term,
    make_schedule,
    prior_loss,
)

MU, S2 = 0.7, 0.25
FRACTION = 0.3  # where a learned log-variance lies between its bounds

CHAINS = {
    "linear": make_schedule(ScheduleConfig()),
    "cosine": make_schedule(ScheduleConfig(name="cosine")),
    "zero terminal SNR": make_schedule(ScheduleConfig(num_timesteps=200, zero_terminal_snr=True)),
}
SUBSETS = {"every step": None, "10 steps": [0, 1, 7, 100, 111, 113, 160, 190, 198, 199]}


def exact_denoiser(
    schedule: NoiseSchedule, prediction_type: PredictionType, variance: Variance, mu: float, s2: float
) -> NetworkDenoiser:
    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = schedule.alpha_bar[t][:, None, None, None]
        a, s, total = abar.sqrt(), (1 - abar).sqrt(), abar * s2 + 1 - abar
        eps, x_0 = s * (x_t - a * mu) / total, (s2 * a * x_t + s**2 * mu) / total
        prediction = {"eps": eps, "x_0": x_0, "v": a * eps - s * x_0}[prediction_type]
        if variance != "learned_range":
            return prediction
        return torch.cat((prediction, torch.full_like(prediction, 2 * FRACTION - 1)), dim=1)

    return NetworkDenoiser(
        network=network,
        schedule=schedule,
        prediction_type=prediction_type,
        learned_variance=variance == "learned_range",
        clip_x_0=False,
    )


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """x_0, eps and weights of the quadrature over both, float64 [9]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    return MU + S2**0.5 * z.repeat_interleave(3), z.repeat(3), w.repeat_interleave(3) * w.repeat(3)


def quadrature(chain: NoiseSchedule, denoise: NetworkDenoiser, variance: Variance) -> np.ndarray:
    """Expectation over x_0 and eps of the term of each t > 0, in one batch of all t and nodes."""
    x_0, eps, weight = grid()
    t = torch.arange(1, chain.num_timesteps)

    def images(values: Tensor) -> Tensor:
        return values.repeat(len(t))[:, None, None, None]

    terms = bound_term(chain, denoise, images(x_0), t.repeat_interleave(9), None, variance=variance, eps=images(eps))
    return (terms.reshape(-1, 9) @ weight).numpy()


def closed_forms(abar: np.ndarray, variance: Variance) -> np.ndarray:
    """E[L_{t-1}] in bits, for each t > 0 of a chain with these alpha_bar."""
    before, after = abar[:-1], abar[1:]
    alpha = after / before
    gain = np.sqrt(alpha) * (1 - before) / (1 - after)  # of x_{t-1} on x_t, given x_0
    q_variance = (1 - before) - gain * np.sqrt(alpha) * (1 - before)
    slope = np.sqrt(before) - gain * np.sqrt(after)  # of the posterior's mean on x_0
    residual = S2 * (1 - after) / (after * S2 + 1 - after)
    p_variance = {
        "fixed_small": q_variance,
        "fixed_large": 1 - alpha,
        "learned_range": (1 - alpha) ** FRACTION * q_variance ** (1 - FRACTION),
    }[variance]
    kl: np.ndarray = 0.5 * ((q_variance + slope**2 * residual) / p_variance - 1 - np.log(q_variance / p_variance))
    return kl / math.log(2)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_every_term_is_its_closed_form(
    name: str, subset: str, variance: Variance, prediction_type: PredictionType
) -> None:
    schedule, steps = CHAINS[name], SUBSETS[subset]
    if prediction_type == "eps" and float(schedule.alpha_bar[-1]) == 0:
        pytest.skip("eps says nothing where no signal is left")
    chain = schedule if steps is None else schedule.respace(steps)
    denoise = exact_denoiser(schedule, prediction_type, variance, MU, S2)
    expected = closed_forms(chain.alpha_bar.numpy(), variance)
    np.testing.assert_allclose(quadrature(chain, denoise, variance), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CHAINS)
def test_prior_is_its_closed_form(name: str) -> None:
    x_0, _, weight = grid()
    abar = float(CHAINS[name].alpha_bar[-1])
    expected = 0.5 * (abar * (MU**2 + S2) - abar - math.log1p(-abar)) / math.log(2)
    prior = prior_loss(CHAINS[name], x_0[:, None, None, None])
    assert float(prior @ weight) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_no_other_mean_has_a_lower_term(variance: Variance) -> None:
    """The exact prediction is the best one: moved by 1% of its distance to the mean, every term grows."""
    schedule = CHAINS["cosine"]
    best = quadrature(schedule, exact_denoiser(schedule, "x_0", variance, MU, S2), variance)
    for mu, s2 in ((MU * 1.01, S2), (MU, S2 * 1.01), (MU, S2 * 0.99)):
        worse = quadrature(schedule, exact_denoiser(schedule, "x_0", variance, mu, s2), variance)
        assert bool((worse > best).all())
