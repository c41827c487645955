"""Files of images, most of them odd, each with what must become of it: a picture, or a refusal of a kind."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

HEIGHT, WIDTH = 10, 14
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
PICTURE: NDArray[np.uint8] = np.stack([_X * 18, _Y * 25, (_X + _Y) * 10 + 5], axis=-1).astype(np.uint8)
"""Smooth, and different after every turn: [10, 14, 3]."""
GREY: NDArray[np.uint8] = (_X * 9 + _Y * 13).astype(np.uint8)
WHITE = np.full_like(PICTURE, 255)
LOSSY = 14
"""How far a lossy format may take a value of PICTURE."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file and its outcome."""

    data: bytes
    picture: NDArray[np.uint8] | None = None
    """uint8 [h, w, 3]; None: it is refused."""
    tolerance: int = 0
    kind: str = ""
    """Of the refusal."""
    says: str = ""
    """What its reason holds."""


def shown(data: bytes, picture: NDArray[Any] = PICTURE, tolerance: int = 0) -> Case:
    picture = np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else picture
    return Case(data=data, picture=picture.astype(np.uint8), tolerance=tolerance)


def refused(data: bytes, kind: str, says: str = "") -> Case:
    return Case(data=data, kind=kind, says=says)


def encode(image: PIL.Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def over_white(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.uint8]:
    """The formula, in floating point."""
    share = alpha[..., None].astype(float) / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def turned(picture: NDArray[Any], orientation: int) -> NDArray[Any]:
    """What a camera stored of an upright picture, by EXIF's number."""
    return {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
        6: np.rot90(picture, 1), 7: picture[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(picture, -1),
    }[orientation]  # fmt: skip


# ---------------------------------------------------------------- EXIF


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HHI", tag, kind, count) + value[:4].ljust(4, b"\0")


def short(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "H", value)


def long(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "I", value)


def orientation(value: int = 6, order: str = "<") -> bytes:
    return entry(0x0112, 3, 1, short(value, order), order)


def exif(entries: Sequence[bytes], order: str = "<", *, following: int = 0, count: int | None = None) -> bytes:
    """EXIF data of one directory, without the "Exif" in front."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + long(8, order)
    num = len(entries) if count is None else count
    return head + short(num, order) + b"".join(entries) + long(following, order) + bytes(16)


def odd_entries(order: str = "<") -> dict[str, bytes]:
    """Entries that mean nothing; a directory with one of them is as good as any."""
    beyond = long(0x7FFFFFF0, order)
    return {
        "resolution as bytes": entry(0x011A, 1, 4, b"\1\2\3\4", order),
        "resolution as text": entry(0x011A, 2, 4, b"abc\0", order),
        "resolution is no number": entry(0x011A, 11, 1, struct.pack(order + "f", float("nan")), order),
        "resolution beyond the end": entry(0x011A, 5, 1, beyond, order),
        "resolution of 0/0": entry(0x011A, 5, 1, long(26 + 12, order), order),
        "resolution of 2 values": entry(0x011A, 3, 2, short(72, order) * 2, order),
        "negative width": entry(0x0100, 9, 1, struct.pack(order + "i", -5), order),
        "count of four thousand million": entry(0x010F, 2, 0xFFFFFFFF, long(8, order), order),
        "count of 0": entry(0x010F, 2, 0, bytes(4), order),
        "type 0": entry(0x010F, 0, 1, bytes(4), order),
        "type 999": entry(0x010F, 999, 1, b"\xff" * 4, order),
        "text beyond the end": entry(0x0132, 2, 20, beyond, order),
        "text that is no text": entry(0x010E, 2, 4, b"\xff\xfe\x00\xd8", order),
        "maker's note beyond the end": entry(0x927C, 7, 60000, long(8, order), order),
        "EXIF directory is this one": entry(0x8769, 4, 1, long(8, order), order),
        "EXIF directory beyond the end": entry(0x8769, 4, 1, beyond, order),
        "EXIF directory of 2 numbers": entry(0x8769, 3, 2, short(8, order) * 2, order),
        "GPS directory is this one": entry(0x8825, 4, 1, long(8, order), order),
        "GPS directory as text": entry(0x8825, 2, 4, b"abc\0", order),
        "interoperability at 0": entry(0xA005, 4, 1, bytes(4), order),
        "sub-directories": entry(0x014A, 4, 0x10000000, long(8, order), order),
    }


# ---------------------------------------------------------------- PNG


def chunk(name: bytes, body: bytes, *, is_sound: bool = True) -> bytes:
    checksum = zlib.crc32(name + body) ^ (0 if is_sound else 1)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png(
    rows: NDArray[Any], colour: int, depth: int, *extra: bytes, after: bytes = b"", size: tuple[int, int] | None = None
) -> bytes:
    """A PNG of given samples, without filters.

    Args:
        rows: [h, bytes of a row] as PNG stores them.
        colour: PNG's colour type.
        depth: Bits per sample.
        extra: Chunks before the pixels.
        after: Bytes after the pixels, before the end.
        size: Width and height; None: of rows of whole samples, one byte each.
    """
    height, width = rows.shape if size is None else size[::-1]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *extra,
            chunk(b"IDAT", zlib.compress(raw)),
            after,
            chunk(b"IEND", b""),
        ]
    )


def rgb_png(*extra: bytes, picture: NDArray[Any] = PICTURE, after: bytes = b"") -> bytes:
    height, width = picture.shape[:2]
    rows = np.ascontiguousarray(picture).reshape(height, width * 3)
    return png(rows, 2, 8, *extra, after=after, size=(width, height))


# ---------------------------------------------------------------- JPEG


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*segments: bytes, picture: NDArray[Any] | PIL.Image.Image = PICTURE, **options: Any) -> bytes:
    """A JPEG with these segments before its own."""
    sampling: dict[str, Any] = {"quality": 95, "subsampling": 0}
    data = encode(
        np.ascontiguousarray(picture) if isinstance(picture, np.ndarray) else picture, "JPEG", **(sampling | options)
    )
    return data[:2] + b"".join(segments) + data[2:]


def exif_segment(data: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + data)
