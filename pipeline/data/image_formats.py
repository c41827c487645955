"""How images are stored: PNG, lossless WebP or JPEG, to bytes and back. Pillow does the coding.

Equal pixels, options and texts give equal bytes with equal versions of Pillow's codecs; nothing that is written holds a
time or a machine. What else is known of an image may be carried in it: PNG has text chunks for that (tEXt), WebP and
JPEG the description of EXIF.

WebP knows no grey: a grey image is stored in three equal channels, with EXIF's count of samples per pixel at 1, and
`decode_image` gives one channel back.
"""

import abc
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.PngImagePlugin
from numpy.typing import NDArray

from ddpm.variants import check_variant_name

Extension = Literal["png", "webp", "jpg"]
"""How the name of an image's file ends, which says how it is coded."""
EXTENSIONS: tuple[Extension, ...] = get_args(Extension)
_CODECS: dict[Extension, str] = {"png": "PNG", "webp": "WebP", "jpg": "JPEG"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFormat(abc.ABC):
    """How an image is stored."""

    extension: ClassVar[Extension]
    """How the names of its files end."""

    name: str
    """Which format."""

    def __post_init__(self) -> None:
        """Refuse impossible values of the format's options."""
        check_variant_name(self)
        self.check()

    def check(self) -> None:  # noqa: B027 - not every format has options
        """Refuse impossible values of the format's own options.

        Raises:
            ValueError: Names the field.
        """

    @property
    @abc.abstractmethod
    def words(self) -> str:
        """What people call it."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever measures the stored images should know."""
        return ()

    def encode(self, image: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
        """Encode an image.

        Args:
            image: Pixels [H, W, C], uint8, C = 1 (grey) or 3 (RGB).
            texts: What to say in the file of the image, by key; ASCII without spaces.

        Raises:
            ValueError: If the array has another type or shape.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ValueError(f"image: must be uint8 [H, W, 1 or 3], got {image.dtype} {image.shape}")
        buffer = io.BytesIO()
        picture = PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        picture.save(buffer, format=_CODECS[self.extension], **self._options(picture, texts or {}))
        return buffer.getvalue()

    @abc.abstractmethod
    def _options(self, picture: PIL.Image.Image, texts: Mapping[str, str]) -> dict[str, Any]:
        """Options of Pillow's `save`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Png(ImageFormat):
    """PNG, without loss."""

    extension: ClassVar[Extension] = "png"

    name: Literal["png"] = "png"
    """PNG, without loss."""

    @property
    def words(self) -> str:
        """See ImageFormat.words."""
        return "PNG"

    def _options(self, picture: PIL.Image.Image, texts: Mapping[str, str]) -> dict[str, Any]:
        chunks = PIL.PngImagePlugin.PngInfo()
        for key, value in texts.items():
            chunks.add_text(key, value)
        return {"pnginfo": chunks}


@dataclass(frozen=True, kw_only=True, slots=True)
class WebP(ImageFormat):
    """WebP, without loss; smaller than PNG."""

    extension: ClassVar[Extension] = "webp"

    name: Literal["webp"] = "webp"
    """WebP, without loss; smaller than PNG."""

    @property
    def words(self) -> str:
        """See ImageFormat.words."""
        return "lossless WebP"

    def _options(self, picture: PIL.Image.Image, texts: Mapping[str, str]) -> dict[str, Any]:
        # Effort 1 of 6, quality 0: on natural-looking 256x256 images as small as effort 4 to 0.1%, in an eighth of its
        # time, about that of PNG; effort 6 saves 4% and takes 300 times as long. Effort 0 is four times as quick, but
        # larger than PNG on 32x32 digits.
        return {"lossless": True, "method": 1, "quality": 0, "exif": _exif(texts, is_grey=picture.mode == "L")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpeg(ImageFormat):
    """JPEG, which loses detail; smallest and quickest."""

    extension: ClassVar[Extension] = "jpg"

    name: Literal["jpeg"] = "jpeg"
    """JPEG, which loses detail."""
    quality: int = 95
    """From 1 to 100: how much of the detail is kept; also at 100 not all. Colour is kept in full resolution (4:4:4)."""

    def check(self) -> None:
        """See ImageFormat.check."""
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: must be from 1 to 100, got {self.quality}; 95 is a good start")

    @property
    def words(self) -> str:
        """See ImageFormat.words."""
        return f"JPEG of quality {self.quality}, which loses detail"

    @property
    def warnings(self) -> tuple[str, ...]:
        """See ImageFormat.warnings."""
        return (f"the images are stored as {self.words}: what is measured is what is stored",)

    def _options(self, picture: PIL.Image.Image, texts: Mapping[str, str]) -> dict[str, Any]:
        # All that decides the bytes is said here. 4:4:4, since half the colours of a 32x32 image would be seen to be
        # missing. Tables of Huffman codes made for each image would save 20 to 26% at that size, 6% at 256x256, but
        # Pillow's buffer is too small for them where an image is noise: it fails ("broken data stream").
        exif = {"exif": _exif(texts, is_grey=False)} if texts else {}
        return {"quality": self.quality, "subsampling": "4:4:4", "optimize": False, "progressive": False, **exif}


AnyImageFormat = Png | WebP | Jpeg
"""One of the formats, with its options."""


def _exif(texts: Mapping[str, str], *, is_grey: bool) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    if texts:
        exif[PIL.ExifTags.Base.ImageDescription] = " ".join(f"{key}={value}" for key, value in texts.items())
    if is_grey:
        exif[PIL.ExifTags.Base.SamplesPerPixel] = 1
    return exif


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, C], C = 1 or 3, without loss and without metadata.

    Raises:
        ValueError: If the array has another type or shape.
    """
    return Png().encode(image)


def decode_image(data: bytes, extension: Extension) -> NDArray[np.uint8]:
    """Decode an image to uint8 [H, W, C], C = 1 (grey) or 3 (RGB).

    Args:
        data: The bytes of its file.
        extension: How the name of its file ends.

    Raises:
        ValueError: If the bytes are no such image of 8-bit grey or RGB.
    """
    pixels = _decode(data, extension, ("L", "RGB"), convert_to=None)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG to uint8 [H, W, C], C = 1 (grey) or 3 (RGB).

    Raises:
        ValueError: If it is not such a PNG.
    """
    return decode_image(data, "png")


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Which pixels [H, W] of a PNG are white and opaque: whose channels are all in the upper half of their range.

    Raises:
        ValueError: If it is no PNG of at most 8 bits per channel.
    """
    channels = _decode(data, "png", ("1", "L", "LA", "P", "PA", "RGB", "RGBA"), convert_to="RGBA")
    return np.asarray((channels >= 128).all(axis=2))


def _decode(data: bytes, extension: Extension, modes: tuple[str, ...], convert_to: str | None) -> NDArray[np.uint8]:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=(_CODECS[extension],)) as image:
            if image.mode not in modes:
                kinds = "8-bit grey or RGB" if convert_to is None else "8-bit"
                raise ValueError(f"{extension}: must be {kinds}, got mode {image.mode}")
            # A copy: writable, and independent of the file.
            pixels = np.array(image if convert_to is None else image.convert(convert_to))
            is_grey = extension == "webp" and image.getexif().get(PIL.ExifTags.Base.SamplesPerPixel) == 1
    except PIL.UnidentifiedImageError:  # its own words hold the address of the buffer
        raise ValueError(f"{extension}: is no {_CODECS[extension]}, or its header is damaged") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{extension}: does not decode: {error}") from None
    if not is_grey:
        return pixels
    if (pixels != pixels[:, :, :1]).any():
        raise ValueError(f"{extension}: says that it is grey, but its channels differ")
    return pixels[:, :, :1].copy()
