"""The Gaussian per class: its predictor against the gradient of the log-density, its draws against their moments."""

import math

import pytest
import torch
from torch import Tensor

from ddpm import Moments, NoiseSchedule, ScheduleConfig, make_schedule
from pipeline.evaluation.baselines import ClassGaussians

SHAPE = (2, 2, 2)
D = math.prod(SHAPE)
NUM_CLASSES = 3


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return make_schedule(ScheduleConfig(name="cosine", num_timesteps=1000))


@pytest.fixture(scope="module")
def x_0() -> Tensor:
    """Correlated vectors of each class [K, N, D], with one dimension that never varies."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(NUM_CLASSES, D, D, generator=generator, dtype=torch.float64) * 0.2
    x = torch.randn(NUM_CLASSES, 50, D, generator=generator, dtype=torch.float64) @ mix
    x[:, :, 3] = 0.25
    return x


def fit(x_0: Tensor, ridge: float = 1e-3) -> ClassGaussians:
    return ClassGaussians.fit([Moments.from_samples(of_class) for of_class in x_0], SHAPE, ridge)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_prediction_is_the_score_of_the_noised_density(schedule: NoiseSchedule, x_0: Tensor, t: int) -> None:
    """eps* = -sqrt(1 - abar) grad log p(x_t), by autograd of the log-density of a general multivariate normal."""
    ridge = 1e-2
    abar = float(schedule.alpha_bar[t])
    x_t = torch.randn(12, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    label = torch.arange(12) % NUM_CLASSES
    log_density = torch.zeros((), dtype=torch.float64)
    for row, k in zip(x_t, label.tolist(), strict=True):
        covariance = torch.cov(x_0[k].T, correction=0) + ridge * torch.eye(D, dtype=torch.float64)
        noised = abar * covariance + (1 - abar) * torch.eye(D, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(math.sqrt(abar) * x_0[k].mean(0), noised)
        log_density = log_density + normal.log_prob(row)
    (score,) = torch.autograd.grad(log_density, x_t)
    eps_hat = fit(x_0, ridge).eps_hat(schedule, x_t.detach().reshape(-1, *SHAPE), torch.full((12,), t), label)
    assert eps_hat.dtype == torch.float64
    torch.testing.assert_close(eps_hat.flatten(1), -math.sqrt(1 - abar) * score, rtol=1e-8, atol=1e-9)


def test_prediction_beats_every_other_linear_one_on_its_own_data(schedule: NoiseSchedule, x_0: Tensor) -> None:
    """On data from the fitted Gaussian its error is the floor, sum of (1 - abar)/(abar v + 1 - abar), per dimension."""
    gaussians, t = fit(x_0), 300
    generator = torch.Generator().manual_seed(2)
    z, eps = (torch.randn(40_000, D, generator=generator, dtype=torch.float64) for _ in range(2))
    v, abar = gaussians.variance[1], float(schedule.alpha_bar[t])
    x = gaussians.mean[1] + (z * v.sqrt()) @ gaussians.eigenvectors[1].T
    x_t = (math.sqrt(abar) * x + math.sqrt(1 - abar) * eps).reshape(-1, *SHAPE)
    steps, label = torch.full((len(x_t),), t), torch.ones(len(x_t), dtype=torch.int64)

    def error(of: ClassGaussians) -> float:
        return float((of.eps_hat(schedule, x_t, steps, label).flatten(1) - eps).square().mean())

    floor = float((abar * v / (abar * v + 1 - abar)).mean())
    assert error(gaussians) == pytest.approx(floor, rel=0.02)
    assert error(fit(x_0, ridge=0.05)) > floor * 1.02


def test_draws_have_the_fitted_moments_and_depend_on_the_id_alone(x_0: Tensor) -> None:
    gaussians = fit(0.3 * x_0)  # far from the clipping
    ids = torch.arange(30_000)
    label = ids % NUM_CLASSES
    images = gaussians.sample(5, ids, label)
    assert images.shape == (30_000, *SHAPE) and images.dtype == torch.float32
    for k in range(NUM_CLASSES):
        drawn = Moments.from_samples(images[label == k].flatten(1))
        covariance = 0.09 * torch.cov(x_0[k].T, correction=0) + 1e-3 * torch.eye(D, dtype=torch.float64)
        torch.testing.assert_close(drawn.mean, 0.3 * x_0[k].mean(0), rtol=0, atol=0.01)
        torch.testing.assert_close(drawn.covariance(), covariance, rtol=0, atol=0.004)
    some = torch.tensor([7, 29_999, 3])
    assert torch.equal(gaussians.sample(5, some, label[some]), images[some])
    assert not torch.equal(gaussians.sample(6, some, label[some]), images[some])


def test_draws_are_clipped_to_the_range_of_images(x_0: Tensor) -> None:
    images = fit(20 * x_0).sample(0, torch.arange(100), torch.arange(100) % NUM_CLASSES)
    assert images.min() == -1 and images.max() == 1


def test_without_labels_there_is_one_gaussian(schedule: NoiseSchedule, x_0: Tensor) -> None:
    gaussians = fit(x_0[:1])
    x_t, t = torch.rand(4, *SHAPE), torch.arange(4)
    zeros = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(gaussians.eps_hat(schedule, x_t, t, None), gaussians.eps_hat(schedule, x_t, t, zeros))
    assert torch.equal(gaussians.sample(0, t, None), gaussians.sample(0, t, zeros))


def test_moments_of_other_images_are_refused(x_0: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^image_shape: "):
        ClassGaussians.fit([Moments.from_samples(x_0[0])], (1, 3, 3))
