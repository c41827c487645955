"""The real images: all of them, or some that are spread over the whole split."""

import numpy as np
import pytest

from pipeline.data.image_stream import join_images
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.measuring.evaluation_dataset import EvaluationDataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> EvaluationDataset:
    config = PrepareConfig(source="digits", output=str(tmp_path_factory.mktemp("digits")), shard_size=250)
    prepare_source(config, open_source(config), map)
    return EvaluationDataset(config.output)


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
