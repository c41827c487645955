"""Pictures of many images: every pixel in its place."""

import io

import numpy as np
import PIL.Image
import pytest

from pipeline.data.pictures import class_grid, image_grid


def decode(png: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(png)))


def numbered(num_images: int, channels: int = 1) -> np.ndarray:
    """Images of 2 x 3 pixels that each hold their own number."""
    ids = np.arange(num_images, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(ids, (num_images, 2, 3, channels)).copy()


def cells(picture: np.ndarray, scale: int = 1) -> list[list[int]]:
    """The number in each place of a grid of 2 x 3 images, 255 where there is none."""
    return picture[:: 3 * scale, :: 4 * scale].reshape(-1, -(-picture.shape[1] // (4 * scale))).tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 3])
def test_images_stand_row_by_row_with_a_gap(channels: int, scale: int) -> None:
    picture = decode(image_grid(numbered(5, channels), columns=2, scale=scale))
    assert picture.shape == (8 * scale, 7 * scale, *([3] if channels == 3 else []))
    flat = picture if channels == 1 else picture[:, :, 0]
    assert cells(flat, scale) == [[0, 1], [2, 3], [4, 255]]
    assert (flat[2 * scale : 3 * scale] == 255).all() and (flat[:, 3 * scale : 4 * scale] == 255).all()
    assert (flat[: 2 * scale, : 3 * scale] == 0).all()


def test_small_images_are_enlarged_unless_told_otherwise() -> None:
    assert decode(image_grid(numbered(1), columns=1)).shape == (32, 48)
    high = numbered(1).swapaxes(1, 2)
    assert decode(image_grid(high, columns=1)).shape == (48, 32), "the shorter side counts"
    assert decode(image_grid(np.zeros((1, 64, 64, 3), np.uint8), columns=9)).shape == (64, 64, 3)


def test_one_row_per_class_in_the_order_of_ids() -> None:
    """Ids 0..7 of three classes, three columns: 0 3 6 / 1 4 7 / 2 5."""
    picture = decode(class_grid(numbered(8), num_classes=3, columns=3))
    assert cells(picture, 16) == [[0, 3, 6], [1, 4, 7], [2, 5, 255]]
    assert cells(decode(class_grid(numbered(8), num_classes=3, columns=2)), 16) == [[0, 3], [1, 4], [2, 5]]


def test_fewer_images_than_classes_and_very_many_classes() -> None:
    assert cells(decode(class_grid(numbered(2), num_classes=3, columns=5)), 16) == [[0], [1], [255]]
    assert decode(class_grid(np.zeros((1000, 32, 32, 1), np.uint8), 1000, 10)).shape == (100 * 33 - 1, 32)


def test_equal_images_give_equal_bytes() -> None:
    assert image_grid(numbered(5), 2) == image_grid(numbered(5), 2) != image_grid(numbered(6), 2)


@pytest.mark.parametrize(
    ("images", "columns", "scale", "field"),
    [
        (np.zeros((0, 8, 8, 1), np.uint8), 1, 1, "images"),
        (np.zeros((1, 8, 8, 4), np.uint8), 1, 1, "images"),
        (np.zeros((8, 8), np.uint8), 1, 1, "images"),
        (np.zeros((1, 8, 8, 1), np.uint8), 0, 1, "columns"),
        (np.zeros((1, 8, 8, 1), np.uint8), 1, 0, "scale"),
    ],
)
def test_impossible_grids_are_refused_by_name(images: np.ndarray, columns: int, scale: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        image_grid(images, columns, scale)
