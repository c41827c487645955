"""The reader of one directory: whatever the bytes are, it answers; where they are sound, it agrees with Pillow."""

import struct

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.image_files.exif import first_directory, orientation_of
from tests.pipeline.data.image_files.cases import entry, exif, long, odd_entries, orientation, short

_BLOCK = exif([*odd_entries().values(), orientation()])


@given(st.binary(max_size=200), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0", b"Exif\0\0II*\0"]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_have_an_orientation(data: bytes, head: bytes) -> None:
    assert 1 <= orientation_of(head + data) <= 8


@given(st.integers(0, len(_BLOCK) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_byte_may_be_wrong(at: int, value: int) -> None:
    assert 1 <= orientation_of(_BLOCK[:at] + bytes([value]) + _BLOCK[at + 1 :]) <= 8
    assert 1 <= orientation_of(_BLOCK[:at]) <= 8


def test_counts_that_no_computer_could_hold() -> None:
    big = b"II+\0\x08\0\0\0" + struct.pack("<QQHHQQ", 16, 1, 0x0112, 3, 1 << 63, 6)
    assert (
        orientation_of(big) == 1 and orientation_of(big.replace(struct.pack("<Q", 1 << 63), struct.pack("<Q", 1))) == 6
    )


@pytest.mark.parametrize("value", range(1, 9))
def test_what_pillow_writes_is_read(value: int) -> None:
    written = PIL.Image.Exif()
    written[0x0112], written[0x010F], written[0x011A] = value, "a maker of cameras", 300.0
    assert orientation_of(written.tobytes()) == value
    assert orientation_of(written.tobytes().removeprefix(b"Exif\0\0")) == value


@pytest.mark.parametrize("order", ["<", ">"])
def test_integers_lie_in_the_entry_or_elsewhere(order: str) -> None:
    directory = first_directory(
        exif(
            [
                entry(1, 3, 2, short(7, order) + short(9, order), order),
                entry(3, 2, 3, b"abc", order),
                entry(4, 4, 1, long(1 << 31, order), order),
            ],
            order,
        )
    )
    assert directory is not None
    assert directory.integers(1) == (7, 9) and directory.integer(4, 0) == 1 << 31
    assert directory.integers(3) == () and directory.value_bytes(3) == b"abc"
    assert directory.integers(99) == () and directory.integer(99, 5) == 5
    far = exif([entry(2, 3, 3, long(26 + 12, order), order)], order)[: 8 + 2 + 12].ljust(38, b"\0")
    values = first_directory(far + short(1, order) + short(2, order) + short(3, order))
    assert values is not None and values.integers(2) == (1, 2, 3)
    cut = first_directory(far + short(1, order))
    assert cut is not None and cut.integers(2) == ()
