"""Image files of every kind that people have, and the ones that must be refused."""

import io
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from pipeline.data.image_files.unusable import UnusableImage
from pipeline.data.image_input import RESIZE_MODES, ResizeMode, _centred_box, _inner_size, load_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(
    data: bytes, image_size: tuple[int, int] = (8, 8), channels: int = 3, max_pixels: int = 10_000, **options: Any
) -> NDArray[np.uint8]:
    pixels = load_image(data, image_size=image_size, channels=channels, max_pixels=max_pixels, **options)
    assert pixels.dtype == np.uint8 and pixels.shape == (*image_size, channels)
    return pixels


def random_pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_not_touched(channels: int) -> None:
    pixels = random_pixels(8, 8, channels)
    image = PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})):
        if (kind, channels) != ("WEBP", 1):  # WebP has no grey
            assert np.array_equal(load(encode(image, kind, **options), channels=channels), pixels), kind


def test_grey_becomes_rgb_and_rgb_becomes_grey() -> None:
    grey = random_pixels(8, 8)
    assert np.array_equal(load(encode(PIL.Image.fromarray(grey))), np.repeat(grey[:, :, None], 3, axis=2))
    colour = random_pixels(8, 8, 3)
    luma = (colour @ np.array([0.299, 0.587, 0.114]))[:, :, None]  # ITU-R 601
    assert np.abs(load(encode(PIL.Image.fromarray(colour)), channels=1) - luma).max() <= 1


def test_transparency_is_laid_over_white() -> None:
    image = PIL.Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((*GREEN, 0), (0, 0, 4, 8))  # the colour under full transparency must not show
    pixels = load(encode(image))
    assert (pixels[:, :4] == WHITE).all() and (pixels[:, 4:] == RED).all()
    half = load(encode(PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 128))))
    assert np.abs(half.astype(int) - 127).max() <= 1
    grey = load(encode(PIL.Image.new("LA", (8, 8), (0, 0))), channels=1)
    assert (grey == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (0, 0, 4, 8))
    pixels = load(encode(image))
    assert (pixels[:, :4] == GREEN).all() and (pixels[:, 4:] == RED).all()
    pixels = load(encode(image, transparency=1))
    assert (pixels[:, :4] == WHITE).all() and (pixels[:, 4:] == RED).all()


def test_sixteen_bit_and_one_bit_grey() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    pixels = load(encode(PIL.Image.fromarray(ramp)), channels=1)
    assert np.array_equal(pixels[:, :, 0], ramp >> 8)
    assert (load(encode(PIL.Image.new("1", (8, 8), 1))) == 255).all()


def test_cmyk_jpeg() -> None:
    pixels = load(encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - RED).max() <= 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_of_a_camera_is_applied(orientation: int) -> None:
    upright = random_pixels(8, 8, 3)
    # EXIF 1..8: what the camera stored is the upright picture after the inverse of this
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = PIL.Image.fromarray(np.ascontiguousarray(stored))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(load(encode(image, exif=exif)), upright)


def test_the_centre_square_is_kept() -> None:
    for size, box in (((24, 8), (8, 0, 16, 8)), ((8, 24), (0, 8, 8, 16))):
        image = PIL.Image.new("RGB", size, GREEN)
        image.paste(RED, box)
        pixels = load(encode(image))
        assert (pixels == RED).all()


def test_squares_are_cut_and_resized_as_ever() -> None:
    """The bytes of every square dataset that was ever prepared hang on this."""
    rng = np.random.default_rng(1)
    for width, height, side in (*rng.integers(1, 60, (40, 3)).tolist(), [37, 21, 8], [21, 37, 8], [21, 21, 5]):
        image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        least = min(width, height)
        left, top = (width - least) / 2, (height - least) / 2
        expected = image.resize((side, side), PIL.Image.Resampling.LANCZOS, box=(left, top, left + least, top + least))
        assert np.array_equal(load(encode(image), (side, side)), np.asarray(expected)), (width, height, side)


@pytest.mark.parametrize(
    ("size", "box"),  # of the picture (width, height), and what of it is red
    [
        ((80, 24), (20, 0, 60, 24)),  # too wide for 24 x 40
        ((40, 60), (0, 18, 40, 42)),  # too high
        ((40, 24), (0, 0, 40, 24)),
        ((20, 12), (0, 0, 20, 12)),
    ],
)
def test_the_largest_centred_rectangle_is_kept(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = PIL.Image.new("RGB", size, GREEN)
    image.paste(RED, box)
    assert (load(encode(image), (24, 40)) == RED).all()
    turned = load(encode(image.transpose(PIL.Image.Transpose.ROTATE_90)), (40, 24))
    assert (turned == RED).all()


def test_what_is_kept_has_the_shape_that_was_asked_for_and_is_as_large_as_can_be() -> None:
    for width, height, wide, high in np.random.default_rng(2).integers(1, 90, (200, 4)).tolist():
        left, top, right, bottom = _centred_box(width, height, (high, wide))
        assert (right - left) * high == pytest.approx((bottom - top) * wide)
        assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom)
        assert min(left, top) == 0 <= max(left, top), "it touches two edges"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [(24, 40), (40, 24), (8, 8), (1, 7)])
