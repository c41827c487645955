"""From the pixels of any image to grey or RGB of 8 bits, by rules that stand here and nowhere else.

The rules:
    - A palette's colours are looked up. One bit is black and white.
    - Transparency, of a channel, a palette or one colour, is laid over white: what is wholly transparent is white,
      whatever its colour. A BMP whose alpha is 0 everywhere is opaque: its writer did not use those bytes.
    - Of 16 bits the upper 8 are kept (12 bits: likewise), in grey and in colour. Rounding to the nearest of 256 levels
      would make the first and the last half as wide as the others, and change images of 8 bits that were stored as
      16 by a shift; viewers cut off too.
    - Inks (CMYK; of a JPEG inverted, as Photoshop stores them, and everybody since) become sRGB by the profile that the
      file holds (littleCMS, perceptual intent); without one, or with a damaged one, red = (255 - cyan)(255 - black) /
      255, and so on. CIELAB becomes sRGB.
    - Profiles of RGB and grey images, and PNG's gamma, do not count: the numbers are taken as sRGB, as is common for
      diffusion sets. An image in Adobe RGB or Display P3 looks a little paler than in a viewer that obeys its profile.
    - Grey is 0.299 red + 0.587 green + 0.114 blue (ITU-R 601), of the numbers as they are.
    - Samples without a white (floating-point, signed, 32 bits) are refused: which value is white, only you know.
"""

import functools
import io
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms

from pipeline.data.image_files.bare_image import BareImage
from pipeline.data.image_files.unusable import UnusableImage

_OPAQUE, _WHITE = 255, 255


def to_grey_or_rgb(image: PIL.Image.Image, bare: BareImage, mode: str) -> PIL.Image.Image:
    """The colours of a decoded image, by the rules above.

    Args:
        image: As Pillow decodes `bare`, loaded.
        bare: What Pillow does not know of it.
        mode: "L" for grey, "RGB" for colour.

    Raises:
        UnusableImage: If its samples have no white.
    """
    if image.mode.startswith("I;16"):
        return _from_16_bits(image, bare).convert(mode)
    if image.mode in ("I", "F"):
        raise UnusableImage(
            "unsupported_pixels",
            f"samples of Pillow's mode {image.mode} have no white and no black; convert them to 8 or 16 unsigned bits",
        )
    if image.mode == "CMYK":
        image = _from_inks(image, bare.profile)
    elif image.mode == "LAB":
        image = _in_srgb(image, PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("LAB")))
    elif image.mode == "La":  # premultiplied; Pillow would drop its alpha
        image = image.convert("LA")
    if bare.transparent_rgb16 is not None:
        image.putalpha(_opacity(image, bare, bare.transparent_rgb16))
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def _from_16_bits(image: PIL.Image.Image, bare: BareImage) -> PIL.Image.Image:
    levels = np.asarray(image)
    upper = (levels >> (bare.grey_bits - 8)).clip(0, 255).astype(np.uint8)
    if bare.is_negative:
        upper = 255 - upper
    transparent = image.info.get("transparency")
    if transparent is not None:
        upper = np.where(levels == transparent, np.uint8(_WHITE), upper)
    return PIL.Image.fromarray(upper)


def _from_inks(image: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    if profile is not None:
        with suppress(PIL.ImageCms.PyCMSError, OSError):  # no profile, or not one of inks
            return _in_srgb(image, PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    return image.convert("RGB")


def _in_srgb(image: PIL.Image.Image, profile: Any) -> PIL.Image.Image:
    converted = PIL.ImageCms.profileToProfile(image, profile, _srgb(), outputMode="RGB")
    assert converted is not None, "not in place"
    return converted


@functools.cache
def _srgb() -> Any:
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB"))


def _opacity(image: PIL.Image.Image, bare: BareImage, transparent: tuple[int, int, int]) -> PIL.Image.Image:
    """0 where a 16-bit colour is the transparent one. Pillow has the upper bytes, and is made to decode the lower."""
    with PIL.Image.open(io.BytesIO(bare.data), formats=(bare.format,)) as again:
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
        lower = np.asarray(again).astype(np.uint16)
    levels = (np.asarray(image).astype(np.uint16) << 8) | lower
    is_transparent = (levels == np.array(transparent, np.uint16)).all(axis=2)
    return PIL.Image.fromarray(np.where(is_transparent, np.uint8(0), np.uint8(_OPAQUE)))
