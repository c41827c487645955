"""Formats of images: without loss where it is said, what is told in the file, and what does not decode."""

import io
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.JpegImagePlugin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.data.image_formats import AnyImageFormat, Jpeg, Png, WebP, decode_image

FORMATS: list[AnyImageFormat] = [Png(), WebP(), Jpeg()]
TEXTS = {"ddpm:sample_id": "4711", "ddpm:model_digest": "ab" * 32}
images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])))


def picture(channels: int, size: int = 24) -> np.ndarray:
    """A smooth picture with an edge, as far as noise can be one."""
    noise = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(noise).filter(PIL.ImageFilter.GaussianBlur(2))
    pixels = np.asarray(smooth).copy()
    pixels[size // 3 : size // 2, size // 4 :] //= 3
    return pixels[:, :, :channels]


def chunks_of(png: bytes) -> list[tuple[str, bytes]]:
    """The chunks of a PNG, parsed here."""
    chunks, offset = [], 8
    while offset < len(png):
        length, kind = struct.unpack_from(">I4s", png, offset)
        chunks.append((kind.decode(), png[offset + 8 : offset + 8 + length]))
        offset += 12 + length
    return chunks


@pytest.mark.parametrize("image_format", [Png(), WebP()], ids=lambda one: one.name)
@settings(max_examples=50, deadline=None)
@given(image=images)
def test_png_and_webp_keep_every_pixel(image_format: AnyImageFormat, image: np.ndarray) -> None:
    data = image_format.encode(image, TEXTS)
    assert np.array_equal(decode_image(data, image_format.extension), image)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert opened.format == {"png": "PNG", "webp": "WEBP"}[image_format.name]
        assert np.array_equal(np.asarray(opened.convert("RGB")), np.broadcast_to(image, (*image.shape[:2], 3)))


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
def test_a_colour_image_without_colours_stays_one(image_format: AnyImageFormat) -> None:
    grey = np.full((8, 8, 3), 77, np.uint8)
    assert decode_image(image_format.encode(grey), image_format.extension).shape == (8, 8, 3)
    assert decode_image(image_format.encode(grey[:, :, :1]), image_format.extension).shape == (8, 8, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_loses_as_much_as_its_quality_says(channels: int) -> None:
    image = picture(channels)
    errors, sizes = [], []
    for quality in (50, 90, 95, 100):
        data = Jpeg(quality=quality).encode(image)
        decoded = decode_image(data, "jpg")
        assert decoded.shape == image.shape
        errors.append(float(((decoded.astype(float) - image) ** 2).mean()))
        sizes.append(len(data))
        by_pillow = io.BytesIO()
        PIL.Image.fromarray(image.squeeze()).save(by_pillow, "JPEG", quality=quality, subsampling=0)
        assert np.array_equal(decode_image(by_pillow.getvalue(), "jpg"), decoded)
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert 0 < errors[-1] < 1 < errors[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [95, 100])
def test_noise_is_stored_too(quality: int, channels: int) -> None:
    """What an untrained model makes. Pillow's buffer for optimised tables is too small for it, from 256x256 on."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, channels), dtype=np.uint8)
    assert decode_image(Jpeg(quality=quality).encode(noise), "jpg").shape == noise.shape


def test_a_jpeg_has_colours_in_full_resolution_and_comes_in_one_scan() -> None:
    with PIL.Image.open(io.BytesIO(Jpeg().encode(picture(3)))) as opened:
        assert PIL.JpegImagePlugin.get_sampling(opened) == 0
        assert "progressive" not in opened.info


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_that_is_none_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match=f"^quality: must be from 1 to 100, got {quality}; 95"):
        Jpeg(quality=quality)


def test_a_png_tells_its_texts_in_chunks_of_text() -> None:
    chunks = chunks_of(Png().encode(picture(3), TEXTS))
    assert [kind for kind, _ in chunks] == ["IHDR", "tEXt", "tEXt", "IDAT", "IEND"], "no time among them"
    assert [data for kind, data in chunks if kind == "tEXt"] == [
        key.encode() + b"\0" + text.encode() for key, text in TEXTS.items()
    ]
    assert [kind for kind, _ in chunks_of(Png().encode(picture(3)))] == ["IHDR", "IDAT", "IEND"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format", [WebP(), Jpeg()], ids=lambda one: one.name)
def test_webp_and_jpeg_tell_their_texts_in_the_description(image_format: AnyImageFormat, channels: int) -> None:
    with PIL.Image.open(io.BytesIO(image_format.encode(picture(channels), TEXTS))) as opened:
        tags = dict(opened.getexif())
    described = {0x010E: f"ddpm:sample_id=4711 ddpm:model_digest={'ab' * 32}"}
    assert tags == described | ({0x0115: 1} if channels == 1 and image_format.name == "webp" else {})


def test_equal_images_have_equal_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from tests.pipeline.data.test_image_formats import *\n"
        "print([hashlib.sha256(f.encode(picture(c), TEXTS)).hexdigest() for f in FORMATS for c in (1, 3)])"
    )
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    assert said[0] == said[1] and len(set(said[0].split())) == 6


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
def test_what_is_damaged_or_of_another_format_does_not_decode(image_format: AnyImageFormat) -> None:
    extension, data = image_format.extension, image_format.encode(picture(3), TEXTS)
    for cut in (b"", data[:10], data[: len(data) // 2]):
        with pytest.raises(ValueError, match=f"^{extension}: (is no|does not decode)"):
            decode_image(cut, extension)
    for other in FORMATS:
        if other != image_format:
            with pytest.raises(ValueError, match=f"^{extension}: is no"):
                decode_image(other.encode(picture(3)), extension)


def stored(mode: str, codec: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(3)).convert(mode).save(buffer, codec, **options)
    return buffer.getvalue()


def test_other_kinds_of_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="jpg: must be 8-bit grey or RGB, got mode CMYK"):
        decode_image(stored("CMYK", "JPEG"), "jpg")
    transparent = PIL.Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    buffer = io.BytesIO()
    transparent.save(buffer, "WEBP", lossless=True)
    with pytest.raises(ValueError, match="webp: must be 8-bit grey or RGB, got mode RGBA"):
        decode_image(buffer.getvalue(), "webp")


def test_a_webp_that_says_grey_and_has_colours_is_refused() -> None:
    exif = PIL.Image.Exif()
    exif[0x0115] = 1
    with pytest.raises(ValueError, match="webp: says that it is grey, but its channels differ"):
        decode_image(stored("RGB", "WEBP", lossless=True, exif=exif), "webp")


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
def test_arrays_of_another_shape_or_type_are_refused(image_format: AnyImageFormat) -> None:
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"^image: must be uint8"):
            image_format.encode(array)  # type: ignore[arg-type]
