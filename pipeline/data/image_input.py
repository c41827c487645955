"""From an image file of any common kind to the uint8 array that a dataset stores.

The rules: the camera's rotation (EXIF) is applied; transparency is laid over white; 16-bit grey keeps its upper 8 bits;
everything becomes grey or RGB as the dataset asks; the largest centred rectangle of the dataset's shape (for a square
the largest square) is kept and resized with Lanczos.
"""

import io
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

MAX_PIXELS_LIMIT = 178_000_000
"""Pillow itself refuses images above this many pixels, as decompression bombs."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def load_image(data: bytes, *, image_size: tuple[int, int], channels: int, max_pixels: int) -> NDArray[np.uint8]:
    """Decode an image file and bring it to one size.

    Args:
        data: The file: PNG, JPEG, WebP or BMP, by content and not by name.
        image_size: Height and width of the result in pixels.
        channels: 1 (grey) or 3 (RGB).
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        uint8 [*image_size, channels].

    Raises:
        ValueError: If the file does not decode or is too large; the message is the reason, in one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data, sizes between Pillow's two limits
            with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than max_pixels = {max_pixels}")
                flat = _flatten(PIL.ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    except PIL.UnidentifiedImageError:
        raise ValueError(f"no {', '.join(_FORMATS)} image ({len(data)} bytes)") from None
    except Exception as error:  # damaged files make Pillow's decoders raise errors of many kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    resized = flat.resize(
        image_size[::-1], PIL.Image.Resampling.LANCZOS, box=_centred_box(flat.width, flat.height, image_size)
    )
    pixels = np.array(resized, dtype=np.uint8)
    return pixels if channels == 3 else pixels[:, :, None]


def _centred_box(width: int, height: int, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of the largest rectangle of that shape; edges may lie within a pixel."""
    high, wide = image_size
    if width * high > height * wide:
        box_width, box_height = height * wide / high, float(height)
    else:
        box_width, box_height = float(width), width * high / wide
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def _flatten(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Grey or RGB without transparency."""
    if image.mode.startswith("I"):  # 16 bits per pixel, as I or I;16; convert() would cut the values off at 255
        return PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert(
            mode
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)
