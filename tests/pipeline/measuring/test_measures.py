"""Figures of merit against closed forms and independent libraries."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from ddpm import ScheduleConfig, frechet_distance, make_schedule
from pipeline.data.image_stream import LabelledImages
from pipeline.measuring.measures import PixelClassifier, eps_mse, pixel_moments, pixels

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=50))
CPU = torch.device("cpu")


def random_images(num_images: int, seed: int, *, num_classes: int = 2, channels: int = 1) -> LabelledImages:
    """Images of 3 x 3 pixels whose brightness depends on the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    noise = generator.integers(0, 100, (num_images, 3, 3, channels))
    return LabelledImages(images=(noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels=labels)


def in_groups(images: LabelledImages, *sizes: int) -> list[LabelledImages]:
    edges = np.cumsum([0, *sizes, len(images)])
    return [images[a : min(b, len(images))] for a, b in itertools.pairwise(edges) if a < len(images)]


def test_frechet_distance_of_pixels_is_scipys(seed: int = 0) -> None:
    """From the definition: numpy's covariances, scipy's matrix square root, however the stream was cut."""
    a, b = random_images(400, seed), random_images(300, seed + 1, num_classes=3)
    x, y = pixels(a), pixels(b)
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    distance = frechet_distance(
        pixel_moments(in_groups(a, 1, 250), None)[0], pixel_moments(in_groups(b, 100, 100), None)[0]
    )
    assert distance == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_moments_of_each_class_together_are_those_of_all() -> None:
    images = random_images(500, 0, num_classes=3, channels=3)
    by_class = pixel_moments(in_groups(images, 7, 300), 3)
    assert [m.count for m in by_class] == [167, 167, 166]
    x = pixels(images)[images.labels == 1]
    np.testing.assert_allclose(by_class[1].mean, x.mean(0))
    np.testing.assert_allclose(by_class[1].covariance(), np.cov(x.T))
    with pytest.raises(ValueError, match="none of class 3"):
        pixel_moments([images], 4)


def test_pixels_are_in_the_order_of_x_0() -> None:
    images = random_images(2, 0, channels=3)
    assert pixels(images)[1].reshape(3, 3, 3)[2, 0, 1] == images.images[1, 0, 1, 2] / 255


def test_agreement_counts_what_is_read_as_its_label() -> None:
    classifier = PixelClassifier(random_images(200, 0))
    fresh = random_images(100, 1)
    assert classifier.agreement(in_groups(fresh, 33)) > 0.95
    assert fresh.labels is not None
    swapped = LabelledImages(images=fresh.images, labels=1 - fresh.labels)
    assert classifier.agreement([swapped]) == pytest.approx(1 - classifier.agreement([fresh]))
    half = LabelledImages(images=fresh.images, labels=np.zeros_like(fresh.labels))
    assert classifier.agreement([half]) == pytest.approx(0.5, abs=0.05)


def test_a_classifier_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        PixelClassifier(random_images(10, 0, num_classes=1))
    with pytest.raises(ValueError, match="labels"):
        PixelClassifier(LabelledImages(images=random_images(10, 0).images, labels=None))


def predicts_zero(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return torch.zeros_like(x_t)


def measure(
    images: LabelledImages, *networks: object, images_per_t: int = 40, batch_size: int = 64, seed: int = 0
) -> list:  # type: ignore[type-arg]
    return eps_mse(
        networks,  # type: ignore[arg-type]
        SCHEDULE,
        lambda: in_groups(images, 10, 10),
        images_per_t=images_per_t,
        seed=seed,
        batch_size=batch_size,
        device=CPU,
    )


def test_eps_error_of_known_predictors() -> None:
    """Zero has error E eps^2 = 1, x_t has E (x_t - eps)^2 in closed form, both within their own error bars."""
    images = random_images(60, 0)
    zero, identity = measure(images, predicts_zero, lambda x_t, t, label: x_t)
    assert zero.value == pytest.approx(1, abs=4 * zero.standard_error)
    x = 2 * pixels(images) - 1
    abar = SCHEDULE.alpha_bar
    expected = float((abar * (x**2).mean() + ((1 - abar).sqrt() - 1) ** 2).mean())
    assert identity.value == pytest.approx(expected, abs=4 * identity.standard_error)
    # 50 t of 40 images of 9 pixels: the variance of a mean of squared normals is 2 / n.
    assert zero.standard_error == pytest.approx((2 / (50 * 40 * 9)) ** 0.5, rel=0.1)


def test_the_standard_error_is_the_spread_over_seeds() -> None:
    images = random_images(60, 0)
    runs = [measure(images, predicts_zero, images_per_t=4, seed=seed)[0] for seed in range(40)]
    spread = np.std([run.value for run in runs], ddof=1)
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.35)


def test_every_t_gets_as_many_images_and_its_own_label_however_batches_are_cut() -> None:
    images = random_images(60, 0)
    seen: list[Tensor] = []

    def records(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        seen.append(torch.stack([t, label]))
        return x_t

    first = measure(images, records, images_per_t=6)
    t, label = torch.cat(seen, dim=1)
    assert torch.equal(t.bincount(), torch.full((50,), 6))
    assert torch.equal(label, torch.arange(300) % 60 % 2), "the images in the order of the stream, again and again"
    assert len(t[::60].unique()) > 1, "an image meets another t each time"
    assert len(t[:60].unique()) > 25, "the beginning of a sorted dataset meets all t, not the first few"
    second = measure(images, records, images_per_t=6, batch_size=7)
    assert first[0].value == pytest.approx(second[0].value, rel=1e-6)
