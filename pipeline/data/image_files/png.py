"""The picture of a PNG file: header, palette, transparency, pixels. What else it holds is not even inflated.

Texts, profiles and the like are left out because Pillow reads them, and refuses a file for what is wrong with them or
for their size. An ancillary chunk with a wrong checksum, or a transparency of a wrong length, does not count, as for
libpng. Of an animated PNG the default image is the picture: the first frame, in nearly all of them.
"""

import struct
import zlib

from pipeline.data.image_files.bare_image import UPRIGHT, BareImage
from pipeline.data.image_files.exif import orientation_of

MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER, _PALETTE, _TRANSPARENCY, _PIXELS, _END, _EXIF = b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"
_GREY, _RGB, _INDEXED = 0, 2, 3


def bare_png(data: bytes) -> BareImage:
    """Reduce a PNG file to its picture; one that is damaged stays so."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[: len(MAGIC)]]
    depth = colour = num_colours = 0
    orientation, transparent_rgb16 = UPRIGHT, None
    has_pixels, position = False, len(MAGIC)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        body, end = view[position + 8 : position + 8 + length], position + 12 + length
        if name == _HEADER and length >= 13:
            depth, colour = body[8], body[9]
        if name == _PALETTE:
            num_colours = length // 3
        if name == _TRANSPARENCY and not has_pixels and _is_sound(view, position, end):
            chunk, transparent_rgb16 = _transparency(bytes(body), colour, depth, num_colours)
            kept.append(chunk)
        elif name == _EXIF and _is_sound(view, position, end):
            orientation = orientation_of(bytes(body))
        elif name in (_HEADER, _PIXELS, _END) or (name == _PALETTE and colour == _INDEXED):
            kept.append(view[position:end])
        has_pixels = has_pixels or name == _PIXELS
        if name == _END:
            break
        position = end
    return BareImage(format="PNG", data=b"".join(kept), orientation=orientation, transparent_rgb16=transparent_rgb16)


def _transparency(body: bytes, colour: int, depth: int, num_colours: int) -> tuple[bytes, tuple[int, int, int] | None]:
    """The chunk for Pillow, and the transparent colour that Pillow, which has 8 bits for each channel, cannot tell."""
    if colour == _GREY and len(body) == 2:
        (level,) = struct.unpack(">H", body)
        if depth in (2, 4):  # Pillow spreads the pixels over 0..255, and forgets to spread this
            most = (1 << depth) - 1
            level = (level & most) * 255 // most
        return _chunk(_TRANSPARENCY, struct.pack(">H", level)), None
    if colour == _RGB and len(body) == 6:
        red, green, blue = struct.unpack(">3H", body)
        return (b"", (red, green, blue)) if depth == 16 else (_chunk(_TRANSPARENCY, body), None)
    if colour == _INDEXED and 0 < len(body) <= num_colours:
        return _chunk(_TRANSPARENCY, body), None
    return b"", None


def _is_sound(view: memoryview, position: int, end: int) -> bool:
    """Whether the chunk is whole and its checksum right."""
    return end <= len(view) and zlib.crc32(view[position + 4 : end - 4]).to_bytes(4, "big") == view[end - 4 : end]


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
