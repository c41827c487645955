"""Many images in one picture, as PNG bytes."""

import numpy as np
from jaxtyping import UInt8

from pipeline.data.shards import encode_png

_GAP = 1
_LEAST_SIDE = 32  # pixels
MAX_ROWS = 100
"""Classes that a grid shows, at most."""
_BACKGROUND = 255


def class_grid(images: UInt8[np.ndarray, "n h w c"], num_classes: int, columns: int) -> bytes:
    """One row per class of images in the order of their sample ids, where the class is the id modulo num_classes.

    Args:
        images: uint8 [N, H, W, C] with ids 0 .. N - 1.
        num_classes: Classes; rows of the first 100 are shown.
        columns: Images per row at most.

    Returns:
        A PNG; places without an image are white.

    Raises:
        ValueError: As image_grid.
    """
    num_rows = min(num_classes, MAX_ROWS)
    num_columns = min(columns, max(1, -(-len(images) // num_classes)))
    cells = np.full((num_rows, num_columns, *images.shape[1:]), _BACKGROUND, dtype=np.uint8)
    for sample_id, image in enumerate(images):
        column, row = divmod(sample_id, num_classes)
        if row < num_rows and column < num_columns:
            cells[row, column] = image
    return image_grid(cells.reshape(-1, *images.shape[1:]), columns=num_columns)


def image_grid(images: UInt8[np.ndarray, "n h w c"], columns: int, scale: int | None = None) -> bytes:
    """Images side by side, row by row; equal images give equal bytes.

    Args:
        images: uint8 [N, H, W, C], C = 1 (grey) or 3 (colour), N >= 1.
        columns: Images per row; the last row may be short, a single one is only as wide as it must be.
        scale: Enlargement of each pixel; None enlarges small images so that they can be seen.

    Returns:
        A PNG with a white gap of one (scaled) pixel between the images.

    Raises:
        ValueError: If there is no image, C is neither 1 nor 3, or columns or scale are not positive.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[3] not in (1, 3):
        raise ValueError(f"images: must be [N, H, W, 1 or 3] with N >= 1, got {list(images.shape)}; convert them first")
    scale = max(1, _LEAST_SIDE // min(images.shape[1:3])) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}; choose a positive number")
    num_images, height, width, channels = images.shape
    columns = min(columns, num_images)
    rows = -(-num_images // columns)
    cells = np.full((rows * columns, height + _GAP, width + _GAP, channels), _BACKGROUND, dtype=np.uint8)
    cells[:num_images, :height, :width] = images
    grid = cells.reshape(rows, columns, height + _GAP, width + _GAP, channels).swapaxes(1, 2)
    canvas = grid.reshape(rows * (height + _GAP), columns * (width + _GAP), channels)[:-_GAP, :-_GAP]
    canvas = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    return encode_png(canvas)
