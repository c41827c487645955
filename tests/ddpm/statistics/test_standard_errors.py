"""Standard errors of the Frechet distance and of agreements, against the spread that they stand for."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from ddpm import (
    FrechetComparison,
    Moments,
    agreement_standard_error,
    frechet_distance,
    stratified_standard_error,
)

D, CLASSES = 12, 3
GENERATOR = torch.Generator().manual_seed(0)
CENTRES = 2 * torch.randn((CLASSES, D), generator=GENERATOR, dtype=torch.float64)
MIX = torch.randn((D, D), generator=GENERATOR, dtype=torch.float64) / 3
MIX[:, -1] = 0.0  # a pixel that is the same in all images of a class


def draw(num_images: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images of three classes in turn, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num_images) % CLASSES
    return CENTRES[label] + torch.randn((num_images, D), generator=generator, dtype=torch.float64) @ MIX + shift, label


OTHER = Moments.from_samples(draw(600, 10**6, shift=0.3)[0])


def test_the_influence_is_what_more_weight_of_a_vector_does() -> None:
    """A millionth of the weight goes to a vector or leaves it: the distance moves by that times its influence."""
    x, _ = draw(60, 0)
    a = Moments.from_samples(x)
    influence = FrechetComparison.of(a, OTHER).influence(x)
    for row in (0, 7, 31):
        deviation = x[row] - a.mean

        def distance(share: float, deviation: Tensor = deviation) -> float:
            m2 = (1 - share) * a.m2 + share * (1 - share) * a.count * torch.outer(deviation, deviation)
            return frechet_distance(Moments(count=a.count, mean=a.mean + share * deviation, m2=m2), OTHER)

        slope = (distance(1e-6) - distance(-1e-6)) / 2e-6
        of_mean = 2 * float(deviation @ (a.mean - OTHER.mean))
        # The covariance of the distance is m2 / (count - 1), that of the influence's mean of 0 m2 / count.
        assert slope == pytest.approx(of_mean + (float(influence[row]) - of_mean) * 60 / 59, rel=1e-5)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-12 * float(influence.abs().max()))


@pytest.mark.parametrize("num_images", [9, 60, 300], ids=["fewer than dimensions", "some", "many"])
def test_the_standard_error_is_the_spread_of_the_distance(num_images: int) -> None:
    """60 sets: their standard deviation is known to 9 %, so that 30 % are a false alarm once in a thousand."""
    distances, errors, unstratified = [], [], []
    for seed in range(60):
        x, label = draw(num_images, seed)
        a = Moments.from_samples(x)
        distances.append(frechet_distance(a, OTHER))
        influence = FrechetComparison.of(a, OTHER).influence(x)
        errors.append(stratified_standard_error(influence, label))
        unstratified.append(stratified_standard_error(influence, None))
    spread = float(np.std(distances, ddof=1))
    assert np.mean(errors) == pytest.approx(spread, rel=0.3)
    assert np.mean(unstratified) > 1.2 * np.mean(errors), "the classes' share of the spread is fixed"


def test_of_the_other_set_too() -> None:
    """The distance is symmetric: which set is drawn again is the caller's choice."""
    a = Moments.from_samples(draw(300, 0)[0])
    distances, errors = [], []
    for seed in range(60):
        x, label = draw(150, 10 + seed, shift=0.3)
        b = Moments.from_samples(x)
        distances.append(frechet_distance(a, b))
        errors.append(stratified_standard_error(FrechetComparison.of(b, a).influence(x), label))
    assert np.mean(errors) == pytest.approx(float(np.std(distances, ddof=1)), rel=0.3)


def test_of_a_difference_of_two_sets_from_the_same_noise() -> None:
    """The noise that both share cancels: a tenth of what two independent sets would give."""
    differences, errors, independent = [], [], []
    for seed in range(60):
        pair = [draw(90, seed, shift) for shift in (0.0, 0.05)]
        moments = [Moments.from_samples(x) for x, _ in pair]
        influences = [FrechetComparison.of(a, OTHER).influence(x) for (x, _), a in zip(pair, moments, strict=True)]
        differences.append(frechet_distance(moments[0], OTHER) - frechet_distance(moments[1], OTHER))
        label = pair[0][1]
        errors.append(stratified_standard_error(influences[0] - influences[1], label))
        independent.append(math.hypot(*(stratified_standard_error(each, label) for each in influences)))
    assert np.mean(errors) == pytest.approx(float(np.std(differences, ddof=1)), rel=0.3)
    assert np.mean(errors) < 0.2 * np.mean(independent)


def test_the_distance_is_biased_upwards_by_one_over_n() -> None:
    """Of one distribution: twice the images, half the excess."""
    exact = frechet_distance(Moments.from_samples(draw(60_000, 1)[0]), OTHER)
    excess = [
        np.mean([frechet_distance(Moments.from_samples(draw(n, seed)[0]), OTHER) for seed in range(40)]) - exact
        for n in (60, 120, 240)
    ]
    assert excess[0] > 0
    assert excess[0] / excess[1] == pytest.approx(2, rel=0.2)
    assert excess[1] / excess[2] == pytest.approx(2, rel=0.35)


def test_sets_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^b: "):
        FrechetComparison.of(Moments.from_samples(torch.zeros(2, 3)), OTHER)


def test_strata_of_any_size_and_of_one() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 10.0, 12.0, 50.0], dtype=torch.float64)
    stratum = torch.tensor([0, 0, 0, 2, 2, 5])
    deviations = ((values[:3] - values[:3].mean()).square().sum() + 2.0) / 3  # 6 values less 3 strata that have any
    assert stratified_standard_error(values, stratum) == pytest.approx(math.sqrt(float(deviations) / 6))
    assert stratified_standard_error(values, None) == pytest.approx(float(scipy.stats.sem(values.numpy())))
    assert math.isnan(stratified_standard_error(values, torch.arange(6)))
    assert math.isnan(stratified_standard_error(values[:1], None))


@pytest.mark.parametrize(("right", "num_images"), [(0, 7), (7, 7), (296, 300), (987, 1000), (1, 2)])
def test_the_error_of_a_share_is_half_of_wilsons_interval(right: int, num_images: int) -> None:
    level = float(scipy.stats.norm.cdf(1) - scipy.stats.norm.cdf(-1))
    interval = scipy.stats.binomtest(right, num_images).proportion_ci(level, method="wilson")
    low, high = interval.low, interval.high
    if right in (0, num_images):  # scipy cuts the interval off at 0 and 1, where it ends by rounding anyway
        assert min(low, 1 - high) == pytest.approx(0, abs=1e-12)
    assert agreement_standard_error(right / num_images, num_images) == pytest.approx((high - low) / 2)
    assert agreement_standard_error(right / num_images, num_images) > 0
