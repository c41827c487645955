"""DPM-Solver++ 2M: what holds exactly. Its order is in test_convergence.py, diffusers' numbers in the trajectories."""

import math

import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    DPMSolver2M,
    DPMSolver2MSDE,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    ScheduleConfig,
    make_schedule,
)
from tests.ddpm.oracles import GAUSSIAN, affine_moments

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
NO_SIGNAL = make_schedule(ScheduleConfig(name="linear", zero_terminal_snr=True))


def randn(seed: int) -> Tensor:
    return torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_constant_x_0_hat_is_solved_exactly_in_one_step_or_many() -> None:
    """Only x_0_hat is approximated: where it is constant, x_t moves on the line through it, as DDIM does."""
    x_T, image = randn(0), randn(1)

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        return Prediction(x_0_hat=image, eps_hat=torch.full_like(image, math.nan))

    alpha_bar = SCHEDULE.alpha_bar[[50, 999]]
    eps = (x_T - alpha_bar[1].sqrt() * image) / (1 - alpha_bar[1]).sqrt()
    expected = alpha_bar[0].sqrt() * image + (1 - alpha_bar[0]).sqrt() * eps
    for timesteps in ([50, 999], [50, 300, 301, 999]):
        got = DPMSolver2M().sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=False)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    got = DPMSolver2M().sample(denoise, SCHEDULE, x_T, None, timesteps=[50, 300, 999])
    torch.testing.assert_close(got, image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("timesteps", [[0, 999], [100, 200, 300, 999]])
def test_the_stochastic_form_has_the_true_marginals_for_a_point(timesteps: list[int]) -> None:
    """Where x_0_hat is constant the noise equation is solved exactly too: variance 1 - alpha_bar at every place."""
    schedule = SCHEDULE

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        return Prediction(x_0_hat=torch.full_like(x_t, 0.7), eps_hat=torch.full_like(x_t, math.nan))

    start, end = float(schedule.alpha_bar[timesteps[-1]]), float(schedule.alpha_bar[timesteps[0]])
    mean, variance = affine_moments(
        lambda x_T, noise: DPMSolver2MSDE().sample(
            denoise, schedule, x_T, None, timesteps=timesteps, noise=noise, final_step=False
        ),
        len(timesteps) - 1,
        math.sqrt(start) * 0.7,
        1 - start,
    )
    assert mean == pytest.approx(math.sqrt(end) * 0.7, rel=1e-12)
    assert variance == pytest.approx(1 - end, rel=1e-12)


def test_first_step_is_ddim_s() -> None:
    x_T, denoise = randn(0), GAUSSIAN.denoiser(SCHEDULE)
    for timesteps in ([999], [400, 999]):
        got, expected = (
            sampler.sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=len(timesteps) == 1)
            for sampler in (DPMSolver2M(), DDIM(eta=0.0))
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
def test_zero_terminal_snr_is_the_limit(stochastic: bool) -> None:
    """alpha_bar of 0 gives no special case, just the limit of alpha_bar falling towards it."""
    timesteps, x_T = [0, 300, 600, 900, 999], randn(0)

    def run(schedule: NoiseSchedule) -> Tensor:
        denoise = NetworkDenoiser(network=GAUSSIAN.network(schedule, "v"), schedule=schedule, prediction_type="v")
        if stochastic:
            return DPMSolver2MSDE().sample(denoise, schedule, x_T, None, timesteps=timesteps, noise=randn)
        return DPMSolver2M().sample(denoise, schedule, x_T, None, timesteps=timesteps)

    exact = run(NO_SIGNAL)
    assert bool(exact.isfinite().all())
    distances = []
    for last in (1e-9, 1e-14, 1e-19):
        alpha_bar = NO_SIGNAL.alpha_bar.clone()
        alpha_bar[-1] = last
        distances.append(float((run(NoiseSchedule.from_alpha_bar(alpha_bar)) - exact).abs().max()))
    # The weight of the last step goes with sqrt(alpha_bar), that of the extrapolation after it with 1 / log(alpha_bar).
    assert distances[2] < distances[1] < distances[0] < 0.2


def test_draws_are_counted_and_the_final_step_draws_nothing() -> None:
    drawn = []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return randn(draw)

    denoise = GAUSSIAN.denoiser(SCHEDULE)
    DPMSolver2MSDE().sample(denoise, SCHEDULE, randn(0), None, timesteps=[0, 10, 500, 999], noise=noise)
    assert drawn == [1, 2, 3]


def test_one_network_evaluation_per_step() -> None:
    heard: list[int] = []
    network = GAUSSIAN.network(SCHEDULE)

    def counting(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        heard.append(int(t[0]))
        assert t.dtype == torch.int64 and t.shape == (2,)
        return network(x_t, t, label)

    DPMSolver2M().sample(
        NetworkDenoiser(network=counting, schedule=SCHEDULE), SCHEDULE, randn(0), None, timesteps=[3, 10, 500, 999]
    )
    assert heard == [999, 500, 10, 3]
