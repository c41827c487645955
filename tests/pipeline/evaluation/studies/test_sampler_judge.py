"""Which differences between samplers are more than chance: none between equals, those between unequal ones."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from ddpm import FrechetComparison, Moments
from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.data.manifest import write_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.errors import ConfigError
from pipeline.evaluation.studies.sampler_judge import (
    JudgedImages,
    JudgedSeed,
    SamplerJudge,
    frechet_difference,
    rows_of,
    threshold,
)
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.measuring.measures import pixel_moments, pixels
from pipeline.measuring.pixel_distance import pixel_distance
from pipeline.stores.storage import open_store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EvaluationDataset:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits")), shard_size=250)
    prepare_source(config, open_source(config), map)
    return EvaluationDataset(config.dataset)


@pytest.fixture(scope="module")
def judge(dataset: EvaluationDataset) -> SamplerJudge:
    return SamplerJudge(dataset, 10_000, 200)


def images(dataset: EvaluationDataset, generator: np.random.Generator, level: float = 0.0) -> LabelledImages:
    """200 training images, twenty of each class in turn; with a share of the noise in them."""
    train = join_images(list(dataset.stream("train")))
    assert train.labels is not None
    rows = np.stack([generator.choice(np.flatnonzero(train.labels == k), 20) for k in range(10)], axis=1).ravel()
    noise = generator.normal(0, 255 * level, (200, 8, 8, 1))
    made = np.clip(train.images[rows] + noise.round(), 0, 255).astype(np.uint8)
    return LabelledImages(images=made, labels=train.labels[rows])


def judged(judge: SamplerJudge, name: str, *seeds: LabelledImages) -> JudgedImages:
    return JudgedImages(
        sampler=name,
        max_evaluations=10,
        num_evaluations=10,
        seeds=tuple(judge.judge(made) for made in seeds),
        rms_to_reference=None,
    )


def test_samplers_that_do_not_differ_are_not_told_apart(dataset: EvaluationDataset, judge: SamplerJudge) -> None:
    """Eight draws of the same distribution, in six tables: a false alarm in any is 0.05 a table at most."""
    alarms = 0
    largest = []
    for table in range(6):
        generator = np.random.default_rng(table)
        samplers = [judged(judge, str(k), images(dataset, generator)) for k in range(8)]
        rows = rows_of(samplers)
        alarms += any(row.frechet_better_than for row in rows) + any(row.agreement_better_than for row in rows)
        distances = [row.frechet_pixels for row in rows]
        largest.append(max(distances) - min(distances))
    assert alarms <= 2  # of 12: more than two come once in fifty with twelve alarms of 0.05 each
    assert min(largest) > 0.03, "nor are they equal: the best of a table differs from the worst by chance"


def test_a_worse_sampler_on_the_same_noise_is_told(dataset: EvaluationDataset, judge: SamplerJudge) -> None:
    """A little noise in the very same images: less than a standard error of either, many of the difference."""
    good = images(dataset, np.random.default_rng(0))
    worse = images(dataset, np.random.default_rng(0), level=0.04)
    pair = [judged(judge, "good", good), judged(judge, "worse", worse)]
    rows = rows_of(pair)
    assert rows[0].frechet_better_than == ("worse",) and rows[1].frechet_better_than == ()
    difference = frechet_difference(pair[1], pair[0])
    apart = math.hypot(*(row.frechet_standard_error or 0 for row in rows))
    assert threshold(2) * difference.standard_error < difference.value < 1.5 * apart


def test_the_error_of_a_difference_is_its_spread_over_images_and_held_out_images(
    dataset: EvaluationDataset, judge: SamplerJudge
) -> None:
    """Drawn again: the images, with or without noise in them, and the held-out ones, from the training images."""
    train = torch.from_numpy(pixels(join_images(list(dataset.stream("train")))))
    differences, errors = [], []
    for draw in range(60):
        held_out = train[torch.from_numpy(np.random.default_rng(draw).integers(1500, size=297))]
        moments = Moments.from_samples(held_out)
        pair = []
        for level in (0.1, 0.0):
            made = images(dataset, np.random.default_rng(100 + draw), level)
            seed = JudgedSeed(
                distance=pixel_distance(lambda made=made: [made], moments),  # type: ignore[misc]
                held_out_influence=FrechetComparison.of(moments, pixel_moments([made], None)[0]).influence(held_out),
                is_right=torch.ones(len(made)),
            )
            pair.append(dataclasses.replace(judged(judge, str(level)), seeds=(seed,)))
        found = frechet_difference(*pair)
        differences.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(differences, ddof=1), rel=0.3)


def test_the_threshold_is_of_all_pairs() -> None:
    assert threshold(2) == pytest.approx(scipy.stats.norm.isf(0.025))
    assert threshold(13) == pytest.approx(scipy.stats.norm.isf(0.05 / 2 / 78))
    assert math.isfinite(threshold(1))


def test_images_too_large_for_covariances_are_refused(dataset: EvaluationDataset, tmp_path: Path) -> None:
    large = dataclasses.replace(dataset.manifest, image_size=(64, 65))
    write_manifest(open_store(str(tmp_path)), large)
    with pytest.raises(ConfigError, match=r"^dataset: .*4,160 values are too large for pixel statistics.*4,096"):
        EvaluationDataset(str(tmp_path)).check_pixel_statistics()
    dataset.check_pixel_statistics()
