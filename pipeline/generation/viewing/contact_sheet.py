"""The contact sheet of a run: its first images, by class, or of an edit below what was given."""

from itertools import islice

import numpy as np
from jaxtyping import UInt8

from pipeline.data.image_stream import read_images
from pipeline.data.pictures import class_grid, image_grid
from pipeline.data.shards import decode_image, read_shard
from pipeline.generation.output.manifest import GenerationManifest, read_shards
from pipeline.generation.requests.edit_inputs import EditRequest, RowReader
from pipeline.generation.spec.edits import InterpolateSpec
from pipeline.generation.spec.sampling_plan import plan_shards
from pipeline.stores.object_store import ObjectStore

_HIDDEN = 128
_LEAST_SIDE = 64  # pixels: edits are compared pixel by pixel, and there are few of them


def contact_sheet(manifest: GenerationManifest, edit: EditRequest | None, store: ObjectStore, columns: int) -> bytes:
    """The first images of a run as a PNG, read back as any reader would.

    Args:
        manifest: The run.
        edit: What was asked for, if images were edited.
        store: The output prefix.
        columns: Images of each class; of an edit, of a label plan, and without classes, images in a row.
    """
    turn = manifest.spec.label_rule.turn(manifest.spec.num_classes)
    num_shown = columns if edit is not None else columns * (turn or columns)
    images = _first_images(store, manifest, min(num_shown, manifest.num_images))
    if edit is not None:
        return _edit_sheet(edit, images)
    return image_grid(images, columns) if turn is None else class_grid(images, turn, columns)


def _first_images(store: ObjectStore, manifest: GenerationManifest, num_images: int) -> UInt8[np.ndarray, "n h w c"]:
    """The images with ids 0 .. num_images - 1; those that were removed are white, so that all others keep their place.

    Args:
        store: The output prefix.
        manifest: The run.
        num_images: How many, at most those of the run.
    """
    spec, plan = manifest.spec, plan_shards(manifest.spec, manifest.num_images)
    shards = list(islice(read_shards(store, manifest.parts), -(-num_images // spec.shard_size)))
    if all(shard.num_samples == plan.shard(index).num_samples for index, shard in enumerate(shards)):
        return read_images(store, shards, num_images).images
    images = np.full((num_images, *spec.image_size, spec.channels), 255, dtype=np.uint8)
    for shard in shards:
        for sample in read_shard(store, shard):
            if int(sample.key) < num_images:
                images[int(sample.key)] = decode_image(sample.image, sample.extension)
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
            blank = np.full((width - len(between), *first.shape), 255, dtype=np.uint8)
            cells.append(np.concatenate([first[None], between, blank, second[None]]))
        return _enlarged_grid(np.concatenate(cells), columns=width + 2)
    given = inputs.read([edit.spec.rows(sample_id)[0] for sample_id in range(len(made))]).images
    rows = [given, made]
    if edit.known is not None:
        rows.insert(1, np.where(edit.known[None, :, :, None], given, np.uint8(_HIDDEN)))
    return _enlarged_grid(np.concatenate(rows), columns=len(made))


def _enlarged_grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> bytes:
    return image_grid(images, columns, scale=max(1, _LEAST_SIDE // min(images.shape[1:3])))
