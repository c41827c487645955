"""Samplers, one method per file, and `generate`, which runs one of them with the noise of given sample ids.

A sampler is a plain function sampler(denoise, schedule, x_T, label, *, timesteps, noise, ...) -> x_0. It knows neither
seeds nor ids: noise comes in as a function of the draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddpm.denoiser import EpsDenoiser, Network
from ddpm.diffusion import Variance
from ddpm.noise import Stream, standard_normal
from ddpm.samplers.ancestral import ancestral_sample
from ddpm.samplers.ddim import ddim_sample
from ddpm.samplers.spacing import Spacing, spaced_timesteps
from ddpm.schedules import NoiseSchedule

__all__ = ["SamplerConfig", "Spacing", "ancestral_sample", "ddim_sample", "generate", "spaced_timesteps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How images are drawn from a network."""

    name: Literal["ancestral", "ddim"] = "ddim"
    """ancestral: Ho et al., best with many steps. ddim: Song et al., from deterministic to ancestral by eta."""
    num_steps: int = 50
    """Network evaluations per image, at most the number of trained steps."""
    eta: float = 1.0
    """ddim only: noise per step, from 0 (deterministic) to 1 (as much as ancestral sampling)."""
    variance: Variance = "fixed_small"
    """ancestral only: variance of a step, the posterior's (fixed_small) or beta (fixed_large)."""
    spacing: Spacing = "linspace"
    """Which trained steps are visited: linspace has both ends, leading has the first, trailing has the last."""
    clip_x_0: bool = True
    """Clip each predicted image to [-1, 1] before the step is taken."""

    def __post_init__(self) -> None:
        """Refuse impossible values, and options that the chosen sampler would ignore."""
        _check_choice("name", self.name, ("ancestral", "ddim"))
        _check_choice("variance", self.variance, ("fixed_small", "fixed_large"))
        _check_choice("spacing", self.spacing, ("leading", "linspace", "trailing"))
        if self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {self.num_steps}; 50 is a good start")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: must be in [0, 1], got {self.eta}; 0 is deterministic, 1 ancestral")
        if self.name == "ancestral" and self.eta != 1.0:
            raise ValueError(f"eta: is for ddim only, got {self.eta} with ancestral; leave it out or choose ddim")
        if self.name == "ddim" and self.variance != "fixed_small":
            raise ValueError(f"variance: is for ancestral only, got {self.variance} with ddim; use eta instead")


def generate(
    network: Network,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    label: Int[Tensor, " b"] | None,
    image_shape: Sequence[int],
) -> Float[Tensor, "b c h w"]:
    """Make the images of some sample ids; image i depends on its id and label, not on its neighbours in the batch.

    Args:
        network: network(x_t, t, label) -> eps_hat; a module must be in eval mode.
        schedule: The chain that the network was trained on.
        sampler: Which sampler, with which options.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), int64, on the network's device.
        label: Class [B], same device, or None for an unconditional network.
        image_shape: (C, H, W).

    Returns:
        x_0 float32 [B, C, H, W], clamped to [-1, 1], on sample_ids' device. NaN stays NaN.

    Raises:
        ValueError: If the sampler asks for more steps than were trained, the network is in training mode or answers
            with another shape, or seed or ids are out of range.
    """
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("network: must be in eval mode, got training mode; call network.eval() before sampling")
    timesteps = spaced_timesteps(schedule.num_timesteps, sampler.num_steps, sampler.spacing)
    denoise = EpsDenoiser(network=network, schedule=schedule, clip_x_0=sampler.clip_x_0)

    def noise(draw: int) -> Tensor:
        return standard_normal(seed, Stream.STEP, sample_ids, draw, image_shape)

    with torch.no_grad():
        x_T = standard_normal(seed, Stream.X_T, sample_ids, 0, image_shape)
        match sampler.name:
            case "ancestral":
                x_0 = ancestral_sample(
                    denoise, schedule, x_T, label, timesteps=timesteps, noise=noise, variance=sampler.variance
                )
            case "ddim":
                x_0 = ddim_sample(denoise, schedule, x_T, label, timesteps=timesteps, noise=noise, eta=sampler.eta)
        return x_0.clamp(-1, 1)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: must be {' or '.join(choices)}, got {value!r}; choose one of them")
