"""The real images: all of them, or some that are spread over the whole split."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.image_stream import join_images
from pipeline.data.manifest import write_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.errors import DatasetError
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.stores.storage import open_store


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> EvaluationDataset:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits")), shard_size=250)
    prepare_source(config, open_source(config), map)
    return EvaluationDataset(config.dataset)


def test_all_images_again_and_again(digits: EvaluationDataset) -> None:
    first, second = (join_images(list(digits.stream("held_out"))) for _ in range(2))
    assert len(first) == 297
    assert np.array_equal(first.images, second.images)


@pytest.mark.parametrize("num_images", [1, 10, 64, 250, 297, 1000])
def test_some_images_are_about_as_many_and_of_the_split(digits: EvaluationDataset, num_images: int) -> None:
    whole = {image.tobytes() for image in join_images(list(digits.stream("train"))).images}
    some = join_images(list(digits.stream("train", num_images)))
    assert num_images <= len(some) <= max(2 * num_images, num_images + 6)
    assert {image.tobytes() for image in some.images} <= whole


def test_a_few_images_of_a_shard_are_spread_over_it(digits: EvaluationDataset) -> None:
    shard = next(digits.stream("train")).images
    few = join_images(list(digits.stream("train", 10))).images
    assert np.array_equal(few, shard[::25])


def test_pixels_of_16_bits_are_not_measured(digits: EvaluationDataset, tmp_path: Path) -> None:
    write_manifest(open_store(str(tmp_path)), dataclasses.replace(digits.manifest, num_levels=65536))
    with pytest.raises(DatasetError, match=r"its pixels have 65536 levels, this program reads 256"):
        EvaluationDataset(str(tmp_path))
