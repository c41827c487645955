"""Sizes of images in words: read as they are written, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.image_size import MAX_SIDE, format_image_size, parse_image_size

sides = st.integers(1, MAX_SIDE)


@given(height=sides, width=sides)
def test_what_is_written_is_read(height: int, width: int) -> None:
    assert parse_image_size(format_image_size((height, width))) == (height, width)
    assert parse_image_size(f"{height}x{width}") == (height, width)


@given(side=sides)
def test_one_number_is_a_square(side: int) -> None:
    assert parse_image_size(side) == parse_image_size(str(side)) == (side, side)
    assert format_image_size((side, side)) == str(side)


@given(text=st.text("0123456789x -+_", max_size=9) | st.text(max_size=5))
def test_whatever_is_read_is_in_range_and_the_rest_is_one_line(text: str) -> None:
    try:
        size = parse_image_size(text)
    except ValueError as error:
        assert str(error).startswith("image_size: must be ") and "\n" not in str(error)
    else:
        assert all(1 <= side <= MAX_SIDE for side in size) and text in (format_image_size(size), "{}x{}".format(*size))


BAD = ["", "0", "x", "24x", "x40", "24x40x3", "0x8", "4097", "8x4097", "-8", "08", "8 x 8", "8X8", "8.0", "\u0664", -1]


@pytest.mark.parametrize("text", BAD)
def test_other_texts_are_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"^image_size: must be height x width such as 24x40.*; try 64$"):
        parse_image_size(text)
