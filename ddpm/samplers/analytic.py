"""The mean squared error of x_0_hat at every t, measured on data: what the analytic variance is made of.

    errors = x_0_errors(model, seed=..., sample_ids=..., x_0=..., label=...)     of one batch
    total = errors + another + ...                                              of all, in any grouping
    generate(..., x_0_error=x_0_error_table(total))

Each image is noised to a few t, one in each of equal parts of the chain, and the network is asked for x_0_hat; noise
and t are functions of (seed, sample id, term). Nothing is trained. The errors belong to the network as it is asked
here: without guidance, and with x_0_hat clipped or not.

Why not what the paper averages. Bao et al. measure E |eps_hat|^2 / D. For the best possible network the two quantities
give the same variance (see `analytic_variance`), since its error is uncorrelated with its answer. A trained network is
not the best possible: for it the error of x_0_hat gives the best variance around the mean that it predicts, which is
what is wanted. Where there is much noise it also has a far smaller standard error.

Source:
    Bao et al. 2022 (arXiv:2201.06503), section 3.1. Bao et al. 2022 (arXiv:2206.07309) for trained networks.
"""

import torch

from ddpm.model import DiffusionModel
from ddpm.noise import Stream, random_words, standard_normal
from ddpm.process.diffusion import q_sample
from ddpm.process.interpolation import Table
from ddpm.process.random_steps import timestep_in_stratum
from ddpm.shapes import Images, Labels, Steps
from ddpm.statistics.running_moments import RunningMoments


@torch.no_grad()
def x_0_errors(
    model: DiffusionModel,
    *,
    seed: int,
    sample_ids: Steps,
    x_0: Images,
    label: Labels | None,
    clip_x_0: bool = True,
    terms_per_image: int = 10,
) -> RunningMoments:
    """|x_0 - x_0_hat|^2 / D of some images at random t; what an image adds does not depend on its neighbours.

    Args:
        model: The model, its chain of length T.
        seed: Key of the noise and of random t, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), on the network's device.
        x_0: Clean images [B, C, H, W] in [-1, 1], float32 or float64.
        label: Class [B], same device, or None for an unconditional network.
        clip_x_0: Limit predicted images to [-1, 1], as the sampler will that uses the errors.
        terms_per_image: K, network evaluations per image, in [1, T]; with T every image is asked about at every t.

    Returns:
        Count, mean and scatter for each t [T]; results add up over batches.

    Raises:
        ValueError: If terms_per_image is out of range, x_0 has too few digits, or the network is in training mode or
            answers with another shape.
    """
    schedule, K = model.schedule, terms_per_image
    T = schedule.num_timesteps
    if not 1 <= K <= T:
        raise ValueError(f"terms_per_image: must be in [1, {T}], the trained steps, got {K}; 10 is a good start")
    denoise = model.denoiser(clip_x_0=clip_x_0)
    words = random_words(seed, Stream.EVAL_X_0_ERROR_T, sample_ids, 0, K)
    strata = torch.arange(K, device=words.device).expand_as(words)
    total = RunningMoments.from_samples(torch.zeros(0, T))
    for k, t in enumerate(timestep_in_stratum(T, strata, K, words).unbind(dim=1)):
        eps = standard_normal(seed, Stream.EVAL_X_0_ERROR_EPS, sample_ids, k, x_0.shape[1:], x_0.dtype)
        error = (x_0 - denoise(q_sample(schedule, x_0, t, eps), t, label).x_0_hat).double()
        total = total + RunningMoments.from_entries(t, error.square().mean(dim=(1, 2, 3)), T)
    return total


def x_0_error_table(errors: RunningMoments) -> Table:
    """The mean at every t, float64 [T]; where no image was asked, on the straight line between the nearest that were.

    Raises:
        ValueError: If there is no value at all.
    """
    known = errors.count.nonzero()[:, 0]
    if len(known) == 0:
        raise ValueError("errors: must hold a value, got none; measure some images first")
    t = torch.arange(len(errors.count))
    right = torch.searchsorted(known, t).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    gap = (known[right] - known[left]).clamp(min=1)
    share = ((t - known[left]) / gap.double()).clamp(0, 1)
    return torch.lerp(errors.mean[known[left]], errors.mean[known[right]], share)
