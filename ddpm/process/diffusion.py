"""The forward process q and the reverse process p of Ho et al., for any schedule; the network comes in as an argument.

Conventions: images are [B, C, H, W] in [-1, 1]; t [B] is the 0-based index into the schedule that is given (t = 0 is
the paper's t = 1). Coefficients come from the float64 tables and are cast to the dtype of the images last.

Source:
    Ho et al. 2020 (arXiv:2006.11239).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule, gather
from ddpm.shapes import Images, Labels, PerSample, Steps, check_precision

Variance = Literal["fixed_small", "fixed_large", "learned_range", "analytic"]
"""Variance of p(x_{t-1} | x_t). fixed_small: the posterior's, exact for a single image. fixed_large: beta_t, exact for
unit-variance noise (Ho et al., section 3.2). learned_range: between the two, where the network says. analytic: the best
of one variance for all pixels, exact for Gaussian data; needs the error of x_0_hat, measured beforehand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianStep:
    """p(x_{t-1} | x_t), one step of the reverse process."""

    mean: Images
    """Mean [B, C, H, W]."""
    variance: PerSample | Images
    """Variance, as the name of the choice says, also at t = 0: [B, 1, 1, 1] if fixed, [B, C, H, W] if learned."""
    log_variance: PerSample | Images
    """Its logarithm; at t = 0 that of posterior_variance[1], the width of the decoder of L_0 (learned: at least)."""
    x_0_hat: Images
    """The denoiser's clean images [B, C, H, W]."""


def q_sample(schedule: NoiseSchedule, x_0: Images, t: Steps, eps: Images) -> Images:
    """Noise x_0 to step t: sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.

    Args:
        schedule: Tables of length T.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        t: Step index [B] in [0, T-1].
        eps: Standard normal noise, same shape as x_0.

    Returns:
        x_t [B, C, H, W].

    Raises:
        ValueError: If the shapes of x_0 and eps differ, or one is neither float32 nor float64.

    Source:
        Ho et al. 2020, Eq. 4.
    """
    check_precision("x_0", x_0)
    check_precision("eps", eps)
    _check_same_shape("eps", eps, "x_0", x_0)
    alpha_bar = schedule.alpha_bar
    return gather(alpha_bar.sqrt(), t, x_0) * x_0 + gather((1 - alpha_bar).sqrt(), t, x_0) * eps


def q_posterior_mean_variance(
    schedule: NoiseSchedule, x_0: Images, x_t: Images, t: Steps
) -> tuple[Images, PerSample, PerSample]:
    """Mean and variance of the forward-process posterior q(x_{t-1} | x_t, x_0).

    Args:
        schedule: Tables of length T (float64), gathered at t, cast to x_t's dtype.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        x_t: Noised images, same shape and dtype.
        t: Step index [B] in [0, T-1].

    Returns:
        Mean [B, C, H, W]; variance and log-variance [B, 1, 1, 1]; the variance is 0 at t = 0, where the log-variance is
        that of entry 1.

    Raises:
        ValueError: If the shapes of x_0 and x_t differ.

    Source:
        Ho et al. 2020, Eq. 6-7.
    """
    _check_same_shape("x_0", x_0, "x_t", x_t)
    mean = (
        gather(schedule.posterior_mean_coef_x_0, t, x_t) * x_0 + gather(schedule.posterior_mean_coef_x_t, t, x_t) * x_t
    )
    return mean, gather(schedule.posterior_variance, t, x_t), gather(schedule.posterior_log_variance, t, x_t)


