"""The terms of the variational bound, each per sample: the caller weights and averages.

The bound on -log p(x_0) is L_T + sum of L_{t-1} + L_0 (Ho et al., Eq. 5). A term is given in bits per dimension: nats,
divided by C H W and by log 2. Terms are computed in float64 from whatever the network computes in, because L_T is
smaller than float32's rounding of the numbers that it is the difference of.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm.likelihood.decoder import discretised_log_likelihood
from ddpm.process.denoiser import Denoiser
from ddpm.process.diffusion import GaussianStep, Variance, p_mean_variance, q_sample
from ddpm.process.pixels import NumLevels
from ddpm.process.schedules import NoiseSchedule, gather
from ddpm.shapes import Images, Labels, Steps, check_precision

PerSampleBits = Float64[Tensor, " b"]


def gaussian_kl(
    mean_difference: Float[Tensor, "*n"], log_variance_q: Float[Tensor, "*#n"], log_variance_p: Float[Tensor, "*#n"]
) -> Float[Tensor, "*n"]:
    """KL(q || p) of two Gaussians, per element, in nats.

    Args:
        mean_difference: Mean of q minus mean of p.
        log_variance_q: Logarithm of q's variance.
        log_variance_p: Logarithm of p's variance.

    Raises:
        ValueError: If one of them is neither float32 nor float64.
    """
    check_precision("mean_difference", mean_difference)
    check_precision("log_variance_q", log_variance_q)
    check_precision("log_variance_p", log_variance_p)
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.expm1(ratio) - ratio + mean_difference.square() * torch.exp(-log_variance_p))


def prior_loss(schedule: NoiseSchedule, x_0: Images) -> PerSampleBits:
    """L_T = KL(q(x_T | x_0) || N(0, I)): what is left of the images when the forward process ends.

    Args:
        schedule: The chain, the training chain or a respaced one.
        x_0: Clean images [B, C, H, W] in [-1, 1].

    Returns:
        Bits per dimension [B]; it has no parameters and is exact, not an estimate.

    Raises:
        ValueError: If x_0 is neither float32 nor float64.

    Source:
        Ho et al. 2020, Eq. 5, first term.
    """
    check_precision("x_0", x_0)
    alpha_bar = schedule.alpha_bar[-1].to(x_0.device)
    return _bits_per_dim(gaussian_kl(alpha_bar.sqrt() * x_0.to(torch.float64), torch.log1p(-alpha_bar), alpha_bar * 0))


def bound_loss(
    schedule: NoiseSchedule, x_0: Images, t: Steps, step: GaussianStep, num_levels: NumLevels = 256
) -> PerSampleBits:
    """The term of the bound that belongs to step t: L_{t-1} where t > 0, L_0 where t = 0.

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); L_0 = -log p(x_0 | x_1) by the discretised decoder.

    Args:
        schedule: The chain that step belongs to.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        t: Index [B] into schedule.
        step: p(x_{t-1} | x_t) from p_mean_variance, for x_t noised from x_0.
        num_levels: Values of a pixel of the images, which the decoder tells apart.

    Returns:
        Bits per dimension [B], with gradient to x_0_hat and to a learned variance.

    Raises:
        ValueError: If x_0 or what step holds is neither float32 nor float64.

    Source:
        Ho et al. 2020, Eq. 5 and 13.
    """
    for name, tensor in (("x_0", x_0), ("x_0_hat", step.x_0_hat), ("log_variance", step.log_variance)):
        check_precision(name, tensor)
    x_0, x_0_hat, log_variance = (tensor.to(torch.float64) for tensor in (x_0, step.x_0_hat, step.log_variance))
    # Both means hold the same multiple of x_t: left out, it cannot cancel, nor bury the difference in its rounding.
    mean_difference = gather(schedule.posterior_mean_coef_x_0, t, x_0) * (x_0 - x_0_hat)
    kl = gaussian_kl(mean_difference, gather(schedule.posterior_log_variance, t, x_0), log_variance)
    decoder = -discretised_log_likelihood(x_0, x_0_hat, log_variance, num_levels)
    return _bits_per_dim(torch.where((t == 0)[:, None, None, None], decoder, kl))


def bound_term(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_0: Images,
    t: Steps,
    label: Labels | None,
    *,
    variance: Variance,
    eps: Images,
    num_levels: NumLevels = 256,
) -> PerSampleBits:
    """bound_loss of a denoiser at the x_t that eps makes of x_0: an unbiased estimate of the term's expectation.

    Args:
        schedule: The chain, the training chain or a respaced one.
        denoise: Predicts x_0_hat; whether that is clipped to [-1, 1] is the denoiser's doing, and part of the model.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        t: Index [B] into schedule.
        label: Class [B], or None.
        variance: Which variance p(x_{t-1} | x_t) has.
        eps: Standard normal noise, same shape as x_0.
        num_levels: As in bound_loss.

    Returns:
        Bits per dimension [B].
    """
    x_t = q_sample(schedule, x_0, t, eps)
    step = p_mean_variance(schedule, denoise, x_t, t, label, variance=variance)
    return bound_loss(schedule, x_0, t, step, num_levels)


def _bits_per_dim(nats: Float64[Tensor, "b c h w"]) -> PerSampleBits:
    """Mean over C, H and W, in bits."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)
