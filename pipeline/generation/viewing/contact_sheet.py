"""The contact sheet of a run: its first images, by class, or of an edit below what was given."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from jaxtyping import UInt8

from pipeline.data.pictures import MAX_ROWS, class_grid, image_grid
from pipeline.data.shards import decode_image, read_shard
from pipeline.errors import ShardCorruptError
from pipeline.generation.output.manifest import GenerationManifest, read_shards, require_manifest, write_if_changed
from pipeline.generation.requests.edit_inputs import EditRequest, RowReader
from pipeline.generation.spec.edits import InterpolateSpec
from pipeline.stores.object_store import ObjectStore

CONTACT_SHEET_KEY = "contact_sheet.png"
_HIDDEN, _WHITE = 128, 255
_LEAST_SIDE = 64  # pixels: edits are compared pixel by pixel, and there are few of them


def contact_sheet(manifest: GenerationManifest, edit: EditRequest | None, store: ObjectStore, columns: int) -> bytes:
    """The first images of a run as a PNG, read back as any reader would; no more are decoded than it shows.

    Args:
        manifest: The run.
        edit: What was asked for, if images were edited.
        store: The output prefix.
        columns: Images of each class; of an edit, of a label plan, and without classes, images in a row.

    Raises:
        ShardCorruptError: If a shard is not as its record says, or its images are not of this run's shape.
        ObjectMissingError, StorageError: If one cannot be read.
    """
    turn = manifest.spec.label_rule.turn(manifest.spec.num_classes)
    if edit is not None:
        return _edit_sheet(edit, _images(store, manifest, range(min(columns, manifest.num_images))))
    if turn is None:
        num_shown = min(columns * min(columns, MAX_ROWS), manifest.num_images)
        return image_grid(_images(store, manifest, range(num_shown)), columns)
    num_rows = min(turn, MAX_ROWS)  # of a thousand classes nine tenths would be read in vain
    ids = [one for column in range(columns) for one in range(column * turn, column * turn + num_rows)]
    return class_grid(_images(store, manifest, [one for one in ids if one < manifest.num_images]), num_rows, columns)


def write_contact_sheet(store: ObjectStore, edit: EditRequest | None, columns: int) -> None:
    """Write the sheet of the manifest that stands, unless it is there already.

    Who works without a lease, or has lost it, may find at the end that images were removed meanwhile: then it is made
    again, without them.

    Args:
        store: The output prefix, of a finished run.
        edit: As `contact_sheet`.
        columns: As `contact_sheet`.

    Raises:
        ShardCorruptError, StorageError: As `contact_sheet`, or if it cannot be written.
    """
    while True:
        manifest = require_manifest(store)
        sheet = contact_sheet(manifest, edit, store, columns)
        if require_manifest(store) == manifest:
            write_if_changed(store, CONTACT_SHEET_KEY, sheet)
            return


def _images(store: ObjectStore, manifest: GenerationManifest, ids: Sequence[int]) -> UInt8[np.ndarray, "n h w c"]:
    """Some images, one shard in memory at a time; those that were removed are white, so that others keep their place.

    Args:
        store: The output prefix.
        manifest: The run.
        ids: Which, ascending.
    """
    spec = manifest.spec
    shape = (*spec.image_size, spec.channels)
    images = np.full((len(ids), *shape), _WHITE, dtype=np.uint8)
    places = {sample_id: place for place, sample_id in enumerate(ids)}
    needed = {sample_id // spec.shard_size for sample_id in ids}
    for index, shard in enumerate(islice(read_shards(store, manifest.parts), max(needed) + 1)):
        for sample in read_shard(store, shard) if index in needed else ():
            if (place := places.get(int(sample.key))) is None:
                continue
            try:
                image = decode_image(sample.image, sample.extension)
                if image.shape != shape:
                    raise ValueError(f"is an image of {list(image.shape)}, the run's are {list(shape)}")
            except ValueError as error:
                raise ShardCorruptError(f"{store.uri}/{shard.key}: {sample.key}: {error}") from error
            images[place] = image
    return images


def _edit_sheet(edit: EditRequest, made: UInt8[np.ndarray, "n h w c"]) -> bytes:
    """The first images of an edit beside their inputs.

    Args:
        edit: What was asked for.
        made: Its first images, with ids 0 .. N - 1.

    Returns:
        A PNG. One column for each image: the input, for an inpainting the input with grey where it was made anew, the
        result. Interpolations have a row for each pair instead, from its first image over those between to its second.
    """
    inputs = RowReader(edit.inputs)
    if isinstance(edit.spec, InterpolateSpec):
        width = len(edit.spec.weights)
        cells = []
        for start in range(0, len(made), width):
            first, second = inputs.read(edit.spec.rows(start)).images
            between = made[start : start + width]
            blank = np.full((width - len(between), *first.shape), _WHITE, dtype=np.uint8)
            cells.append(np.concatenate([first[None], between, blank, second[None]]))
        return _enlarged_grid(np.concatenate(cells), columns=width + 2)
    given = inputs.read([edit.spec.rows(sample_id)[0] for sample_id in range(len(made))]).images
    rows = [given, made]
    if edit.known is not None:
        rows.insert(1, np.where(edit.known[None, :, :, None], given, np.uint8(_HIDDEN)))
    return _enlarged_grid(np.concatenate(rows), columns=len(made))


def _enlarged_grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> bytes:
    return image_grid(images, columns, scale=max(1, _LEAST_SIDE // min(images.shape[1:3])))
