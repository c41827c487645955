"""Samplers, one method per file, and `generate`, which runs one of them with the noise of given sample ids.

A sampler is a plain function sampler(denoise, schedule, x_T, label, *, timesteps, noise, ...) -> x_0. It knows neither
seeds nor ids: noise comes in as a function of the draw.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddpm.denoiser import Network, NetworkDenoiser, PredictionType
from ddpm.guidance import GuidedNetwork
from ddpm.noise import Stream, standard_normal
from ddpm.samplers.ancestral import ancestral_sample
from ddpm.samplers.config import SamplerConfig, SamplerName
from ddpm.samplers.ddim import ddim_invert, ddim_sample
from ddpm.samplers.dpm_solver import dpm_solver_2m_sample, dpm_solver_2m_sde_sample
from ddpm.samplers.heun import heun_sample, num_corrections
from ddpm.samplers.spacing import Spacing, continuous_timesteps, spaced_timesteps
from ddpm.schedules import NoiseSchedule

__all__ = [
    "SamplerConfig",
    "SamplerName",
    "Spacing",
    "ancestral_sample",
    "continuous_timesteps",
    "ddim_invert",
    "ddim_sample",
    "dpm_solver_2m_sample",
    "dpm_solver_2m_sde_sample",
    "generate",
    "heun_sample",
    "num_evaluations",
    "spaced_timesteps",
]


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
        null_label: The label that means "no label"; guidance needs it.

    Returns:
        x_0 float32 [B, C, H, W], clamped to [-1, 1], on sample_ids' device. NaN stays NaN.

    Raises:
        ValueError: If the sampler asks for more steps than were trained, for guidance without labels or for a variance
            that is not predicted, the network is in training mode or answers with another shape, or seed or ids are
            out of range.
    """
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("network: must be in eval mode, got training mode; call network.eval() before sampling")
    timesteps = spaced_timesteps(schedule, sampler.num_steps, sampler.spacing)
    denoise = NetworkDenoiser(
        network=_guided(network, schedule, sampler, null_label),
        schedule=schedule,
        prediction_type=prediction_type,
        learned_variance=learned_variance,
        clip_x_0=sampler.clip_x_0,
        dynamic_threshold=sampler.dynamic_threshold,
    )

    def noise(draw: int) -> Tensor:
        return standard_normal(seed, Stream.STEP, sample_ids, draw, image_shape)

    def churn_noise(draw: int) -> Tensor:
        return standard_normal(seed, Stream.CHURN, sample_ids, draw, image_shape)

    with torch.no_grad():
        x_T = standard_normal(seed, Stream.X_T, sample_ids, 0, image_shape)
        match sampler.name:
            case "ancestral":
                x_0 = ancestral_sample(
                    denoise, schedule, x_T, label, timesteps=timesteps, noise=noise, variance=sampler.variance
                )
            case "ddim":
                x_0 = ddim_sample(denoise, schedule, x_T, label, timesteps=timesteps, noise=noise, eta=sampler.eta)
            case "dpm_solver_2m":
                x_0 = dpm_solver_2m_sample(denoise, schedule, x_T, label, timesteps=timesteps)
            case "dpm_solver_2m_sde":
                x_0 = dpm_solver_2m_sde_sample(denoise, schedule, x_T, label, timesteps=timesteps, noise=noise)
            case _:  # heun: the config knows no other
                x_0 = heun_sample(
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
        return x_0.clamp(-1, 1)


def num_evaluations(schedule: NoiseSchedule, sampler: SamplerConfig) -> int:
    """Calls of the network per batch of images; where guidance is on, each is with a batch twice as large.

    Raises:
        ValueError: If the sampler asks for more steps than were trained.
    """
    timesteps = spaced_timesteps(schedule, sampler.num_steps, sampler.spacing)
    return len(timesteps) + (num_corrections(schedule, timesteps) if sampler.name == "heun" else 0)


def _guided(network: Network, schedule: NoiseSchedule, sampler: SamplerConfig, null_label: int | None) -> Network:
    """The network, with guidance if the sampler has it."""
    if sampler.guidance_scale == 1.0:
        return network
    if null_label is None:
        raise ValueError(
            f"guidance_scale: needs a network trained with a null label, got {sampler.guidance_scale} without; set it "
            "to 1, or train with label_drop"
        )
    return GuidedNetwork(
        network=network,
        schedule=schedule,
        null_label=null_label,
        scale=sampler.guidance_scale,
        interval=sampler.guidance_interval,
        rescale=sampler.guidance_rescale,
    )
