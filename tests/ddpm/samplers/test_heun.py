"""Heun's method against Karras et al.'s Algorithm 2 in their own variables; what churn draws, and where it leads."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import Heun, Network, NetworkDenoiser, NoiseSchedule, ScheduleConfig, make_schedule, spaced_timesteps
from ddpm.process.spacing import continuous_timesteps
from ddpm.samplers.heun import MAX_SIGMA_RATIO, num_corrections
from tests.ddpm.oracles import GAUSSIAN, TWO_MODES, Mixture, affine_moments

SCHEDULE = make_schedule(ScheduleConfig(name="linear"))
NO_SIGNAL = make_schedule(ScheduleConfig(name="cosine", zero_terminal_snr=True))
EVERYWHERE: dict[str, Any] = {"churn_interval": (0.0, math.inf), "churn_noise": 1.0}
"""Churn at every sigma, with noise of the exact deviation."""


def randn(seed: int) -> Tensor:
    return torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def listening(network: Network, heard: list[Tensor]) -> Network:
    def listen(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        heard.append(t)
        return network(x_t, t, label)

    return listen


def algorithm_2(
    schedule: NoiseSchedule,
    data: Mixture,
    x_T: Tensor,
    timesteps: Sequence[float],
    churn: float,
    interval: tuple[float, float],
    churn_noise: float,
) -> Tensor:
    """Karras et al. 2022, Algorithm 2: x = x_0 + sigma eps, D(x; sigma) the posterior mean of the data."""
    sigmas = [float(s) for s in schedule.sigma(torch.tensor(list(timesteps), dtype=torch.float64))]
    t = [*sorted(sigmas, reverse=True), 0.0]
    n = len(sigmas)

    def D(x: Tensor, sigma: float) -> Tensor:
        alpha_bar = torch.tensor(1 / (1 + sigma**2), dtype=torch.float64).expand(x.shape)
        return data.x_0_hat(x * alpha_bar.sqrt(), alpha_bar)

    x = x_T * math.sqrt(1 + t[0] ** 2)
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if interval[0] <= t[i] <= interval[1] else 0.0
        t_hat = min(t[i] + gamma * t[i], t[0])
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * churn_noise * randn(100 + i + 1)
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_prime) / 2
    return x


@pytest.mark.parametrize("churn", [0.0, 3.0, 1000.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.1, 20.0)], ids=["everywhere", "interval"])
def test_algorithm_2_of_karras_et_al(churn: float, interval: tuple[float, float]) -> None:
    timesteps = continuous_timesteps(SCHEDULE, 20, "log_snr")
    sampler = Heun(churn=churn, churn_interval=interval, churn_noise=1.003)
    got = sampler.sample(
        TWO_MODES.denoiser(SCHEDULE),
        SCHEDULE,
        randn(0),
        None,
        timesteps=timesteps,
        noise=lambda draw: randn(100 + draw),
    )
    expected = algorithm_2(SCHEDULE, TWO_MODES, randn(0), timesteps, churn, interval, 1.003)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_churn_alone_keeps_the_marginals() -> None:
    """New noise and its removal, on data for which a step is exact: a point. The variance must stay 1 - alpha_bar."""
    point = Mixture(weights=(1.0,), means=(0.3,), variances=(1e-30,))
    timesteps = continuous_timesteps(SCHEDULE, 9, "log_snr")
    start, end = (float(SCHEDULE.alpha_bar[t]) for t in (-1, 0))
    sampler = Heun(churn=4.0, **EVERYWHERE)
    mean, variance = affine_moments(
        lambda x_T, noise: sampler.sample(
            point.denoiser(SCHEDULE), SCHEDULE, x_T, None, timesteps=timesteps, noise=noise, final_step=False
        ),
        8,
        math.sqrt(start) * 0.3,
        1 - start,
    )
    assert mean == pytest.approx(math.sqrt(end) * 0.3, rel=1e-10)
    assert variance == pytest.approx(1 - end, rel=1e-8)


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_trained_steps_lead_to_trained_steps(churn: float) -> None:
    """A network that takes int64 is never asked about a place between two steps, not even by churn."""
    timesteps = spaced_timesteps(SCHEDULE, 12, "karras")
    heard: list[Tensor] = []
    denoise = NetworkDenoiser(network=listening(GAUSSIAN.network(SCHEDULE), heard), schedule=SCHEDULE)
    sampler = Heun(churn=churn, **EVERYWHERE)
    sampler.sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps, noise=randn)
    assert all(t.dtype == torch.int64 and t.shape == (2,) for t in heard)
    assert len(heard) == 12 + num_corrections(SCHEDULE, timesteps)
    first_of_steps = [int(t[0]) for t in heard]
    assert max(first_of_steps) <= 999
    assert (set(first_of_steps) == set(timesteps)) is (churn == 0)


def test_churn_never_leaves_the_chain_and_draws_only_where_it_acts() -> None:
    drawn: list[int] = []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return randn(draw)

    denoise, timesteps = GAUSSIAN.denoiser(SCHEDULE), spaced_timesteps(SCHEDULE, 10, "log_snr")
    sigmas = SCHEDULE.sigma(torch.tensor(timesteps)).flip(0)
    Heun(churn=5.0, **EVERYWHERE).sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps, noise=noise)
    assert drawn == list(range(2, 11))  # the first step is at the end of the chain already
    drawn.clear()
    sampler = Heun(churn=5.0, churn_interval=(0.05, 5.0), churn_noise=1.0)
    sampler.sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps, noise=noise)
    assert drawn == [draw for draw, sigma in enumerate(sigmas.tolist(), start=1) if 0.05 <= sigma <= 5.0]
    drawn.clear()
    Heun().sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps, noise=noise)
    assert drawn == []


def test_churn_finer_than_the_steps_of_the_chain_does_nothing() -> None:
    timesteps = spaced_timesteps(SCHEDULE, 10, "log_snr")
    denoise = GAUSSIAN.denoiser(SCHEDULE)
    plain, fine = (
        Heun(churn=churn, **EVERYWHERE).sample(denoise, SCHEDULE, randn(0), None, timesteps=timesteps)
        for churn in (0.0, 1e-4)
    )
    assert torch.equal(fine, plain)


def test_coarse_steps_are_not_corrected() -> None:
    """Where sigma falls by more than MAX_SIGMA_RATIO the correction would multiply errors: one evaluation, as DDIM."""
    assert num_corrections(SCHEDULE, [0, 999]) == 0
    fine = continuous_timesteps(SCHEDULE, 40, "log_snr")
    assert num_corrections(SCHEDULE, fine) == 39
    sigma = float(SCHEDULE.sigma(torch.tensor([500])))
    for ratio, expected in ((0.99 * MAX_SIGMA_RATIO, 1), (1.01 * MAX_SIGMA_RATIO, 0)):
        log_snr = torch.tensor([2 * math.log(ratio / sigma)], dtype=torch.float64)
        assert num_corrections(SCHEDULE, [float(SCHEDULE.t_at_log_snr(log_snr)), 500.0]) == expected


@pytest.mark.parametrize("churn", [0.0, 20.0])
@pytest.mark.parametrize("spacing", ["linspace", "log_snr", "trailing"])
def test_zero_terminal_snr(spacing: str, churn: float) -> None:
    """The step from infinite sigma is DDIM's; the images are finite and as wide as the data."""
    timesteps = spaced_timesteps(NO_SIGNAL, 50, spacing)  # type: ignore[arg-type]
    assert timesteps[-1] == 999
    denoise = NetworkDenoiser(
        network=GAUSSIAN.network(NO_SIGNAL, "v"), schedule=NO_SIGNAL, prediction_type="v", clip_x_0=False
    )
    x_T = torch.randn(400, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def noise(draw: int) -> Tensor:
        return torch.randn(x_T.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)

    sampler = Heun(churn=churn, **EVERYWHERE)
    got = sampler.sample(denoise, NO_SIGNAL, x_T, None, timesteps=timesteps, noise=noise)
    # 1600 values: five standard errors are 0.06 of the mean's 0.0125 and 0.045 of the deviation's 0.009.
    assert float(got.mean()) == pytest.approx(0.7, abs=0.07)
    assert float(got.std()) == pytest.approx(0.5, abs=0.06)
