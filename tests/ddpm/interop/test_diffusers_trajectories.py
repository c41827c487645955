"""Whole trajectories against diffusers: every sampler both have, prediction, clipping, spacing, terminal noise.

Their schedulers get our float64 tables (see test_diffusers_parity.py). DDIM runs with `use_clipped_model_output`, which
re-derives eps_hat as ours always does. DPM-Solver has no clipping there, but thresholding with an upper limit of 1 is
clipping; it rounds every image to float32 between steps, and it cannot take an alpha_bar of 0, so that it is compared
with 1e-12 in its place (test_dpm_solver.py shows that 0 is the limit). Where the last step visited is not t = 0 and the
variance is beta, DDPM adds noise to the final image, which nobody wants: there the comparison ends a step before.
"""

import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver3MCommon,
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
    ScheduleConfig,
    Spacing,
    Variance,
    make_schedule,
    spaced_timesteps,
)
from ddpm.interop.diffusers_scheduler import PREDICTION_TYPES

DDPMScheduler: Any = diffusers.DDPMScheduler  # diffusers is not typed
DDIMScheduler: Any = diffusers.DDIMScheduler
DPMSolverMultistepScheduler: Any = diffusers.DPMSolverMultistepScheduler

SHAPE = (2, 3, 4, 4)
THEIR_NAME = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
SCHEDULES = {zero: make_schedule(ScheduleConfig(name="linear", zero_terminal_snr=zero)) for zero in (False, True)}
CASES = [
    pytest.param(
        kind,
        clip,
        spacing,
        zero,
        num_steps,
        id=f"{kind}-{'clip' if clip else 'no_clip'}-{spacing}-{'zero' if zero else 'linear'}-{num_steps}",
    )
    for kind, clip, spacing, zero, num_steps in itertools.product(
        ("eps", "x_0", "v"), (True, False), ("leading", "trailing"), (False, True), (10, 20)
    )
    if not (zero and kind == "eps")  # nothing is known of x_0 where x_t is eps: refused
]


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Something that is not linear, depends on t and leaves [-1, 1]."""
    return 1.3 * torch.tanh(x_t + t[:, None, None, None] / 1000)


def patched(scheduler: Any, schedule: NoiseSchedule, num_steps: int) -> Any:
    """Give diffusers our tables."""
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.beta, schedule.alpha, schedule.alpha_bar
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "sigmas"):
        sigmas = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()[scheduler.timesteps]
        scheduler.sigmas = torch.cat((sigmas, torch.zeros(1, dtype=torch.float64)))
    return scheduler


def with_some_signal(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule with an alpha_bar of 0 replaced."""
    return NoiseSchedule.from_alpha_bar(schedule.alpha_bar.clamp(min=1e-12))


def denoiser(schedule: NoiseSchedule, kind: PredictionType, clip: bool) -> NetworkDenoiser:
    return NetworkDenoiser(network=network, schedule=schedule, prediction_type=kind, clip_x_0=clip)


