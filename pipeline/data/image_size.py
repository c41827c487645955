"""Sizes of images as people write them: "24x40" is 24 pixels high and 40 wide, "32" is a square."""

import re

MAX_SIDE = 4096
"""Pixels; a guess at what nobody trains on, and a guard against slips of the keyboard."""
_SIZE = re.compile(r"([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,3}))?")


def parse_image_size(text: str | int) -> tuple[int, int]:
    """Height and width, in pixels.

    Args:
        text: "HEIGHTxWIDTH", or one number for a square.

    Raises:
        ValueError: If it is neither, or a side is not in [1, 4096].
    """
    match = _SIZE.fullmatch(str(text))
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= height <= MAX_SIDE or not 1 <= width <= MAX_SIDE:
        raise ValueError(
            f"image_size: must be height x width such as 24x40, or one side such as 32, of 1 to {MAX_SIDE} pixels, got "
            f"{text!r}; try 64"
        )
    return height, width


def format_image_size(size: tuple[int, int]) -> str:
    """What `parse_image_size` reads as this height and width."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"
