"""Interpolation between two images: both are walked up to noise, the noises are mixed on the sphere and walked down.

Noise of D pixels lies close to a sphere of radius sqrt(D). A straight line between two noises leaves it (halfway the
norm is 1/sqrt(2) of theirs), and the network was never shown what is there; an arc does not.

Source:
    Song et al. 2021 (arXiv:2010.02502), section 5.3 and appendix D. Shoemake 1985 for slerp.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddpm.model import DiffusionModel
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.ddim import ddim_invert
from ddpm.samplers.generate import run_sampler
from ddpm.samplers.sampler import Sampler
from ddpm.shapes import Images, Labels


def slerp(first: Images, second: Images, weight: Float[Tensor, " b"]) -> Images:
    """The image on the arc from first to second, by each image's angle between them as vectors.

    Args:
        first: Noises [B, C, H, W], or latents of images.
        second: Same shape.
        weight: How far along the arc [B], in [0, 1]: 0 is first, 1 second.

    Returns:
        [B, C, H, W]; a straight line between vectors that are parallel.

    Source:
        Shoemake 1985. Song et al. 2021 (arXiv:2010.02502), appendix D.5.
    """
    a, b = first.flatten(1).to(torch.float64), second.flatten(1).to(torch.float64)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    angle, weight = cosine.clamp(-1, 1).acos(), weight.to(torch.float64)
    is_arc = angle.sin() > 1e-6
    sine = torch.where(is_arc, angle.sin(), 1.0)
    of_first = torch.where(is_arc, ((1 - weight) * angle).sin() / sine, 1 - weight)
    of_second = torch.where(is_arc, (weight * angle).sin() / sine, weight)
    return (of_first[:, None] * a + of_second[:, None] * b).to(first.dtype).reshape(first.shape)


def invert_images(
    model: DiffusionModel,
    sampler: Sampler,
    x_0: Images,
    label: Labels | None,
    guide: DiffusionModel | None = None,
) -> Images:
    """The latents of images: x_T from which deterministic samplers make them, nearly. What limits x_0_hat is off.

    Args:
        model: The model.
        sampler: Whose steps are walked upwards, by DDIM.
        x_0: Images [B, C, H, W] in [-1, 1].
        label: Class [B], or None.
        guide: As in generate.

    Returns:
        Latents [B, C, H, W].
    """
    unlimited = dataclasses.replace(sampler.denoiser(model, guide), clip_x_0=False, dynamic_threshold=None)
    with torch.no_grad():
        return ddim_invert(unlimited, model.schedule, x_0, label, timesteps=sampler.timesteps(model.schedule))


def interpolate_images(
    model: DiffusionModel,
    sampler: Sampler,
    first: Images,
    second: Images,
    weight: Float[Tensor, " b"],
    *,
    first_label: Labels | None,
    second_label: Labels | None,
    sample_ids: Int[Tensor, " b"],
    guide: DiffusionModel | None = None,
) -> Images:
    """Images between pairs of images.

    Args:
        model: The model.
        sampler: A deterministic one: ddim with eta 0, or a solver without noise.
        first: Images [B, C, H, W] in [-1, 1].
        second: Same shape.
        weight: How far from first to second [B], in [0, 1]. At 0 and 1 the images come back, but for the error of the
            walk up and down, which falls with the number of steps.
        first_label: Class of first [B], or None.
        second_label: Class of second [B]; between two classes, the nearer image's is walked down with.
        sample_ids: Ids [B]; a deterministic sampler draws nothing with them.
        guide: As in generate.

    Returns:
        Images [B, C, H, W] in [-1, 1].

    Raises:
        ValueError: If the sampler is not deterministic, or one label is given and the other not.

    Source:
        Song et al. 2021 (arXiv:2010.02502), section 5.3.
    """
    check_deterministic(sampler)
    label = None
    if first_label is not None and second_label is not None:
        label = torch.where(weight <= 0.5, first_label, second_label)
    elif first_label is not None or second_label is not None:
        raise ValueError("second_label: must be given if first_label is, got one of them; give both or neither")
    latents = slerp(
        invert_images(model, sampler, first, first_label, guide),
        invert_images(model, sampler, second, second_label, guide),
        weight,
    )
    denoise = sampler.denoiser(model, guide)
    with torch.no_grad():
        made = run_sampler(denoise, model.schedule, sampler, latents, label, seed=0, sample_ids=sample_ids)
        return made.clamp(-1, 1)


def num_interpolation_evaluations(schedule: NoiseSchedule, sampler: Sampler) -> int:
    """Calls of the denoiser per batch of images: both are walked up, one is walked down."""
    return 2 * sampler.num_steps + sampler.num_evaluations(schedule)


def check_deterministic(sampler: Sampler) -> None:
    """Refuse samplers with noise of their own: they do not come back to where an inversion started.

    Raises:
        ValueError: If the sampler draws noise after x_T.
    """
    if not sampler.is_deterministic:
        raise ValueError(
            f"name: interpolation needs a sampler without noise of its own, got {sampler.name} with noise, which does "
            "not lead back to the images; choose ddim with eta 0, or a solver without noise"
        )
