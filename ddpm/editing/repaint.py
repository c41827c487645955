"""Inpainting: images whose known pixels are given and whose other pixels are drawn to go with them.

After every step the known pixels are replaced by given ones noised to the same step. A step knows only what the one
before looked like, so that known and new pixels would not fit together; the walk therefore jumps back to more noise
several times and takes the same steps again (resampling), each time with both parts in view.

Known and new pixels meet almost without noise only if the chain visits several steps with little of it: of the
spacings, quadratic suits it best. On a Gaussian a mean misses 3 % of the way with it after 20 walks of 50 steps, 14 %
with linspace.

A *level* counts the steps that are left: level 0 is x_0, level n is x_t of the chain's entry n - 1.

Source:
    Lugmayr et al. 2022 (arXiv:2201.09865), RePaint, Algorithm 1 and section 4.2. A jump back is one draw from q here
    instead of jump_length of them, which has the same distribution.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ddpm.model import DiffusionModel
from ddpm.noise import Stream, standard_normal
from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.generate import visited_entries
from ddpm.samplers.registry import SAMPLERS
from ddpm.samplers.sampler import Sampler, SingleStepSampler
from ddpm.shapes import Images, Labels


def repaint(
    model: DiffusionModel,
    sampler: Sampler,
    x_0: Images,
    known: Bool[Tensor, "#b #c h w"],
    label: Labels | None,
    *,
    jump_length: int,
    num_resamples: int,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    guide: DiffusionModel | None = None,
    x_0_error: Table | None = None,
) -> Images:
    """Draw the unknown pixels of given images.

    Args:
        model: The model.
        sampler: One whose steps look at nothing but x_t, with which steps (quadratic ones are best).
        x_0: Given images [B, C, H, W] in [-1, 1]; unknown pixels may hold any number.
        known: Which pixels to keep, [B or 1, C or 1, H, W].
        label: Class [B], or None.
        jump_length: Steps of a jump back.
        num_resamples: How often each stretch of that length is walked; 1 never jumps back.
        seed: Key of the noise.
        sample_ids: Ids [B].
        guide: As in generate.
        x_0_error: As in generate.

    Returns:
        Images [B, C, H, W] in [-1, 1], equal to x_0 where known.

    Raises:
        ValueError: If the sampler is another one, as repaint_sample, or as the sampler's step.
    """
    sampler, schedule, shape = single_step_sampler(sampler), model.schedule, x_0.shape[1:]
    timesteps = sampler.timesteps(schedule)
    with torch.no_grad():
        return repaint_sample(
            sampler.denoiser(model, guide),
            schedule,
            standard_normal(seed, Stream.X_T, sample_ids, 0, shape, x_0.dtype),
            label,
            sampler=sampler,
            x_0=x_0,
            known=known,
            timesteps=timesteps,
            noise=lambda draw: standard_normal(seed, sampler.noise_stream, sample_ids, draw, shape, x_0.dtype),
            known_noise=lambda draw: standard_normal(seed, Stream.INPAINT, sample_ids, draw, shape, x_0.dtype),
            jump_length=jump_length,
            num_resamples=num_resamples,
            x_0_error=visited_entries(x_0_error, schedule, timesteps),
        ).clamp(-1, 1)


def repaint_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    sampler: SingleStepSampler,
    x_0: Images,
    known: Bool[Tensor, "#b #c h w"],
    timesteps: Sequence[int] | Sequence[float],
    noise: Callable[[int], Tensor],
    known_noise: Callable[[int], Tensor],
    jump_length: int,
    num_resamples: int,
    x_0_error: Table | None = None,
) -> Images:
    """RePaint over a subset of the training chain, with noise that comes in as a function of the draw.

    Args:
        denoise: Predicts x_0_hat and eps_hat.
        schedule: The training chain.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        sampler: Whose steps are taken.
        x_0: Given images, same shape.
        known: Which pixels to keep, [B or 1, C or 1, H, W].
        timesteps: Steps of the training chain to visit, ascending.
        noise: noise(draw) gives the standard normal noise of a move, x_T's shape; draw counts all moves, down and
            back, from 1. It is not called for a move to level 0.
        known_noise: The same for the known pixels after a move down.
        jump_length: Steps of a jump back.
        num_resamples: How often each stretch of that length is walked.
        x_0_error: E |x_0 - x_0_hat|^2 / D at each of timesteps [T], where the sampler needs it.

    Returns:
        x_0 [B, C, H, W], equal to the given one where known.

    Raises:
        ValueError: If jump_length or num_resamples is below 1, or as the sampler's step.

    Source:
        Lugmayr et al. 2022 (arXiv:2201.09865), Algorithm 1 and Eq. 8.
    """
    chain = schedule.respace(timesteps)
    path = resampling_path(chain.num_timesteps, jump_length, num_resamples)
    x_t = x_T
    for draw, (level, next_level) in enumerate(pairwise(path), start=1):
        eps = noise(draw) if next_level > 0 else torch.zeros_like(x_t)
        if next_level > level:
            kept = float(chain.alpha_bar[next_level - 1] / chain.alpha_bar[level - 1])
            x_t = kept**0.5 * x_t + (1 - kept) ** 0.5 * eps
            continue
        t = torch.full((len(x_t),), level - 1)
        x_t = sampler.step(chain, denoise, x_t, t, label, eps=eps, x_0_error=x_0_error)
        given = x_0
        if next_level > 0:
            alpha_bar = float(chain.alpha_bar_prev[level - 1])
            given = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * known_noise(draw)
        x_t = torch.where(known, given, x_t)
    return x_t


def resampling_path(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """The levels that RePaint visits, from num_steps to 0: one down per step, jump_length up per jump back.

    Arriving for the first num_resamples - 1 times at level 1, 1 + jump_length, 1 + 2 jump_length, ..., it jumps back if
    the chain is long enough. The least noisy of these is where it matters most: there known and new pixels meet almost
    without noise. x_0 itself is never noised again, as in Algorithm 1.

    Args:
        num_steps: Steps of the chain.
        jump_length: Levels of a jump back, at least 1; longer than the chain: no jumps.
        num_resamples: How often each stretch is walked, at least 1.

    Raises:
        ValueError: If jump_length or num_resamples is below 1.
    """
    for name, value in (("jump_length", jump_length), ("num_resamples", num_resamples)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}; Lugmayr et al. take 10")
    jumps_left = dict.fromkeys(range(1, num_steps - jump_length + 1, jump_length), num_resamples - 1)
    path = [num_steps]
    while path[-1] > 0:
        level = path[-1] - 1
        path.append(level)
        if jumps_left.get(level, 0) > 0:
            jumps_left[level] -= 1
            path.append(level + jump_length)
    return path


def num_repaint_evaluations(num_steps: int, jump_length: int, num_resamples: int) -> int:
    """Calls of the denoiser per batch of images; errors as resampling_path."""
    return sum(there < here for here, there in pairwise(resampling_path(num_steps, jump_length, num_resamples)))


def single_step_sampler(sampler: Sampler) -> SingleStepSampler:
    """The sampler, if RePaint can walk with it: if its steps look at nothing but x_t.

    Raises:
        ValueError: If it is another one.
    """
    if not isinstance(sampler, SingleStepSampler):
        able = [name for name, kind in SAMPLERS.items() if issubclass(kind, SingleStepSampler)]
        raise ValueError(f"name: inpainting walks with {' or '.join(able)}, got {sampler.name}; choose one of them")
    return sampler