def p_mean_variance(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_t: Images,
    t: Steps,
    label: Labels | None,
    *,
    variance: Variance,
    x_0_error: Table | None = None,
) -> GaussianStep:
    """One step of the reverse process, p(x_{t-1} | x_t): the posterior with x_0_hat in the place of x_0.

    Args:
        schedule: The chain that is walked, the training chain or a respaced one.
        denoise: Predicts x_0_hat; it is given the index in the training chain.
        x_t: Noised images [B, C, H, W].
        t: Index [B] into schedule.
        label: Class [B], or None.
        variance: Which variance the step has.
        x_0_error: E |x_0 - x_0_hat|^2 / D at every entry of schedule [T]; only variance = analytic reads it.

    Raises:
        ValueError: If variance is not a known choice, learned_range without a denoiser that predicts it, or analytic
            without an x_0_error or with that of another chain.

    Source:
        Ho et al. 2020, Eq. 7 and 11; section 3.2 for the fixed variances. Nichol and Dhariwal 2021 (arXiv:2102.09672),
        Eq. 15, for the learned one, whose bounds are those of the chain that is walked.
    """
    prediction = denoise(x_t, schedule.timesteps.to(t.device, non_blocking=True)[t], label)
    x_0_hat = prediction.x_0_hat
    mean, _, _ = q_posterior_mean_variance(schedule, x_0_hat, x_t, t)
    if variance != "learned_range":
        table, log_table = _variance_tables(schedule, variance, x_0_error)
        return GaussianStep(
            mean=mean, variance=gather(table, t, x_t), log_variance=gather(log_table, t, x_t), x_0_hat=x_0_hat
        )
    fraction = prediction.variance_fraction
    if fraction is None:
        raise ValueError(
            "variance: learned_range needs a network that predicts it, got one that does not; choose a fixed variance"
        )
    low, high = gather(schedule.posterior_log_variance, t, x_t), gather(schedule.beta.log(), t, x_t)
    log_variance = fraction * high + (1 - fraction) * low
    return GaussianStep(mean=mean, variance=log_variance.exp(), log_variance=log_variance, x_0_hat=x_0_hat)


def analytic_variance(schedule: NoiseSchedule, x_0_error: Table) -> Table:
    """The variance of each step with which the reverse process is nearest to the forward one, the mean being the best.

    By the law of total variance it is that of the posterior, plus what the mean misses because x_0 is not known:

        posterior_variance + coef_x_0^2 E tr Cov(x_0 | x_t) / D

    The best network misses x_0 by just that: E tr Cov(x_0 | x_t) = E |x_0 - x_0_hat|^2, here limited to [0, D], since
    data in [-1, 1] varies by no more. It is Bao et al.'s Theorem 1, whose Gamma is E |eps_hat|^2 / D / (1 - alpha_bar):

        (1 - alpha_bar) Gamma = 1 - E |eps - eps_hat|^2 / D = 1 - alpha_bar / (1 - alpha_bar) E |x_0 - x_0_hat|^2 / D

    the first for the best network only, whose error is uncorrelated with its answer. In their form the difference from
    1 is divided by alpha_bar, which leaves nothing but rounding where there is next to no signal; the error of x_0_hat
    is finite and smooth up to there.

    Args:
        schedule: The chain that is walked, usually respaced.
        x_0_error: E |x_0 - x_0_hat|^2 / D at every entry of schedule, float64 [T].

    Returns:
        float64 [T]; not 0 at t = 0, where samplers add no noise.

    Raises:
        ValueError: If x_0_error has another length.

    Source:
        Bao et al. 2022 (arXiv:2201.06503), Theorem 1, and Theorem 2 for the limits.
    """
    if len(x_0_error) != schedule.num_timesteps:
        raise ValueError(
            f"x_0_error: must have the chain's length {schedule.num_timesteps}, got {len(x_0_error)}; "
            "give one number per step"
        )
    unknown = x_0_error.to(schedule.alpha_bar).clamp(0, 1)
    return schedule.posterior_variance + schedule.posterior_mean_coef_x_0.square() * unknown


def _variance_tables(schedule: NoiseSchedule, variance: Variance, x_0_error: Table | None) -> tuple[Table, Table]:
    """Variance and log-variance of every step."""
    if variance == "fixed_small":
        return schedule.posterior_variance, schedule.posterior_log_variance
    if variance == "fixed_large":
        table = schedule.beta
    elif variance != "analytic":
        raise ValueError(f"variance: must be {' or '.join(get_args(Variance))}, got {variance!r}; choose one of them")
    elif x_0_error is None:
        raise ValueError(
            "variance: analytic needs the error of x_0_hat, got none; measure it with x_0_errors, or choose a fixed "
            "variance"
        )
    else:
        table = analytic_variance(schedule, x_0_error)
    return table, torch.cat((schedule.posterior_log_variance[:1], table[1:].log()))


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: must have {other_name}'s shape {list(other.shape)}, got {list(tensor.shape)}")
