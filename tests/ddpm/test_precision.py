"""What is measured of numbers with few digits would be wrong: every function that measures refuses them by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm import (
    DiffusionModel,
    GaussianStep,
    LikelihoodConfig,
    Moments,
    RunningMoments,
    ScheduleConfig,
    bound_loss,
    bound_of_images,
    discretised_log_likelihood,
    gaussian_kl,
    make_schedule,
    make_training_batch,
    prior_loss,
    probability_flow_bound,
    q_sample,
    simple_loss,
    x_0_errors,
    x_0_to_images,
)
from ddpm.likelihood.probability_flow import probability_flow_log_density
from tests.ddpm.pixel_oracle import exact_model, images_of

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=25))
IDS = torch.arange(4)
LEVELS = torch.arange(100, 132)
MODEL: DiffusionModel = exact_model(SCHEDULE, LEVELS, 2)
X_0 = images_of(LEVELS, IDS, 2)
ONE = torch.ones(4, 1, 1, 1)


def step(x_0_hat: Tensor, log_variance: Tensor) -> GaussianStep:
    return GaussianStep(mean=x_0_hat, variance=log_variance, log_variance=log_variance, x_0_hat=x_0_hat)


MEASURES: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "bound_of_images": (
        "x_0",
        lambda x: bound_of_images(MODEL, LikelihoodConfig(), seed=0, sample_ids=IDS, x_0=x, label=None),
    ),
    "probability_flow_bound": (
        "x_0",
        lambda x: probability_flow_bound(MODEL, seed=0, sample_ids=IDS, x_0=x, label=None, num_steps=3),
    ),
    "probability_flow_log_density": (
        "x_t",
        lambda x: probability_flow_log_density(
            MODEL.denoiser(clip_x_0=False), SCHEDULE, x, None, timesteps=[0, 24], probes=torch.ones_like(x)[None]
        ),
    ),
    "x_0_errors": ("x_0", lambda x: x_0_errors(MODEL, seed=0, sample_ids=IDS, x_0=x, label=None)),
    "make_training_batch": (
        "x_0",
        lambda x: make_training_batch(MODEL, x, None, seed=0, sample_ids=IDS, epochs=IDS, flip=False, label_drop=0.0),
    ),
    "q_sample": ("x_0", lambda x: q_sample(SCHEDULE, x, IDS, X_0)),
    "q_sample, noise": ("eps", lambda x: q_sample(SCHEDULE, X_0, IDS, x)),
    "prior_loss": ("x_0", lambda x: prior_loss(SCHEDULE, x)),
    "bound_loss": ("x_0", lambda x: bound_loss(SCHEDULE, x, IDS, step(X_0, ONE))),
    "bound_loss, prediction": ("x_0_hat", lambda x: bound_loss(SCHEDULE, X_0, IDS, step(x, ONE))),
    "bound_loss, variance": ("log_variance", lambda x: bound_loss(SCHEDULE, X_0, IDS, step(X_0, x))),
    "gaussian_kl": ("mean_difference", lambda x: gaussian_kl(x, ONE, ONE)),
    "gaussian_kl, q": ("log_variance_q", lambda x: gaussian_kl(X_0, x, ONE)),
    "gaussian_kl, p": ("log_variance_p", lambda x: gaussian_kl(X_0, ONE, x)),
    "decoder": ("x_0", lambda x: discretised_log_likelihood(x, X_0, ONE)),
    "decoder, mean": ("mean", lambda x: discretised_log_likelihood(X_0, x, ONE)),
    "decoder, variance": ("log_variance", lambda x: discretised_log_likelihood(X_0, X_0, x)),
    "simple_loss": ("eps", lambda x: simple_loss(x, X_0)),
    "simple_loss, prediction": ("eps_hat", lambda x: simple_loss(X_0, x)),
    "Moments": ("samples", lambda x: Moments.from_samples(x.flatten(1))),
    "RunningMoments": ("values", lambda x: RunningMoments.from_samples(x.flatten(1))),
    "x_0_to_images": ("x_0", x_0_to_images),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_numbers_with_few_digits_are_refused_by_name(measure: str, dtype: torch.dtype) -> None:
    name, call = MEASURES[measure]
    given = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^{name}: must be float32 or float64, got {given}; keep images in float32"):
        call(X_0.to(dtype))


@pytest.mark.parametrize("measure", MEASURES)
def test_float32_and_float64_are_taken(measure: str) -> None:
    for dtype in (torch.float32, torch.float64):
        MEASURES[measure][1](X_0.to(dtype))


def test_what_bfloat16_would_have_cost() -> None:
    """Casting it back would not help: the images are off their levels by then. Float32 has digits to spare."""

    def bits(x_0: Tensor) -> float:
        found = bound_of_images(MODEL, LikelihoodConfig(), seed=0, sample_ids=IDS, x_0=x_0, label=None)
        return float(found.bits_per_dim.mean())

    assert abs(bits(X_0.float()) - bits(X_0)) < 1e-4
    assert abs(bits(X_0.bfloat16().double()) - bits(X_0)) > 1e-3
