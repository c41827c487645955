"""The first picture of a TIFF file: the tags that say where its pixels are and what they mean, and no others.

Pillow reads every tag, and the EXIF data below one of them, and refuses a file for what is wrong with any. A camera's
raw file is a TIFF too, whose first picture may be a thumbnail: it is refused by name.
"""

import struct

from pipeline.data.image_files.bare_image import UPRIGHT, BareImage
from pipeline.data.image_files.exif import ORIENTATION, Directory, Entry, first_directory
from pipeline.data.image_files.unusable import UnusableImage

_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH = 254, 258, 262, 277, 322, 323
_SUB_DIRECTORIES, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _PROFILE, _DNG_VERSION = 330, 338, 339, 34675, 50706
_KEPT = frozenset(
    # of the picture; 512 to 521 belong to the old kind of JPEG inside, 529 to 532 to YCbCr
    {256, 257, _BITS, 259, _PHOTOMETRIC, 266, 273, _SAMPLES, 278, 279, 284, 292, 293, 317, 320, _TILE_WIDTH,
     _TILE_LENGTH, 324, 325, 332, 334, _EXTRA_SAMPLES, _SAMPLE_FORMAT, 347, *range(512, 522), 529, 530, 531, 532}
)  # fmt: skip
_WHITE_IS_0, _BLACK_IS_0, _MOSAIC, _LINEAR_RAW = 0, 1, 32803, 34892
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_WORDS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}


def bare_tiff(data: bytes) -> BareImage:
    """Reduce a TIFF file to its first picture; one that is damaged stays so.

    Raises:
        UnusableImage: If it is a camera's raw file, or its samples have no white.
    """
    directory = first_directory(data)
    if directory is None:
        return BareImage(format="TIFF", data=data)
    _refuse_raw(directory)
    bits = _refuse_samples(directory)
    photometric = directory.integer(_PHOTOMETRIC, _WHITE_IS_0)
    # of more than 8 bits Pillow knows grey with black at 0 alone, or takes it for that
    is_negative = photometric == _WHITE_IS_0 and bits in (12, 16)
    orientation = directory.integers(ORIENTATION)
    return BareImage(
        format="TIFF",
        data=_without_other_tags(directory, black_is_0=is_negative),
        orientation=orientation[0] if len(orientation) == 1 and 1 <= orientation[0] <= 8 else UPRIGHT,
        profile=directory.value_bytes(_PROFILE) or None,
        grey_bits=12 if bits == 12 else 16,
        is_negative=is_negative,
        largest_block_pixels=directory.integer(_TILE_WIDTH, 0) * directory.integer(_TILE_LENGTH, 0),
    )


def _refuse_raw(directory: Directory) -> None:
    is_thumbnail = directory.integer(_SUBFILE, 0) & 1 and directory.entry(_SUB_DIRECTORIES) is not None
    is_raw = directory.integer(_PHOTOMETRIC, 0) in (_MOSAIC, _LINEAR_RAW) or directory.entry(_DNG_VERSION) is not None
    if is_thumbnail or is_raw or directory.data[8:10] == b"CR":
        raise UnusableImage(
            "unsupported_format", "a camera's raw file is not read; develop it, and store it as PNG or JPEG"
        )


def _refuse_samples(directory: Directory) -> int:
    """Refuse numbers of which nobody knows which is white; the bits of a sample."""
    bits = directory.integer(_BITS, 1)
    kind = directory.integer(_SAMPLE_FORMAT, _UNSIGNED)
    if kind in _WORDS or bits > 16:
        word = _WORDS.get(kind, "unsigned")
        raise UnusableImage(
            "unsupported_pixels",
            f"a TIFF of {bits}-bit {word} samples has no white and no black; convert it to 8 or 16 unsigned bits",
        )
    extra = len(directory.integers(_EXTRA_SAMPLES))
    num = directory.integer(_SAMPLES, 1)
    if num - extra > 4:
        raise UnusableImage("unsupported_pixels", f"a TIFF of {num} channels is no picture; keep 1, 3 or 4 of them")
    return bits


def _without_other_tags(directory: Directory, *, black_is_0: bool) -> bytes:
    """The file with a shorter first directory, after which none comes."""
    order, is_big = directory.byte_order, directory.is_big
    kept = [_entry(directory, entry, black_is_0) for entry in directory.entries if entry.tag in _KEPT]
    count, after = (struct.pack(order + "Q", len(kept)), bytes(8)) if is_big else (
        struct.pack(order + "H", len(kept)), bytes(4)
    )  # fmt: skip
    shorter = b"".join([count, *kept, after])
    end = directory.start + len(shorter)
    # where the file ends with its directory, the offset of the next may be cut off
    return b"".join([directory.data[: directory.start], shorter, directory.data[end:]])


def _entry(directory: Directory, entry: Entry, black_is_0: bool) -> bytes:
    if entry.tag != _PHOTOMETRIC or not black_is_0:
        return entry.raw
    word = "Q" if directory.is_big else "I"
    head = struct.pack(f"{directory.byte_order}HH{word}", entry.tag, 3, 1)
    return head + struct.pack(directory.byte_order + "H", _BLACK_IS_0).ljust(len(entry.raw) - len(head), b"\0")
