"""The discretised decoder: probabilities of a pixel's L levels under a Gaussian over [-1, 1].

A level owns the interval of width 2 / (L - 1) around its place; the first and the last one own the tails as well, so
that the L probabilities sum to 1. All of it is done in float64 and in logarithms, so that no tail is too far.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm.process.pixels import NumLevels
from ddpm.shapes import check_precision


def discretised_log_likelihood(
    x_0: Float[Tensor, "*n"],
    mean: Float[Tensor, "*n"],
    log_variance: Float[Tensor, "*#n"],
    num_levels: NumLevels = 256,
) -> Float64[Tensor, "*n"]:
    """Log-probability of each pixel of x_0 under a Gaussian, integrated over the pixel's interval.

    Args:
        x_0: Clean images in [-1, 1]; each element counts as the nearest level.
        mean: Mean of the Gaussian, same shape.
        log_variance: Logarithm of its variance, of a shape that broadcasts to x_0's.
        num_levels: L, the values of a pixel.

    Returns:
        Natural logarithms in float64, with gradient to mean and log_variance; finite for any distance of x_0 to mean.

    Raises:
        ValueError: If an argument is neither float32 nor float64.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 13.
    """
    for name, tensor in (("x_0", x_0), ("mean", mean), ("log_variance", log_variance)):
        check_precision(name, tensor)
    last = num_levels - 1
    # From the level, not from x_0: neighbours then share their border to the last bit, and float32 images lose nothing.
    level = ((x_0.to(torch.float64) + 1) * (last / 2)).round().clamp(0, last)
    precision = torch.exp(-0.5 * log_variance.to(torch.float64))
    centred = 2 * level / last - 1 - mean.to(torch.float64)
    lower, upper = (centred - 1 / last) * precision, (centred + 1 / last) * precision
    # Where the interval lies above the mean both ends are mirrored: there Phi is 1 in all digits, and -Phi is not.
    above = centred > 0
    a, b = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    log_b = torch.special.log_ndtr(b)
    inside = log_b + torch.log(-torch.expm1(torch.special.log_ndtr(a) - log_b))
    tail = torch.special.log_ndtr(torch.where(level == 0, upper, -lower))
    return torch.where((level == 0) | (level == last), tail, inside)
