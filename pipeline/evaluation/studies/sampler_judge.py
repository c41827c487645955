"""Measures the images of samplers, and says which differences between two of them are more than chance.

A sampler's figure is a mean of contributions of its images (of the Frechet distance: to first order), and samplers make
the same images' ids from the same noise: the standard error of a difference comes from the differences image by image.
That of two distances also counts that other held-out images might have been drawn, which moves both distances alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm import (
    Estimate,
    FrechetComparison,
    Moments,
    agreement_standard_error,
    stratified_standard_error,
)
from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.evaluation.studies.sampler_table import SamplerRow
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.measuring.measures import PixelClassifier, pixel_moments, pixels
from pipeline.measuring.pixel_distance import PixelDistance, pixel_distance, real_distance

FALSE_ALARMS = 0.05
"""Chance that any two samplers that do not differ are said to, of all pairs with as many evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JudgedSeed:
    """What was measured of one sampler's images of one seed."""

    distance: PixelDistance
    """Frechet distance, and each image's influence."""
    held_out_influence: Float64[Tensor, " m"]
    """Influence of each held-out image on it."""
    is_right: Float64[Tensor, " n"]
    """Whether the classifier reads the class asked for, 1 or 0."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JudgedImages:
    """What was measured of one sampler with one number of evaluations."""

    sampler: str
    """Its name in the table."""
    max_evaluations: int
    """Network evaluations per image that it was allowed."""
    num_evaluations: int
    """Those that it took."""
    seeds: tuple[JudgedSeed, ...]
    """Of each seed."""
    rms_to_reference: float | None
    """See SamplerRow."""

    @property
    def frechet(self) -> Estimate:
        """Mean over the seeds; the error is over images, the held-out ones being the same."""
        value = math.fsum(seed.distance.value for seed in self.seeds) / len(self.seeds)
        errors = (stratified_standard_error(s.distance.influence, s.distance.label) for s in self.seeds)
        return Estimate(value=value, standard_error=math.hypot(*errors) / len(self.seeds))

    @property
    def agreement(self) -> Estimate:
        """Share over all seeds."""
        right = torch.cat([seed.is_right for seed in self.seeds])
        share = float(right.mean())
        return Estimate(value=share, standard_error=agreement_standard_error(share, len(right)))


class SamplerJudge:
    """The figures of merit; real images are read once."""

    def __init__(self, dataset: EvaluationDataset, max_train_images: int, num_images: int) -> None:
        """Fit the classifier, and measure as many real images as there are generated ones.

        Args:
            dataset: The real images.
            max_train_images: Training images to use.
            num_images: Images of each sampler and seed.
        """
        train = join_images(list(dataset.stream("train", max_train_images)))
        held_out = join_images(list(dataset.stream("held_out")))
        self._classifier = PixelClassifier(train)
        self._held_out_pixels = torch.from_numpy(pixels(held_out))
        self._held_out = Moments.from_samples(self._held_out_pixels)
        self.real = real_distance(lambda: [train], len(train), num_images, self._held_out)
        self.real_agreement = self._classifier.agreement([held_out])
        self.real_agreement_standard_error = agreement_standard_error(self.real_agreement, len(held_out))

    def judge(self, made: LabelledImages) -> JudgedSeed:
        """Measure images: the distance of the first of them, if there are more than real ones."""
        first = made[: self.real.num_images]
        of_held_out = FrechetComparison.of(self._held_out, pixel_moments([first], None)[0])
        return JudgedSeed(
            distance=pixel_distance(lambda: [first], self._held_out),
            held_out_influence=of_held_out.influence(self._held_out_pixels),
            is_right=torch.from_numpy(self._classifier.is_right(made)).to(torch.float64),
        )


def rows_of(judged: Sequence[JudgedImages]) -> tuple[SamplerRow, ...]:
    """The rows of the table, each with those of its column that it is surely better than."""
    rows = []
    for one in judged:
        column = [other for other in judged if other.max_evaluations == one.max_evaluations]
        z = threshold(len(column))
        frechet, agreement = one.frechet, one.agreement
        rows.append(
            SamplerRow(
                sampler=one.sampler,
                max_evaluations=one.max_evaluations,
                num_evaluations=one.num_evaluations,
                frechet_pixels=frechet.value,
                label_agreement=agreement.value,
                rms_to_reference=one.rms_to_reference,
                frechet_standard_error=_finite(frechet.standard_error),
                agreement_standard_error=agreement.standard_error,
                frechet_better_than=tuple(o.sampler for o in column if _is_above(frechet_difference(o, one), z)),
                agreement_better_than=tuple(o.sampler for o in column if _is_above(agreement_difference(one, o), z)),
            )
        )
    return tuple(rows)


def threshold(num_samplers: int) -> float:
    """Standard errors beyond which a difference is more than chance, all pairs of a column together (Bonferroni)."""
    num_pairs = max(1, math.comb(num_samplers, 2))
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * num_pairs))


def frechet_difference(a: JudgedImages, b: JudgedImages) -> Estimate:
    """Distance of a less that of b, with its standard error over images and held-out images."""
    errors = [
        stratified_standard_error(of_a.distance.influence - of_b.distance.influence, of_a.distance.label)
        for of_a, of_b in zip(a.seeds, b.seeds, strict=True)
    ]
    # The held-out images are the same for every seed: their influence is averaged first.
    held_out = torch.stack([s.held_out_influence - t.held_out_influence for s, t in zip(a.seeds, b.seeds, strict=True)])
    of_held_out = stratified_standard_error(held_out.mean(0), None)
    return Estimate(
        value=a.frechet.value - b.frechet.value,
        standard_error=math.hypot(math.hypot(*errors) / len(errors), of_held_out),
    )


def agreement_difference(a: JudgedImages, b: JudgedImages) -> Estimate:
    """Share of a less that of b, with its standard error over images."""
    difference = torch.cat([s.is_right - t.is_right for s, t in zip(a.seeds, b.seeds, strict=True)])
    return Estimate(value=float(difference.mean()), standard_error=stratified_standard_error(difference, None))


def _is_above(difference: Estimate, z: float) -> bool:
    """Whether it is above 0 by more than z standard errors; not if these are unknown."""
    return difference.value > 0 and difference.value > z * difference.standard_error


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
