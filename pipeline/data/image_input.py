"""From an image file of any common kind to the uint8 array that a dataset stores.

The rules:
    - Formats, by content and not by name: PNG, JPEG, WebP, BMP, TIFF, GIF, AVIF. Others are refused by name.
    - Pixels decide, metadata do not: of EXIF only the camera's orientation is read, and applied (of AVIF its own
      rotation and mirror); XMP, texts, comments and thumbnails of any size and state are passed over.
    - Of an animation, a file of several pages or several pictures, the first picture counts.
    - Colours become grey or RGB of 8 bits as image_files/colours.py says.
    - A file that was cut off counts only if none of its picture is missing.
    - The picture is brought to the dataset's size by one of three modes, with Lanczos over all pixels (antialiased):
      "crop" keeps the largest centred rectangle of the dataset's shape (for a square the largest square);
      "pad" keeps the whole picture, as large as fits, in the middle of white; "squash" keeps the whole picture and
      gives up its shape. Small pictures are enlarged.
"""

import io
import warnings
from typing import Literal, get_args

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from pipeline.data.image_files.bare_image import UPRIGHT, BareImage
from pipeline.data.image_files.colours import to_grey_or_rgb
from pipeline.data.image_files.exif import orientation_of
from pipeline.data.image_files.image_format import bare_image
from pipeline.data.image_files.unusable import UnusableImage

MAX_PIXELS_LIMIT = 178_000_000
"""Pillow itself refuses images above this many pixels, as decompression bombs."""
ResizeMode = Literal["crop", "pad", "squash"]
"""How a picture gets the dataset's shape."""
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
_TURNS = {  # by EXIF's number: what makes the picture upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def load_image(
    data: bytes,
    *,
    image_size: tuple[int, int],
    channels: int,
    max_pixels: int,
    min_size: int = 1,
    resize_mode: ResizeMode = "crop",
) -> NDArray[np.uint8]:
    """Decode an image file and bring it to one size, by the rules above.

    Args:
        data: The file.
        image_size: Height and width of the result in pixels.
        channels: 1 (grey) or 3 (RGB).
        max_pixels: Larger images (width x height) are refused before they are decoded.
        min_size: Images whose shorter side has fewer pixels are refused before they are decoded.
        resize_mode: "crop", "pad" or "squash".

    Returns:
        uint8 [*image_size, channels].

    Raises:
        UnusableImage: If the file makes no image; its kind and its message, in one line, say why. A ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes between Pillow's two limits
            bare = bare_image(data)
            flat = _whole_picture(bare, "L" if channels == 1 else "RGB", max_pixels, min_size)
    except UnusableImage:
        raise
    except PIL.Image.DecompressionBombError:
        raise UnusableImage("too_large", f"more pixels than {MAX_PIXELS_LIMIT}, the most there may be") from None
    except PIL.UnidentifiedImageError:
        raise UnusableImage(
            "undecodable", f"its header is damaged, or of a kind of {bare.format} that is not read ({len(data)} bytes)"
        ) from None
    except Exception as error:  # damaged files make Pillow's decoders raise errors of many kinds
        raise UnusableImage("undecodable", str(error).strip() or type(error).__name__) from None
    pixels = np.array(_resized(flat, image_size, resize_mode), dtype=np.uint8)
    return pixels if channels == 3 else pixels[:, :, None]


def _whole_picture(bare: BareImage, mode: str, max_pixels: int, min_size: int) -> PIL.Image.Image:
    """The picture; of a file that was cut off, only if what follows on it makes no difference."""
    try:
        return _decode(bare, bare.data, mode, max_pixels, min_size)
    except OSError:
        if not bare.tails:
            raise
        first, *others = bare.tails
        picture = _decode(bare, bare.data + first, mode, max_pixels, min_size)
        if any(_decode(bare, bare.data + tail, mode, max_pixels, min_size) != picture for tail in others):
            raise
        return picture


def _decode(bare: BareImage, data: bytes, mode: str, max_pixels: int, min_size: int) -> PIL.Image.Image:
    """Grey or RGB, upright."""
    with PIL.Image.open(io.BytesIO(data), formats=(bare.format,)) as image:
        num_pixels, orientation = image.width * image.height, bare.orientation
        if num_pixels > max_pixels:
            raise UnusableImage(
                "too_large", f"{image.width} x {image.height} pixels are more than max_pixels = {max_pixels}"
            )
        if bare.largest_block_pixels > max(max_pixels, num_pixels):
            raise UnusableImage(
                "too_large", f"a tile of {bare.largest_block_pixels} pixels is more than max_pixels = {max_pixels}"
            )
        if min(image.size) < min_size:
            raise UnusableImage(
                "too_small", f"{image.width} x {image.height} pixels: the shorter side is below min_size = {min_size}"
            )
        if orientation is None:
            orientation = orientation_of(image.info.get("exif", b""))
        covered = image.tile[0].extents if bare.format == "GIF" else None
        image.load()
        flat = to_grey_or_rgb(image, bare, mode)
        if covered not in (None, (0, 0, *flat.size)):  # the first frame does not cover the canvas, which is transparent
            canvas = PIL.Image.new(mode, flat.size, "white")
            canvas.paste(flat.crop(covered), covered)
            flat = canvas
        return flat if orientation == UPRIGHT else flat.transpose(_TURNS[orientation])


def _resized(image: PIL.Image.Image, image_size: tuple[int, int], resize_mode: ResizeMode) -> PIL.Image.Image:
    size = image_size[::-1]
    lanczos = PIL.Image.Resampling.LANCZOS
    if resize_mode == "crop":
        return image.resize(size, lanczos, box=_centred_box(image.width, image.height, image_size))
    if resize_mode == "squash":
        return image.resize(size, lanczos)
    inner = _inner_size(image.width, image.height, image_size)
    padded = PIL.Image.new(image.mode, size, "white")
    padded.paste(image.resize(inner, lanczos), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return padded


def _centred_box(width: int, height: int, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of the largest rectangle of that shape; edges may lie within a pixel."""
    high, wide = image_size
    if width * high > height * wide:
        box_width, box_height = height * wide / high, float(height)
    else:
        box_width, box_height = float(width), width * high / wide
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def _inner_size(width: int, height: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the whole picture where it touches two edges of that size; at least a pixel each way."""
    high, wide = image_size
    if width * high > height * wide:
        return wide, max(1, (2 * height * wide + width) // (2 * width))
    return max(1, (2 * width * high + height) // (2 * height)), high