def test_padding_keeps_the_whole_picture_in_the_middle_of_white(image_size: tuple[int, int], channels: int) -> None:
    high, wide = image_size
    for width, height in ((80, 24), (24, 80), (40, 60), (9, 7), (80, 1), (1, 80)):
        pixels = load(encode(PIL.Image.new("RGB", (width, height), RED)), image_size, channels, resize_mode="pad")
        scale = min(high / height, wide / width)
        rows, columns = (np.flatnonzero((pixels != 255).any(axis=2).any(axis=axis)) for axis in (1, 0))
        for found, side, length in ((rows, high, height), (columns, wide, width)):
            assert np.array_equal(found, np.arange(found[0], found[-1] + 1)), "one rectangle"
            assert len(found) == pytest.approx(max(1, length * scale), abs=0.5), "as large as fits, undistorted"
            assert abs(found[0] - (side - 1 - found[-1])) <= 1, "in the middle"
        assert len(rows) == high or len(columns) == wide, "it touches two edges"
        inside = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (inside == (RED if channels == 3 else 76)).all() and pixels.size == high * wide * channels


def test_padding_and_squashing_are_lanczos_over_the_whole_picture() -> None:
    rng = np.random.default_rng(3)
    for width, height, wide, high in rng.integers(1, 60, (40, 4)).tolist():
        image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        squashed = image.resize((wide, high), PIL.Image.Resampling.LANCZOS)
        assert np.array_equal(load(encode(image), (high, wide), resize_mode="squash"), np.asarray(squashed))
        inner_width, inner_height = _inner_size(width, height, (high, wide))
        assert (inner_width == wide or inner_height == high) and inner_width <= wide and inner_height <= high
        top, left = (high - inner_height) // 2, (wide - inner_width) // 2
        inner = image.resize((inner_width, inner_height), PIL.Image.Resampling.LANCZOS)
        padded = load(encode(image), (high, wide), resize_mode="pad")
        assert np.array_equal(padded[top : top + inner_height, left : left + inner_width], np.asarray(inner))


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_pictures_of_the_right_shape_are_the_same_in_every_mode(mode: ResizeMode) -> None:
    for size in ((24, 40), (48, 80), (12, 20)):
        data = encode(PIL.Image.fromarray(random_pixels(*size, 3)))
        assert np.array_equal(load(data, (24, 40), resize_mode=mode), load(data, (24, 40)))


def test_pictures_smaller_than_is_allowed_are_refused_before_they_are_decoded() -> None:
    for size in ((20, 30), (30, 20), (20, 20)):
        data = encode(PIL.Image.new("RGB", size))
        assert load(data, min_size=20).shape == (8, 8, 3)
        with pytest.raises(UnusableImage, match=rf"{size[0]} x {size[1]} pixels: .* below min_size = 21") as caught:
            load(data[:50], min_size=21)
        assert caught.value.kind == "too_small"


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    pixels = load(encode(PIL.Image.fromarray(board.astype(np.uint8))), channels=1)
    assert np.abs(pixels[1:-1, 1:-1].astype(int) - 127).max() <= 2
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    expected = ramp.reshape(8, 8, 8, 8).mean((1, 3))
    assert np.abs(load(encode(PIL.Image.fromarray(ramp)), channels=1)[:, 1:-1, 0] - expected[:, 1:-1]).max() <= 1


def test_small_images_are_enlarged() -> None:
    assert (load(encode(PIL.Image.new("RGB", (1, 3), RED))) == RED).all()


def broken_images() -> dict[str, bytes]:
    image = PIL.Image.fromarray(random_pixels(32, 32, 3))
    png, jpeg = encode(image), encode(image, "JPEG")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"not an image\n" * 10,
        "cut png": png[: len(png) // 2],
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "png header only": png[:33],
        "damaged png": bytes(damaged),
        "icon": encode(image, "ICO"),  # whatever its name says
    }


@pytest.mark.parametrize("kind", list(broken_images()))
def test_what_does_not_decode_is_refused_with_a_reason(kind: str) -> None:
    with pytest.raises(UnusableImage) as caught:
        load(broken_images()[kind])
    assert str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.kind == {"empty": "empty", "icon": "unsupported_format"}.get(kind, "undecodable")
    assert isinstance(caught.value, ValueError)


def test_huge_images_are_refused_before_they_are_decoded() -> None:
    assert load(encode(PIL.Image.new("L", (100, 100))), max_pixels=10_000).shape == (8, 8, 3)
    with pytest.raises(UnusableImage, match="101 x 100 pixels are more than max_pixels = 10000") as caught:
        load(encode(PIL.Image.new("L", (101, 100))), max_pixels=10_000)
    assert caught.value.kind == "too_large"
    bomb = bytearray(encode(PIL.Image.new("L", (8, 8))))
    for side in (12_000, 60_000):  # Pillow warns of the first and refuses the second
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(ValueError, match="pixels"):
            load(bytes(bomb), max_pixels=50_000_000)
