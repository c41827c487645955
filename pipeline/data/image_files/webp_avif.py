"""The picture of WebP and AVIF files, and how their cameras were held.

WebP has it in EXIF data, like JPEG. AVIF has properties of its own (irot, imir), and EXIF does not count there; Pillow
reads it all the same, and refuses a file for what is wrong with it, so it is taken out of sight.
"""

import re
import struct

from pipeline.data.image_files.bare_image import UPRIGHT, BareImage
from pipeline.data.image_files.exif import orientation_of

_ITEM = re.compile(rb"infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2}(?=Exif)", re.DOTALL)  # version, flags, number, protection
_UNKNOWN = b"none"


def bare_webp(data: bytes) -> BareImage:
    """Read a WebP file's orientation; its pixels are for the decoder."""
    orientation, position = UPRIGHT, 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            orientation = orientation_of(data[position + 8 : position + 8 + length])
            break
        position += 8 + length + length % 2
    return BareImage(format="WEBP", data=data, orientation=orientation)


def bare_avif(data: bytes) -> BareImage:
    """Rename an AVIF file's EXIF items, so that the decoder leaves them alone."""
    position = 0
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"meta":
            end = position + length if length else len(data)
            box = bytearray(data[position:end])
            for found in _ITEM.finditer(bytes(box)):
                box[found.end() : found.end() + 4] = _UNKNOWN
            data = b"".join([data[:position], box, data[end:]])
            break
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, position + 8)
        if length < 8:
            break
        position += length
    return BareImage(format="AVIF", data=data, orientation=None)
