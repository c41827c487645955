"""An image file reduced to its picture: what the readers of the formats hand to the decoder."""

from dataclasses import dataclass

UPRIGHT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BareImage:
    """A file that decodes to the picture of another, and what the decoder cannot know of it."""

    format: str
    """Pillow's name of the format."""
    data: bytes
    """The file; metadata that could stop a decoder are gone."""
    orientation: int | None = UPRIGHT
    """EXIF's number, 1 to 8: how the camera was held. None: the decoder knows it (AVIF, where EXIF does not count)."""
    profile: bytes | None = None
    """The ICC profile of pixels that mean nothing without one: inks (CMYK)."""
    grey_bits: int = 16
    """How many bits of a 16-bit grey sample are used; white is 2^bits - 1."""
    is_negative: bool = False
    """Whether the decoder takes black for white."""
    transparent_rgb16: tuple[int, int, int] | None = None
    """Pixels of this colour, of 16 bits per channel, are transparent."""
    largest_block_pixels: int = 0
    """Pixels that the decoder holds at once beside the picture (a tile of a TIFF), 0 if it holds none."""
    tails: tuple[bytes, ...] = ()
    """What may stand where the file was cut off: if the picture is the same with each, none of it is missing."""
