"""Samplers, one method per file, and `generate`, which runs one of them with the noise of given sample ids.

A sampler is a plain function sampler(denoise, schedule, x_T, label, *, timesteps, noise, ...) -> x_0. It knows neither
seeds nor ids: noise comes in as a function of the draw.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddpm.noise import Stream, standard_normal
from ddpm.process.denoiser import Denoiser, Network, NetworkDenoiser
from ddpm.process.guidance import Guide, GuidedNetwork
from ddpm.process.interpolation import Table
from ddpm.process.prediction import PredictionType
from ddpm.process.schedules import NoiseSchedule
from ddpm.process.spacing import spaced_timesteps
from ddpm.samplers.ancestral import ancestral_sample
from ddpm.samplers.config import SamplerConfig
from ddpm.samplers.ddim import ddim_sample
from ddpm.samplers.dpm_solver import dpm_solver_2m_sample, dpm_solver_2m_sde_sample
from ddpm.samplers.dpm_solver_3m import dpm_solver_3m_common_sample, dpm_solver_3m_sample
from ddpm.samplers.heun import heun_sample, num_corrections
from ddpm.shapes import Images, Labels


def generate(
    network: Network,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    label: Int[Tensor, " b"] | None,
    image_shape: Sequence[int],
    prediction_type: PredictionType = "eps",
    learned_variance: bool = False,
    null_label: int | None = None,
    guide: Guide | None = None,
    x_0_error: Tensor | None = None,
) -> Float[Tensor, "b c h w"]:
    """Make the images of some sample ids; image i depends on its id and label, not on its neighbours in the batch.

    Args:
        network: network(x_t, t, label) -> prediction; a module must be in eval mode.
        schedule: The chain that the network was trained on.
        sampler: Which sampler, with which options.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), int64, on the network's device.
        label: Class [B], same device, or None for an unconditional network.
        image_shape: (C, H, W).
        prediction_type: What the network predicts.
        learned_variance: The network answers with 2C channels, the second half for the variance of a step.
        null_label: The label that means "no label"; guidance without a guide needs it.
        guide: A second, weaker network to lead away from (autoguidance), instead of leading away from "no label".
        x_0_error: What x_0_error_table gave for this network, float64 [T]; ancestral sampling with
            variance = analytic needs it, no other sampler reads it.

    Returns:
        x_0 float32 [B, C, H, W], clamped to [-1, 1], on sample_ids' device. NaN stays NaN.

    Raises:
        ValueError: If the sampler asks for more steps than were trained, for guidance without labels or for a variance
            that is not predicted, the guide was trained on another schedule or would have no effect, a network is in
            training mode or answers with another shape, or seed or ids are out of range.
    """
    denoise = sampling_denoiser(
        network,
        schedule,
        sampler,
        prediction_type=prediction_type,
        learned_variance=learned_variance,
        null_label=null_label,
        guide=guide,
    )
    with torch.no_grad():
        x_T = standard_normal(seed, Stream.X_T, sample_ids, 0, image_shape)
        x_0 = run_sampler(
            denoise,
            schedule,
            sampler,
            x_T,
            label,
            seed=seed,
            sample_ids=sample_ids,
            x_0_error=x_0_error,
        )
        return x_0.clamp(-1, 1)


def sampling_denoiser(
    network: Network,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    *,
    prediction_type: PredictionType = "eps",
    learned_variance: bool = False,
    null_label: int | None = None,
    guide: Guide | None = None,
) -> NetworkDenoiser:
    """The network as a sampler's options say: guided and limited. Arguments and errors as generate."""
    for name, module in (("network", network), ("guide", guide and guide.network)):
        if isinstance(module, nn.Module) and module.training:
            raise ValueError(f"{name}: must be in eval mode, got training mode; call {name}.eval() before sampling")
    if sampler.guidance_scale != 1.0:
        network = GuidedNetwork(
            network=network,
            schedule=schedule,
            null_label=null_label,
            guide=guide,
            prediction_type=prediction_type,
            scale=sampler.guidance_scale,
            interval=sampler.guidance_interval,
            rescale=sampler.guidance_rescale,
        )
    elif guide is not None:
        raise ValueError("guide: has no effect where guidance_scale is 1, got one; raise the scale or leave it out")
    return NetworkDenoiser(
        network=network,
        schedule=schedule,
        prediction_type=prediction_type,
        learned_variance=learned_variance,
        clip_x_0=sampler.clip_x_0,
        dynamic_threshold=sampler.dynamic_threshold,
    )


