"""Single steps and trajectories against diffusers, an independent implementation.

diffusers keeps its tables in float32. With our float64 tables in their place a step agrees to 1e-10; as it ships, to
2e-3. Where x_0_hat is not clipped it grows to 1 / sqrt(alpha_bar) (2e4 at the end of the cosine schedule), and the
error of the float32 tables with it: there the comparison is relative to the size of the result.
"""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    NetworkDenoiser,
    NoiseSchedule,
    ScheduleConfig,
    Spacing,
    Variance,
    ddim_step,
    make_schedule,
    p_sample,
    spaced_timesteps,
)

SCHEDULES = {
    "linear": make_schedule(ScheduleConfig(name="linear")),
    "cosine": make_schedule(ScheduleConfig(name="cosine")),
}
THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 3, 4, 4)

DDPMScheduler: Any = diffusers.DDPMScheduler  # diffusers is not typed
DDIMScheduler: Any = diffusers.DDIMScheduler


def patched(scheduler: Any, schedule: NoiseSchedule) -> Any:
    """Give diffusers our tables."""
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.beta, schedule.alpha, schedule.alpha_bar
    return scheduler


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_agrees(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Within the tolerance, relative to the largest value where that is above 1."""
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("tables", ["ours", "theirs"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ancestral_step(t: int, name: str, variance: Variance, clip: bool, tables: str) -> None:
    schedule = SCHEDULES[name]
    x_t, eps_hat = randn(1), randn(2)
    scheduler = DDPMScheduler(beta_schedule=THEIR_NAME[name], variance_type=variance, clip_sample=clip)
    if tables == "ours":
        patched(scheduler, schedule)
    theirs = scheduler.step(eps_hat, t, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    denoise = NetworkDenoiser(network=lambda x, t, label: eps_hat, schedule=schedule, clip_x_0=clip)
    ours = p_sample(schedule, denoise, x_t, torch.full((2,), t), None, variance=variance, eps=randn(3))
    assert_agrees(ours, theirs, 1e-10 if tables == "ours" else 2e-3)


@pytest.mark.parametrize("tables", ["ours", "theirs"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_ddim_step(t: int, name: str, eta: float, clip: bool, tables: str) -> None:
    schedule = SCHEDULES[name]
    x_t, eps_hat, eps = randn(1), randn(2), randn(3)
    scheduler = DDIMScheduler(beta_schedule=THEIR_NAME[name], clip_sample=clip)
    if tables == "ours":
        patched(scheduler, schedule)
    scheduler.set_timesteps(1000)
    theirs = scheduler.step(eps_hat, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=eps).prev_sample
    denoise = NetworkDenoiser(network=lambda x, t, label: eps_hat, schedule=schedule, clip_x_0=clip)
    ours = ddim_step(schedule, denoise, x_t, torch.full((2,), t), None, eta=eta, eps=eps)
    assert_agrees(ours, theirs, 1e-10 if tables == "ours" else 2e-3)


def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Something that is not linear and depends on t."""
    return torch.tanh(x_t + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_trajectory_over_a_subset(name: str, variance: Variance) -> None:
    schedule = SCHEDULES[name]
    scheduler = patched(DDPMScheduler(variance_type=variance, timestep_spacing="linspace"), schedule)
    scheduler.set_timesteps(20)
    x_t, generator = randn(1), torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, t.expand(2), None), t, x_t, generator=generator).prev_sample
    ours_generator = torch.Generator().manual_seed(3)
    ours = Ancestral(variance=variance).sample(
        NetworkDenoiser(network=network, schedule=schedule),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(1000, 20, "linspace"),
        noise=lambda draw: torch.randn(SHAPE, generator=ours_generator, dtype=torch.float64),
    )
    assert_agrees(ours, x_t, 1e-8)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_trajectory_over_a_subset(name: str, eta: float) -> None:
    """Leading spacing: the only one for which diffusers' DDIM takes the step before from the chain that it visits."""
    schedule = SCHEDULES[name]
    scheduler = patched(DDIMScheduler(timestep_spacing="leading"), schedule)
    scheduler.set_timesteps(20)
    x_t = randn(1)
    for draw, t in enumerate(scheduler.timesteps, start=1):
        x_t = scheduler.step(
            network(x_t, t.expand(2), None),
            int(t),
            x_t,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=randn(100 + draw),
        ).prev_sample
    ours = DDIM(eta=eta).sample(
        NetworkDenoiser(network=network, schedule=schedule),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(1000, 20, "leading"),
        noise=lambda draw: randn(100 + draw),
    )
    assert_agrees(ours, x_t, 1e-8)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacing(spacing: Spacing) -> None:
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    for num_steps in [2, 3, 4, 5, 10, 20, 25, 50, 99, 100, 250, 500, 999, 1000]:
        scheduler.set_timesteps(num_steps)
        assert spaced_timesteps(1000, num_steps, spacing) == scheduler.timesteps.tolist()[::-1]
