"""The picture of a JPEG file: tables, frame and scans, and the two markers that say what its channels are.

All other application data and comments are left out: Pillow reads them, and refuses a file for what is wrong with them.
Of a file with several pictures (MPO, a gain map) only the first is looked at.
"""

import re
from collections.abc import Iterator

from pipeline.data.image_files.bare_image import UPRIGHT, BareImage
from pipeline.data.image_files.exif import orientation_of
from pipeline.data.image_files.unusable import UnusableImage

MAGIC = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_SCAN, _COMMENT = 0xDA, 0xFE
_JFIF, _EXIF, _ICC, _ADOBE = 0xE0, 0xE1, 0xE2, 0xEE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # others in that range are tables
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # no length follows
_ICC_NAME = b"ICC_PROFILE\0"
_FILLING = 64  # bytes, more than any block of 64 coefficients needs to show that it is made of them


def bare_jpeg(data: bytes) -> BareImage:
    """Reduce a JPEG file to its picture; one that is damaged stays so.

    Raises:
        UnusableImage: If its samples do not have 8 bits.
    """
    kept = [data[:2]]
    orientation, profile_parts, position = UPRIGHT, {}, 2
    components: tuple[int, ...] = ()
    for marker, start, body, end in _segments(data):
        position = end
        if marker in _FRAMES and len(body) >= 6:
            if body[0] != 8:
                raise UnusableImage(
                    "unsupported_pixels", f"a JPEG of {body[0]} bits per sample is not read; convert it to 8 bits"
                )
            components = tuple(body[6::3])
        if marker == _SCAN:
            position = start
            break
        if marker == _EXIF and orientation == UPRIGHT and body.startswith(b"Exif\0"):
            orientation = orientation_of(body)
        if marker == _ICC and body.startswith(_ICC_NAME) and len(body) > 14:
            profile_parts[body[12]] = body[14:]
        if not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or _says_what_channels_are(marker, body):
            kept.append(data[start:end])
    scans = data[position:]
    return BareImage(
        format="JPEG",
        data=b"".join([*kept, scans]),
        orientation=orientation,
        profile=b"".join(part for _, part in sorted(profile_parts.items())) or None,
        tails=() if _END in scans else _tails(scans, components),
    )


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Marker, start, content and end of every segment up to the first that is a scan, or is damaged."""
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 3:  # what lies between is junk, and skipped
        marker = data[position + 1]
        if marker == 0xFF:  # filling
            position += 1
        elif marker in _ALONE:
            position += 2
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == _END[1] or end < position + 4 or end > len(data):
                return
            yield marker, position, data[position + 4 : end], end
            if marker == _SCAN:
                return
            position = end


def _says_what_channels_are(marker: int, body: bytes) -> bool:
    """What libjpeg looks at to tell YCbCr from RGB and YCCK from CMYK, and only where it is as long as it must be."""
    return (marker == _JFIF and body.startswith(b"JFIF\0") and len(body) >= 14) or (
        marker == _ADOBE and body.startswith(b"Adobe") and len(body) >= 12
    )


def _tails(scans: bytes, components: tuple[int, ...]) -> tuple[bytes, ...]:
    """What may follow on a file without an end; none if a scan is missing, which the decoder would not miss.

    The decoder makes grey of what is missing. If the bits that follow change nothing, nothing is: neither the pure
    end, nor bits of either kind, nor the next restart marker with bits behind it.
    """
    left = {(component, k) for component in components for k in range(64)}
    for found in re.finditer(rb"\xff\xda", scans):
        body = scans[found.end() + 2 : found.end() + 2 + 64]
        num = body[0] if body else 0
        if len(body) < 4 + 2 * num:
            return ()
        first, last, bits = body[1 + 2 * num : 4 + 2 * num]
        if bits & 15 == 0:  # the lowest bit is sent: of a sequential scan always, of a progressive in its last pass
            left -= {(component, k) for component in body[1 : 1 + 2 * num : 2] for k in range(first, last + 1)}
    if left or not components:
        return ()
    restarts = re.findall(rb"\xff([\xd0-\xd7])", scans)
    expected = 0xD0 + (restarts[-1][0] - 0xD0 + 1) % 8 if restarts else 0xD0
    half = b"\xff" if scans.endswith(b"\xff") else b""  # of a marker: complete it, so that the filling is no marker
    bits_a, bits_b = b"\x55" * _FILLING, b"\xaa" * _FILLING
    whole = b"\xd9" if half else _END
    stuffed = b"\0" if half else b""
    return (
        whole,
        stuffed + bits_a + _END,
        stuffed + bits_b + _END,
        (bytes([expected]) if half else b"\xff" + bytes([expected])) + bits_a + _END,
    )
