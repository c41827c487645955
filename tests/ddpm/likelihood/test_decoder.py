"""The decoder's 256 or 65,536 probabilities against scipy, against 60 digits, and as a distribution."""

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
from ddpm.process.pixels import NumLevels

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
BOTH: list[NumLevels] = [256, 65536]


def log_probabilities(mean: float, sigma: float, num_levels: NumLevels = 256) -> Tensor:
    """Of all levels under one Gaussian."""
    levels = torch.arange(num_levels, dtype=torch.float64) / ((num_levels - 1) / 2) - 1
    log_variance = torch.tensor(2 * math.log(sigma), dtype=torch.float64)
    return discretised_log_likelihood(levels, torch.full_like(levels, mean), log_variance, num_levels)


def by_scipy(mean: float, sigma: float, num_levels: NumLevels) -> np.ndarray:
    """log(Phi(b) - Phi(a)) from log_ndtr of the two ends, on whichever side of the mean both are tails."""
    edges = (np.arange(num_levels + 1) - 0.5) / ((num_levels - 1) / 2) - 1
    z = (edges - mean) / sigma
    z[0], z[-1] = -np.inf, np.inf
    flip = z[:-1] + z[1:] > 0
    a, b = np.where(flip, -z[1:], z[:-1]), np.where(flip, -z[:-1], z[1:])
    log_a, log_b = scipy.special.log_ndtr(a), scipy.special.log_ndtr(b)
    log_probability: np.ndarray = log_b + np.log1p(-np.exp(log_a - log_b))
    return log_probability


@pytest.mark.parametrize("num_levels", BOTH)
@pytest.mark.parametrize("sigma", [1e-3, 0.00735, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.4, 0.0, 0.0039, 0.7, 0.996, 1.0, 1.2])
def test_equals_the_difference_of_log_ndtr(mean: float, sigma: float, num_levels: NumLevels) -> None:
    got, expected = log_probabilities(mean, sigma, num_levels).numpy(), by_scipy(mean, sigma, num_levels)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("num_levels", "level"),
    [
        *((256, level) for level in (0, 1, 2, 100, 127, 128, 200, 253, 254, 255)),
        *((65536, level) for level in (0, 1, 2, 100, 32767, 32768, 40959, 65533, 65534, 65535)),
    ],
)
@pytest.mark.parametrize(("mean", "sigma"), [(0.1, 0.007), (-0.99, 0.02), (0.3, 0.6), (-3.0, 0.05), (0.25, 2e-5)])
def test_equals_sixty_digits(level: int, mean: float, sigma: float, num_levels: NumLevels) -> None:
    last = num_levels - 1
    with mpmath.workdps(60):
        ends = [
            (mpmath.mpf(2 * edge - 1) / last - 1 - mpmath.mpf(mean)) / mpmath.mpf(sigma) for edge in (level, level + 1)
        ]
        ends[0] = -mpmath.inf if level == 0 else ends[0]
        ends[1] = mpmath.inf if level == last else ends[1]
        if ends[0] + ends[1] > 0:  # erfc is exact in relative terms, on the side where it is small
            ends = [-ends[1], -ends[0]]
        tails = [mpmath.erfc(-end / mpmath.sqrt(2)) / 2 for end in ends]
        expected = float(mpmath.log(tails[1] - tails[0]))
    got = float(log_probabilities(mean, sigma, num_levels)[level])
    assert got == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(mean=st.floats(-3, 3), log_sigma=st.floats(math.log(1e-4), math.log(3)))
def test_the_256_sum_to_one(mean: float, log_sigma: float) -> None:
    log_probability = log_probabilities(mean, math.exp(log_sigma))
    assert bool((log_probability <= 0).all())
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-1.3, -0.4, 3e-5, 1.0])
def test_the_65536_sum_to_one(mean: float, sigma: float) -> None:
    log_probability = log_probabilities(mean, sigma, 65536)
    assert len(log_probability) == 65536 and log_probability.dtype == torch.float64
    assert bool((log_probability <= 0).all())
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_level_of_256_is_shared_by_257_of_65536() -> None:
    """The fine levels 257 k - 128 to 257 k + 128 fill the coarse level k's interval, whose ends are theirs."""
    for mean, sigma in ((0.1, 0.004), (-0.9, 0.3)):
        coarse, fine = log_probabilities(mean, sigma).exp(), log_probabilities(mean, sigma, 65536).exp()
        shared = torch.stack([fine[257 * k - 128 : 257 * k + 129].sum() for k in range(1, 255)])
        torch.testing.assert_close(shared, coarse[1:-1], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(fine[:129].sum(), coarse[0], rtol=1e-9, atol=1e-15)


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
    fine = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    in_float32 = discretised_log_likelihood(fine.float(), torch.zeros_like(fine), log_variance, 65536)
    assert torch.equal(in_float32, discretised_log_likelihood(fine, torch.zeros_like(fine), log_variance, 65536))


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