def run_sampler(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    x_T: Images,
    label: Labels | None,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    num_steps: int | None = None,
    x_0_error: Table | None = None,
) -> Images:
    """Walk a sampler's steps with the noise of some sample ids.

    Args:
        denoise: Predicts x_0_hat and eps_hat.
        schedule: The training chain.
        sampler: Which sampler; guidance and limits are the denoiser's.
        x_T: Where to start [B, C, H, W]: noise, or images noised to the last of the steps that are walked.
        label: Class [B], or None.
        seed: Key of the noise of the steps.
        sample_ids: Ids [B].
        num_steps: How many of the sampler's steps to walk, the least noisy ones; None walks them all.
        x_0_error: As in generate.

    Returns:
        x_0 [B, C, H, W].

    Raises:
        ValueError: If the sampler asks for more steps than were trained, or a variance that is not predicted.
    """
    timesteps = spaced_timesteps(schedule, sampler.num_steps, sampler.spacing)[:num_steps]

    def noise(draw: int) -> Tensor:
        return standard_normal(seed, Stream.STEP, sample_ids, draw, x_T.shape[1:], x_T.dtype)

    def churn_noise(draw: int) -> Tensor:
        return standard_normal(seed, Stream.CHURN, sample_ids, draw, x_T.shape[1:], x_T.dtype)

    match sampler.name:
        case "ancestral":
            return ancestral_sample(
                denoise,
                schedule,
                x_T,
                label,
                timesteps=timesteps,
                noise=noise,
                variance=sampler.variance,
                x_0_error=visited_entries(x_0_error, schedule, timesteps),
            )
        case "ddim":
            return ddim_sample(denoise, schedule, x_T, label, timesteps=timesteps, noise=noise, eta=sampler.eta)
        case "dpm_solver_2m":
            return dpm_solver_2m_sample(denoise, schedule, x_T, label, timesteps=timesteps)
        case "dpm_solver_2m_sde":
            return dpm_solver_2m_sde_sample(denoise, schedule, x_T, label, timesteps=timesteps, noise=noise)
        case "dpm_solver_3m":
            return dpm_solver_3m_sample(denoise, schedule, x_T, label, timesteps=timesteps)
        case "dpm_solver_3m_common":
            return dpm_solver_3m_common_sample(denoise, schedule, x_T, label, timesteps=timesteps)
        case _:  # heun: the config knows no other
            return heun_sample(
                denoise,
                schedule,
                x_T,
                label,
                timesteps=timesteps,
                noise=churn_noise,
                churn=sampler.churn,
                churn_interval=sampler.churn_interval,
                churn_noise=sampler.churn_noise,
            )


def num_evaluations(schedule: NoiseSchedule, sampler: SamplerConfig, num_steps: int | None = None) -> int:
    """Calls of the denoiser per batch of images; where guidance is on, each evaluates every image twice.

    Args:
        schedule: The training chain.
        sampler: Which sampler.
        num_steps: How many of its steps are walked, the least noisy ones; None walks them all.

    Raises:
        ValueError: If the sampler asks for more steps than were trained.
    """
    timesteps = spaced_timesteps(schedule, sampler.num_steps, sampler.spacing)[:num_steps]
    return len(timesteps) + (num_corrections(schedule, timesteps) if sampler.name == "heun" and timesteps else 0)


def visited_entries(table: Table | None, schedule: NoiseSchedule, timesteps: list[int]) -> Tensor | None:
    """The entries of a table of the training chain that belong to the visited steps."""
    if table is not None and len(table) != schedule.num_timesteps:
        raise ValueError(
            f"x_0_error: must have one entry per trained step, {schedule.num_timesteps}, got {len(table)}; "
            "measure this model"
        )
    return None if table is None else table[timesteps]
