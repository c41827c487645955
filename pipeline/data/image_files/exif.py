"""The first directory of a TIFF file, which is also what EXIF data are; nothing else of it is looked at.

Cameras, phones and editors write directories with impossible types, counts and offsets. Here only the entries that are
asked for are read, so that no other can be in the way.
"""

import struct
from dataclasses import dataclass

from pipeline.data.image_files.bare_image import UPRIGHT

ORIENTATION = 0x0112
_MAGICS = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}  # the last two are wrong, and are written
_BIG_MAGICS = {b"II+\0": "<", b"MM\0+": ">"}  # BigTIFF
TIFF_MAGICS = (*_MAGICS, *_BIG_MAGICS)
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}  # BYTE, SHORT, LONG, ..., LONG8
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_VALUES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An entry of a directory, as it stands there."""

    tag: int
    """What it is."""
    kind: int
    """TIFF's number of the type of its values."""
    count: int
    """How many values it says it has."""
    raw: bytes
    """All of it."""
    value_at: int
    """Where in `raw` the value or its offset begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directory:
    """The first directory of a file."""

    data: bytes
    """The file."""
    byte_order: str
    """For struct: "<" or ">"."""
    is_big: bool
    """BigTIFF: counts and offsets have 8 bytes."""
    start: int
    """Where the number of entries stands."""
    entries: tuple[Entry, ...]
    """As many as the file holds."""

    def integers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag; () if it is not there, is of no integer type, or they cannot be read."""
        entry = self.entry(tag)
        if entry is None or entry.kind not in _INTEGERS or not 1 <= entry.count <= _MOST_VALUES:
            return ()
        found = self.value_bytes(tag)
        layout = f"{self.byte_order}{entry.count}{_INTEGERS[entry.kind]}"
        return struct.unpack(layout, found) if len(found) == struct.calcsize(layout) else ()

    def integer(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return next(iter(self.integers(tag)), default)

    def value_bytes(self, tag: int) -> bytes:
        """The values of a tag as they are stored; cut short where the file is, b"" if it is not there."""
        entry = self.entry(tag)
        if entry is None or entry.kind not in _SIZES:
            return b""
        size = entry.count * _SIZES[entry.kind]
        value = entry.raw[entry.value_at :]
        if size <= len(value):
            return value[:size]
        (offset,) = struct.unpack(f"{self.byte_order}{'Q' if self.is_big else 'I'}", value)
        return self.data[offset : offset + size]

    def entry(self, tag: int) -> Entry | None:
        """The first entry of a tag."""
        return next((entry for entry in self.entries if entry.tag == tag), None)


def first_directory(data: bytes) -> Directory | None:
    """The first directory of a TIFF file or of EXIF data; None if there is none."""
    is_big = data[:4] in _BIG_MAGICS
    order = _BIG_MAGICS.get(data[:4]) if is_big else _MAGICS.get(data[:4])
    if order is None:
        return None
    word, count_layout, entry_size, value_at = ("Q", "Q", 20, 12) if is_big else ("I", "H", 12, 8)
    try:
        (start,) = struct.unpack_from(order + word, data, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(order + count_layout, data, start)
    except (struct.error, OverflowError):
        return None
    entries = []
    position = start + struct.calcsize(order + count_layout)
    for _ in range(min(num_entries, (len(data) - position) // entry_size)):
        raw = data[position : position + entry_size]
        tag, kind, count = struct.unpack_from(f"{order}HH{word}", raw)
        entries.append(Entry(tag=tag, kind=kind, count=count, raw=raw, value_at=value_at))
        position += entry_size
    return Directory(data=data, byte_order=order, is_big=is_big, start=start, entries=tuple(entries))


def orientation_of(exif: bytes) -> int:
    """How the camera was held, by EXIF data of any state.

    Args:
        exif: With or without the "Exif" in front of it.

    Returns:
        1 to 8; 1 (upright) where they do not say it by one integer.
    """
    directory = first_directory(exif[6:] if exif.startswith(b"Exif\0") else exif)
    values = () if directory is None else directory.integers(ORIENTATION)
    return values[0] if len(values) == 1 and 1 <= values[0] <= 8 else UPRIGHT
