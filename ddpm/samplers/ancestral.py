"""Ancestral sampling: walk the reverse process step by step (Ho et al., Algorithm 2), over all steps or a subset."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm.process.denoiser import Denoiser
from ddpm.process.diffusion import Variance, p_mean_variance
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.shapes import Images, Labels, Steps


def p_sample(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_t: Images,
    t: Steps,
    label: Labels | None,
    *,
    variance: Variance,
    eps: Images,
    x_0_error: Table | None = None,
) -> Images:
    """Draw x_{t-1} from p(x_{t-1} | x_t): mean + sqrt(variance) eps, and the mean alone at t = 0.

    Args:
        schedule: The chain that is walked.
        denoise: Predicts x_0_hat.
        x_t: Noised images [B, C, H, W].
        t: Index [B] into schedule.
        label: Class [B], or None.
        variance: Which variance the step has.
        eps: Standard normal noise, same shape as x_t; not used where t = 0.
        x_0_error: E |x_0 - x_0_hat|^2 / D at every entry of schedule [T]; only variance = analytic reads it.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 2, lines 3-4.
    """
    step = p_mean_variance(schedule, denoise, x_t, t, label, variance=variance, x_0_error=x_0_error)
    noisy = (t > 0).to(x_t)[:, None, None, None]
    return step.mean + noisy * step.variance.sqrt() * eps


def p_sample_loop(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_T: Images,
    label: Labels | None,
    *,
    variance: Variance,
    noise: Callable[[int], Tensor],
    x_0_error: Table | None = None,
    final_step: bool = True,
) -> Images:
    """Draw x_0 by walking every step of a chain.

    Args:
        schedule: The chain that is walked.
        denoise: Predicts x_0_hat.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        variance: Which variance the steps have.
        noise: noise(draw) gives the standard normal noise of a step, x_T's shape; draw counts the steps from 1.
        x_0_error: As in p_sample.
        final_step: Take the last step, which has no noise, from the chain's first entry to x_0; if not, x_t of that
            entry is returned.

    Returns:
        x_0 [B, C, H, W].

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 2.
    """
    x_t = x_T
    for draw, i in enumerate(reversed(range(0 if final_step else 1, schedule.num_timesteps)), start=1):
        t = torch.full((len(x_t),), i, device=x_t.device)
        eps = noise(draw) if i > 0 else torch.zeros_like(x_t)
        x_t = p_sample(schedule, denoise, x_t, t, label, variance=variance, eps=eps, x_0_error=x_0_error)
    return x_t


def ancestral_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    timesteps: Sequence[int] | Sequence[float],
    noise: Callable[[int], Tensor],
    variance: Variance,
    x_0_error: Table | None = None,
    final_step: bool = True,
) -> Images:
    """Ancestral sampling over a subset of the training chain's steps (ascending); otherwise as p_sample_loop.

    Args:
        denoise: Predicts x_0_hat.
        schedule: The training chain.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        timesteps: Steps of the training chain to visit, ascending; T of them.
        noise: As in p_sample_loop.
        variance: Which variance the steps have.
        x_0_error: E |x_0 - x_0_hat|^2 / D at each of timesteps [T]; only variance = analytic reads it.
        final_step: Go on from timesteps[0] to x_0.

    Source:
        Nichol and Dhariwal 2021 (arXiv:2102.09672), section 4.
    """
    chain = schedule.respace(timesteps)
    return p_sample_loop(
        chain,
        denoise,
        x_T,
        label,
        variance=variance,
        noise=noise,
        x_0_error=x_0_error,
        final_step=final_step,
    )
