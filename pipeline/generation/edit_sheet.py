"""The contact sheet of an edit: what was given above what came out of it."""

import numpy as np
from jaxtyping import UInt8

from pipeline.data.pictures import image_grid
from pipeline.generation.edit_inputs import EditRequest, RowReader

_HIDDEN = 128
_LEAST_SIDE = 64  # pixels: edits are compared pixel by pixel, and there are few of them


def edit_sheet(edit: EditRequest, made: UInt8[np.ndarray, "n h w c"]) -> bytes:
    """The first images of an edit beside their inputs.

    Args:
        edit: What was asked for.
        made: Its first images, with ids 0 .. N - 1.

    Returns:
        A PNG. One column for each image: the input, for an inpainting the input with grey where it was made anew, the
        result. Interpolations have a row for each pair instead, from its first image over those between to its second.
    """
    inputs = RowReader(edit.inputs)
    if edit.spec.kind == "interpolate":
        width = len(edit.spec.weights)
        cells = []
        for start in range(0, len(made), width):
            first, second = inputs.read(edit.spec.rows(start)).images
            between = made[start : start + width]
            blank = np.full((width - len(between), *first.shape), 255, dtype=np.uint8)
            cells.append(np.concatenate([first[None], between, blank, second[None]]))
        return _enlarged_grid(np.concatenate(cells), columns=width + 2)
    given = inputs.read([edit.spec.rows(sample_id)[0] for sample_id in range(len(made))]).images
    rows = [given, made]
    if edit.known is not None:
        rows.insert(1, np.where(edit.known[None, :, :, None], given, np.uint8(_HIDDEN)))
    return _enlarged_grid(np.concatenate(rows), columns=len(made))


def _enlarged_grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> bytes:
    return image_grid(images, columns, scale=max(1, _LEAST_SIDE // images.shape[1]))
