"""The distance of pixels beside that of as many real images, and the errors of both."""

import itertools

import numpy as np
import pytest
import torch

from ddpm import Moments, frechet_distance
from pipeline.data.image_stream import LabelledImages
from pipeline.measuring.measures import pixels
from pipeline.measuring.pixel_distance import MAX_REAL_SETS, pixel_distance, real_distance


def images(num_images: int, seed: int) -> LabelledImages:
    """Images of 3 x 3 pixels, brighter by class, sorted by class: sets must be drawn at random."""
    generator = np.random.default_rng(seed)
    labels = np.sort(np.arange(num_images) % 3)
    noise = generator.integers(0, 90, (num_images, 3, 3, 1))
    return LabelledImages(images=(noise + 40 * labels[:, None, None, None]).astype(np.uint8), labels=labels)


def in_groups(whole: LabelledImages, *sizes: int) -> list[LabelledImages]:
    return [whole[a:b] for a, b in itertools.pairwise([0, *np.cumsum(sizes).tolist(), len(whole)])]


OTHERS = Moments.from_samples(torch.from_numpy(pixels(images(300, 1))))
DARKER = Moments.from_samples(torch.from_numpy(0.7 * pixels(images(300, 1))))


def test_any_cut_of_the_stream_gives_the_same() -> None:
    made = images(120, 0)
    whole, cut = (pixel_distance(lambda groups=groups: groups, OTHERS) for groups in ([made], in_groups(made, 7, 50)))  # type: ignore[misc]
    assert whole.value == pytest.approx(cut.value)
    assert whole.value == pytest.approx(frechet_distance(Moments.from_samples(torch.from_numpy(pixels(made))), OTHERS))
    assert torch.allclose(whole.influence, cut.influence)
    assert whole.label is not None and cut.label is not None and torch.equal(whole.label, cut.label)
    assert whole.standard_error == pytest.approx(cut.standard_error)
    unlabelled = pixel_distance(lambda: [made.without_labels()], OTHERS)
    assert unlabelled.label is None and (unlabelled.standard_error or 0) > (whole.standard_error or 0) > 0


def test_one_image_of_each_class_has_no_error() -> None:
    assert pixel_distance(lambda: [images(3, 0)], OTHERS).standard_error is None


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(20, (20, MAX_REAL_SETS)), (100, (100, 6)), (400, (400, 1)), (600, (600, 1)), (601, (600, 1)), (10**6, (600, 1))],
)
def test_sets_are_disjoint_and_no_larger_than_the_training_images(num_images: int, expected: tuple[int, int]) -> None:
    train = images(600, 2)
    found = real_distance(lambda: in_groups(train, 100, 250), 600, num_images, OTHERS)
    assert (found.num_images, found.num_sets) == expected
    assert 0 < found.distance.standard_error < np.inf
    again = real_distance(lambda: [train], 600, num_images, OTHERS)
    assert again.distance.value == pytest.approx(found.distance.value), "the same images, however they are read"


def test_the_sets_are_random_ones_of_their_size() -> None:
    """By numpy's own draws: the mean, and the error of one set. The first images would all be of one class."""
    train = images(600, 2)
    values = torch.from_numpy(pixels(train))
    generator = np.random.default_rng(0)
    draws = [
        frechet_distance(Moments.from_samples(values[generator.integers(600, size=60)]), DARKER) for _ in range(100)
    ]
    found = real_distance(lambda: [train], 600, 60, DARKER)
    spread = float(np.std(draws, ddof=1))
    assert found.distance.value == pytest.approx(np.mean(draws), abs=4 * spread / 10**0.5)
    assert found.distance.standard_error == pytest.approx(spread, rel=0.35)
    first = frechet_distance(Moments.from_samples(values[:60]), OTHERS)
    assert first > 3 * real_distance(lambda: [train], 600, 60, OTHERS).distance.value


def test_of_one_distribution_the_error_is_not_too_small() -> None:
    """The first order vanishes there: the error is up to sqrt(2) of the spread."""
    draws = [
        frechet_distance(Moments.from_samples(torch.from_numpy(pixels(images(60, seed)))), OTHERS)
        for seed in range(100, 200)
    ]
    distances = [pixel_distance(lambda seed=seed: [images(60, seed)], OTHERS) for seed in range(100, 140)]  # type: ignore[misc]
    ratio = np.mean([distance.standard_error or 0 for distance in distances]) / np.std(draws, ddof=1)
    assert 1 < ratio < 1.2 * 2**0.5
