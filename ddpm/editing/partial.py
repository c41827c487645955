"""Partial diffusion: noise a given image to some step and denoise it from there, so that its coarse features stay.

The noise is that from which the sample id's image would be made from nothing, and so are the draws of the steps: at
full strength nothing of the image is left and `generate`'s own image comes out.

Source:
    Meng et al. 2022 (arXiv:2108.01073), SDEdit; its t_0 is our strength.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from ddpm.model import DiffusionModel
from ddpm.noise import Stream, standard_normal
from ddpm.process.diffusion import q_sample
from ddpm.process.interpolation import Table
from ddpm.samplers.generate import run_sampler
from ddpm.samplers.sampler import Sampler
from ddpm.shapes import Images, Labels


def partial_diffusion(
    model: DiffusionModel,
    sampler: Sampler,
    x_0: Images,
    label: Labels | None,
    *,
    strength: float,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    guide: DiffusionModel | None = None,
    x_0_error: Table | None = None,
) -> Images:
    """Draw images that share with the given ones what the noise of some step leaves of them.

    Args:
        model: The model.
        sampler: Which sampler, with which options.
        x_0: Given images [B, C, H, W] in [-1, 1].
        label: Class [B] to denoise towards, or None.
        strength: Share of the sampler's steps to take, in [0, 1], rounded up: 0 returns x_0, 1 ignores it.
        seed: Key of the noise.
        sample_ids: Ids [B].
        guide: As in generate.
        x_0_error: As in generate.

    Returns:
        Images [B, C, H, W] in [-1, 1].

    Raises:
        ValueError: If strength is outside [0, 1], or as generate.

    Source:
        Meng et al. 2022 (arXiv:2108.01073), section 3.
    """
    num_steps = num_partial_steps(sampler.num_steps, strength)
    if num_steps == 0:
        return x_0
    denoise, schedule = sampler.denoiser(model, guide), model.schedule
    timesteps = sampler.timesteps(schedule)
    eps = standard_normal(seed, Stream.X_T, sample_ids, 0, x_0.shape[1:], x_0.dtype)
    if num_steps < len(timesteps):
        t = torch.full((len(x_0),), timesteps[num_steps - 1])
        x_t = q_sample(schedule, x_0, t, eps)
    else:
        x_t = eps  # the chain's last step leaves a trace of the image, which a sampler does not start from
    with torch.no_grad():
        made = run_sampler(
            denoise,
            schedule,
            sampler,
            x_t,
            label,
            seed=seed,
            sample_ids=sample_ids,
            num_steps=num_steps,
            x_0_error=x_0_error,
        )
        return made.clamp(-1, 1)


def num_partial_steps(num_steps: int, strength: float) -> int:
    """How many of a sampler's steps a strength stands for: at least one unless it is 0.

    Raises:
        ValueError: If strength is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength: must be in [0, 1], got {strength}; 0 keeps the image, 1 replaces it")
    return min(math.ceil(strength * num_steps - 1e-9), num_steps)  # 0.07 * 100 is a little more than 7
