"""The decoder's 256 probabilities against scipy, against 60 digits, and as a distribution."""

import math

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import discretised_log_likelihood

LEVELS = torch.arange(NUM_LEVELS, dtype=torch.float64) / 127.5 - 1


def log_probabilities(mean: float, sigma: float) -> Tensor:
    """Of all 256 levels under one Gaussian."""
    log_variance = torch.tensor(2 * math.log(sigma), dtype=torch.float64)
    return discretised_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_variance)


def by_scipy(mean: float, sigma: float) -> np.ndarray:
    """log(Phi(b) - Phi(a)) from log_ndtr of the two ends, on whichever side of the mean both are tails."""
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    z = (edges - mean) / sigma
    z[0], z[-1] = -np.inf, np.inf
    flip = z[:-1] + z[1:] > 0
    a, b = np.where(flip, -z[1:], z[:-1]), np.where(flip, -z[:-1], z[1:])
    log_a, log_b = scipy.special.log_ndtr(a), scipy.special.log_ndtr(b)
    log_probability: np.ndarray = log_b + np.log1p(-np.exp(log_a - log_b))
    return log_probability


@pytest.mark.parametrize("sigma", [1e-3, 0.00735, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.4, 0.0, 0.0039, 0.7, 0.996, 1.0, 1.2])
def test_equals_the_difference_of_log_ndtr(mean: float, sigma: float) -> None:
    np.testing.assert_allclose(log_probabilities(mean, sigma).numpy(), by_scipy(mean, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0, 1, 2, 100, 127, 128, 200, 253, 254, 255])
@pytest.mark.parametrize(("mean", "sigma"), [(0.1, 0.007), (-0.99, 0.02), (0.3, 0.6), (-3.0, 0.05)])
def test_equals_sixty_digits(level: int, mean: float, sigma: float) -> None:
    with mpmath.workdps(60):
        ends = [
            (mpmath.mpf(2 * edge - 1) / 255 - 1 - mpmath.mpf(mean)) / mpmath.mpf(sigma) for edge in (level, level + 1)
        ]
        ends[0] = -mpmath.inf if level == 0 else ends[0]
        ends[1] = mpmath.inf if level == 255 else ends[1]
        if ends[0] + ends[1] > 0:  # erfc is exact in relative terms, on the side where it is small
            ends = [-ends[1], -ends[0]]
        tails = [mpmath.erfc(-end / mpmath.sqrt(2)) / 2 for end in ends]
        expected = float(mpmath.log(tails[1] - tails[0]))
    assert float(log_probabilities(mean, sigma)[level]) == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(mean=st.floats(-3, 3), log_sigma=st.floats(math.log(1e-4), math.log(3)))
def test_the_256_sum_to_one(mean: float, log_sigma: float) -> None:
    log_probability = log_probabilities(mean, math.exp(log_sigma))
    assert bool((log_probability <= 0).all())
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("mean", [-1e6, -50.0, 50.0, 1e6])
@pytest.mark.parametrize("sigma", [1e-4, 1.0])
def test_far_tails_are_finite(mean: float, sigma: float) -> None:
    """There log Phi(-z) is about -z^2 / 2, with z the distance to the nearer end of the interval."""
    log_probability = log_probabilities(mean, sigma)
    assert bool(log_probability.isfinite().all())
    own = 0 if mean < 0 else 255
    assert float(log_probability[own]) == 0
    others = torch.cat((log_probability[:own], log_probability[own + 1 :]))
    away = (torch.cat((LEVELS[:own], LEVELS[own + 1 :])) - mean).abs() - 1 / 255
    torch.testing.assert_close(others, -((away / sigma) ** 2) / 2, rtol=2e-2, atol=0.0)


def test_float32_images_lose_nothing() -> None:
    """v / 127.5 - 1 in float32 is off by 3e-8; the level is taken, and with it the exact interval."""
    mean = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_variance = torch.tensor(-9.8, dtype=torch.float64)
    in_float32 = discretised_log_likelihood(LEVELS.float(), mean, log_variance)
    assert torch.equal(in_float32, discretised_log_likelihood(LEVELS, mean, log_variance))
    assert in_float32.dtype == torch.float64


def test_what_is_no_pixel_value_counts_as_the_nearest() -> None:
    x_0 = torch.tensor([-1.7, -0.9991, 0.0031, 1.4], dtype=torch.float64)
    mean, log_variance = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    nearest = LEVELS[torch.tensor([0, 0, 128, 255])]
    assert torch.equal(
        discretised_log_likelihood(x_0, mean, log_variance), discretised_log_likelihood(nearest, mean, log_variance)
    )


def test_one_variance_for_each_image_or_each_pixel() -> None:
    x_0 = LEVELS[:24].reshape(2, 3, 2, 2)
    mean, log_variance = torch.zeros_like(x_0), torch.tensor([-3.0, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    per_pixel = discretised_log_likelihood(x_0, mean, log_variance.expand_as(x_0))
    assert torch.equal(discretised_log_likelihood(x_0, mean, log_variance), per_pixel)


def test_gradient() -> None:
    """Finite differences, at both edges and on both sides of the mean."""
    x_0 = LEVELS[torch.tensor([0, 0, 1, 90, 127, 128, 130, 254, 255, 255])]
    mean = torch.tensor([-1.2, -0.7, -0.9, -0.2, 0.0, 0.0, 0.5, 0.9, 1.3, 0.2], dtype=torch.float64)
    log_variance = torch.linspace(-7, -2, 10, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda m, lv: discretised_log_likelihood(x_0, m, lv), (mean.requires_grad_(), log_variance.requires_grad_())
    )


def test_gradient_points_home_from_far_tails() -> None:
    """d log p / d mean is z / sigma there; a NaN from the branch that is not taken would show."""
    mean = torch.tensor([40.0, -40.0, 40.0, -40.0], dtype=torch.float64, requires_grad=True)
    log_variance = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    discretised_log_likelihood(LEVELS[torch.tensor([0, 255, 100, 100])], mean, log_variance).sum().backward()  # type: ignore[no-untyped-call]
    assert mean.grad is not None and log_variance.grad is not None and bool(log_variance.grad.isfinite().all())
    torch.testing.assert_close(mean.grad.sign(), torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(mean.grad.abs(), torch.full((4,), 40.6, dtype=torch.float64), rtol=0.05, atol=0.0)
