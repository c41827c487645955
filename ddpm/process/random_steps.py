"""From uniform words to steps t of a chain, in integers where that is possible: equal on every device.

Training draws t with these, and so do the bound and the calibration of the analytic variance.
"""

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor


def timestep_in_stratum(
    num_timesteps: int, stratum: Int[Tensor, "*n"], num_strata: int, word: Int[Tensor, "*n"]
) -> Int64[Tensor, "*n"]:
    """floor((stratum + word / 2^32) T / num_strata), in integers: exact, and equal on every device.

    Args:
        num_timesteps: T.
        stratum: Which part of [0, T), in [0, num_strata).
        num_strata: Number of equal parts.
        word: Uniform in [0, 2^32).

    Raises:
        ValueError: If T or num_strata is below 1, or their product not below 2^31.
    """
    if min(num_timesteps, num_strata) < 1 or num_timesteps * num_strata >= 2**31:
        raise ValueError(
            f"num_strata: must be at least 1 and, times T, below 2^31, got {num_strata} with T = {num_timesteps}; "
            "choose fewer"
        )
    return ((stratum << 32) + word) * num_timesteps // (num_strata << 32)


def importance_probabilities(
    second_moment: Float64[Tensor, " T"], uniform_share: float = 0.001
) -> Float64[Tensor, " T"]:
    """p(t) in proportion to the root of E[L_t^2], which gives the mean over t its least variance.

    Args:
        second_moment: E[L_t^2] of each t, float64 [T]; not negative.
        uniform_share: Probability of drawing uniformly instead, so that no t is forgotten.

    Returns:
        Probabilities [T]; uniform where every moment is 0.

    Source:
        Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 18.
    """
    root, T = second_moment.sqrt(), len(second_moment)
    total = root.sum()
    share = torch.where(total > 0, root / total, 1 / T)  # where, because a bool would have the host wait
    return (1 - uniform_share) * share + uniform_share / T


def timestep_of_word(probabilities: Float64[Tensor, " T"], word: Int[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """The t in which a uniform word in [0, 2^32) falls when [0, 1) is cut in proportion to the probabilities [T]."""
    # In units of 2^-52: a device may add floats in any order, and two ranks must cut alike.
    upper_end = (probabilities * 2.0**52).round().to(torch.int64).cumsum(0)
    middle = (word.to(torch.int64) << 20) + (1 << 19)
    # Rounding may leave the last end below 1.
    return torch.searchsorted(upper_end, middle, right=True).clamp(max=len(probabilities) - 1)