def assert_agrees(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Within the tolerance, relative to the largest value where that is above 1."""
    assert bool(ours.isfinite().all())
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "clip", "spacing", "zero", "num_steps"), CASES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(
    variance: Variance, kind: PredictionType, clip: bool, spacing: Spacing, zero: bool, num_steps: int
) -> None:
    schedule = SCHEDULES[zero]
    options = {"variance_type": variance, "clip_sample": clip, "timestep_spacing": spacing}
    scheduler = patched(DDPMScheduler(prediction_type=THEIR_NAME[kind], **options), schedule, num_steps)
    x_t, generator = randn(1), torch.Generator().manual_seed(3)
    final_step = variance == "fixed_small" or spacing == "leading"
    for t in scheduler.timesteps if final_step else scheduler.timesteps[:-1]:
        x_t = scheduler.step(network(x_t, t.expand(2), None), t, x_t, generator=generator).prev_sample
    ours_generator = torch.Generator().manual_seed(3)
    ours = Ancestral(variance=variance).sample(
        denoiser(schedule, kind, clip),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(schedule, num_steps, spacing),
        noise=lambda draw: torch.randn(SHAPE, generator=ours_generator, dtype=torch.float64),
        final_step=final_step,
    )
    assert_agrees(ours, x_t, 1e-9)


@pytest.mark.parametrize(("kind", "clip", "spacing", "zero", "num_steps"), CASES)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(eta: float, kind: PredictionType, clip: bool, spacing: Spacing, zero: bool, num_steps: int) -> None:
    schedule = SCHEDULES[zero]
    options = {"clip_sample": clip, "timestep_spacing": spacing}
    scheduler = patched(DDIMScheduler(prediction_type=THEIR_NAME[kind], **options), schedule, num_steps)
    x_t = randn(1)
    for draw, t in enumerate(scheduler.timesteps, start=1):
        answer = network(x_t, t.expand(2), None)
        x_t = scheduler.step(
            answer, int(t), x_t, eta=eta, use_clipped_model_output=True, variance_noise=randn(100 + draw)
        ).prev_sample
    ours = DDIM(eta=eta).sample(
        denoiser(schedule, kind, clip),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(schedule, num_steps, spacing),
        noise=lambda draw: randn(100 + draw),
    )
    assert_agrees(ours, x_t, 1e-9)


@pytest.mark.parametrize(("kind", "clip", "spacing", "zero", "num_steps"), CASES)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # numpy's, of diffusers' set_timesteps
def test_dpm_solver_2m(
    algorithm: str, kind: PredictionType, clip: bool, spacing: Spacing, zero: bool, num_steps: int
) -> None:
    schedule = with_some_signal(SCHEDULES[zero])
    options = {"algorithm_type": algorithm, "timestep_spacing": spacing, "thresholding": clip, "sample_max_value": 1.0}
    scheduler = patched(DPMSolverMultistepScheduler(prediction_type=THEIR_NAME[kind], **options), schedule, num_steps)
    x_t = randn(1)
    for draw, t in enumerate(scheduler.timesteps, start=1):
        x_t = scheduler.step(network(x_t, t.expand(2), None), t, x_t, variance_noise=randn(100 + draw)).prev_sample
    # Their leading spacing divides the chain by one step more than ours.
    timesteps = scheduler.timesteps.tolist()[::-1]
    assert spacing == "leading" or timesteps == spaced_timesteps(schedule, num_steps, spacing)
    denoise = denoiser(schedule, kind, clip)
    sampler = DPMSolver2M() if algorithm == "dpmsolver++" else DPMSolver2MSDE()
    ours = sampler.sample(denoise, schedule, randn(1), None, timesteps=timesteps, noise=lambda draw: randn(100 + draw))
    assert_agrees(ours, x_t, 1e-5)


@pytest.mark.parametrize(("kind", "clip", "spacing", "zero", "num_steps"), CASES)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_common_form_of_dpm_solver_3m(
    kind: PredictionType, clip: bool, spacing: Spacing, zero: bool, num_steps: int
) -> None:
    schedule = with_some_signal(SCHEDULES[zero])
    options = {"timestep_spacing": spacing, "thresholding": clip, "sample_max_value": 1.0, "solver_order": 3}
    scheduler = patched(DPMSolverMultistepScheduler(prediction_type=THEIR_NAME[kind], **options), schedule, num_steps)
    x_t = randn(1)
    for t in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, t.expand(2), None), t, x_t).prev_sample
    denoise, timesteps = denoiser(schedule, kind, clip), scheduler.timesteps.tolist()[::-1]
    ours = DPMSolver3MCommon().sample(denoise, schedule, randn(1), None, timesteps=timesteps)
    assert_agrees(ours, x_t, 1e-5)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_ddpm_with_a_learned_variance(num_steps: int, name: Any, clip: bool) -> None:
    """At t = 0 diffusers' lower bound is log(1e-20) where ours is the second entry; no noise is added there."""
    schedule = make_schedule(ScheduleConfig(name=name))

    def answer(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return torch.cat((network(x_t, t, None), torch.sin(3 * x_t)), dim=1)

    scheduler = patched(
        DDPMScheduler(variance_type="learned_range", clip_sample=clip, timestep_spacing="linspace"), schedule, num_steps
    )
    x_t, generator = randn(1), torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        x_t = scheduler.step(answer(x_t, t.expand(2), None), t, x_t, generator=generator).prev_sample
    ours_generator = torch.Generator().manual_seed(3)
    ours = Ancestral(variance="learned_range").sample(
        NetworkDenoiser(network=answer, schedule=schedule, learned_variance=True, clip_x_0=clip),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(schedule, num_steps, "linspace"),
        noise=lambda draw: torch.randn(SHAPE, generator=ours_generator, dtype=torch.float64),
    )
    assert_agrees(ours, x_t, 1e-8)


def test_dynamic_thresholding() -> None:
    schedule = SCHEDULES[True]
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": torch.inf}
    scheduler = patched(
        DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", **options), schedule, 10
    )
    x_t = randn(1)
    for t in scheduler.timesteps:
        answer = network(x_t, t.expand(2), None)
        x_t = scheduler.step(answer, int(t), x_t, use_clipped_model_output=True).prev_sample
    ours = DDIM(eta=0.0).sample(
        NetworkDenoiser(network=network, schedule=schedule, prediction_type="v", dynamic_threshold=0.8),
        schedule,
        randn(1),
        None,
        timesteps=spaced_timesteps(schedule, 10, "trailing"),
    )
    assert_agrees(ours, x_t, 1e-9)
