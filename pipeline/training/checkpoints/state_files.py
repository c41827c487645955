"""A training state as the files of a checkpoint, and back: pure, without storage.

The averaged networks are models of one file each, as they are registered; what only training needs (the weights in
training, the optimiser's moments, the choice of t, tracked averages) may be any size, and goes into files of a bounded
one: `optimizer.safetensors`, or `optimizer-00001-of-00003.safetensors` and so on. safetensors and JSON only.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import safetensors.torch
from torch import Tensor

from ddpm.added_field import added_field
from pipeline.config_io import to_json
from pipeline.errors import CheckpointError
from pipeline.models.model_files import WEIGHTS, ModelCard, average_names, pack_model
from pipeline.training.checkpoints.checkpoint_files import Piece, encode_tensors
from pipeline.training.checkpoints.checkpoint_records import parse_stored
from pipeline.training.checkpoints.ema_snapshots import SnapshotList, SnapshotRecord
from pipeline.training.checkpoints.host_copy import Tensors

TRAIN_WEIGHTS, OPTIMIZER = "train_weights.safetensors", "optimizer.safetensors"
IMPORTANCE = "importance.safetensors"
STATE_JSON = "state.json"
SNAPSHOTS_JSON = "ema_snapshots.json"
"""The checkpoint's file that names the snapshots behind it."""
UNSENT_METRICS_JSON = "unsent_metrics.json"
"""The checkpoint's file of what MLflow had not taken; there is none where it had taken everything."""
MAX_FILE_BYTES = 2**30
"""Most bytes of a file of what only training needs; a larger tensor is a file of its own."""
_HEADER_BYTES, _TENSOR_HEADER_BYTES = 16, 200  # of a safetensors file; more than it takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    format_version: int = 2
    """Version of this record's form."""
    step: int
    """Global batches behind the run; the next one has this index."""
    skipped_steps: tuple[int, ...]
    """Global batches that were not trained on: a loss or gradient was not finite, or they were left out after that."""
    num_averaged_images: int
    """Images that the moving averages have taken in."""
    micro_batch: int | None = added_field(default=None, pin=None)
    """Images of a worker that passed through the network at once; None: all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateParts:
    """A training state, in no particular files."""

    position: Position
    """How far it has come."""
    tensors: Tensors
    """All tensors, by the name of the file that they would be in if it might be of any size, and by their own."""
    halflives_images: tuple[int, ...]
    """Half-lives of the averages that are models, the registered one's first."""


def tracked_name(sigma_rel: float) -> str:
    """File name of a tracked power-function average."""
    return f"power-ema-{sigma_rel}.safetensors"


def weights_name(halflives_images: Sequence[int], halflife_images: int) -> str:
    """File name of the weights of an average that is a model."""
    return WEIGHTS if halflife_images == halflives_images[0] else average_names(halflife_images)[1]


def encode_state(
    parts: StateParts,
    card: ModelCard,
    source: bytes | None,
    snapshots: Sequence[SnapshotRecord] | None,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Iterator[Piece]:
    """The files of a checkpoint; equal states give equal bytes.

    Args:
        parts: The state, on the host; the pieces read its tensors when they are called.
        card: What the registered average is.
        source: Source of the caller's own network; one file for all averages.
        snapshots: The snapshots behind the state; None where none are taken.
        max_file_bytes: Most bytes of a file of what only training needs.
    """
    left = dict(parts.tensors)
    for halflife in parts.halflives_images:
        weights = left.pop(weights_name(parts.halflives_images, halflife))
        yield partial(_encode_model, weights, card, source, None if halflife == parts.halflives_images[0] else halflife)
    for file, tensors in left.items():
        groups = list(_bounded(tensors, max_file_bytes))
        for name, group in zip(_file_names(file, len(groups)), groups):
            yield partial(_encode_part, name, group)
    yield lambda: {STATE_JSON: to_json(parts.position)}
    if snapshots is not None:
        data = to_json(SnapshotList(snapshots=tuple(snapshots)))
        yield lambda: {SNAPSHOTS_JSON: data}


def parse_position(data: bytes, where: str) -> Position:
    """The position that a checkpoint's `state.json` holds.

    Raises:
        CheckpointError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    return parse_stored(Position, data, where)


def parts_of(file: str, names: Collection[str]) -> list[str]:
    """The files among a checkpoint's that hold what would be in `file`; none if there are none.

    Raises:
        CheckpointError: If some of them are not there.
    """
    if file in names:
        return [file]
    pattern = re.compile(re.escape(file.removesuffix(".safetensors")) + r"-\d{5}-of-(\d{5})\.safetensors")
    found = sorted(name for name in names if pattern.fullmatch(name))
    if found and found != _file_names(file, len(found)):
        raise CheckpointError(f"of {file} there are only {', '.join(found)}")
    return found


def decode_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of one file."""
    tensors: dict[str, Tensor] = safetensors.torch.load(data)
    return tensors


def _file_names(file: str, number: int) -> list[str]:
    if number == 1:
        return [file]
    stem = file.removesuffix(".safetensors")
    return [f"{stem}-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]


def _bounded(tensors: Mapping[str, Tensor], max_file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups that fit a file; at least one group, and in each at least one tensor if there is any."""
    group, group_bytes = dict[str, Tensor](), _HEADER_BYTES
    for name, tensor in tensors.items():
        size = tensor.nbytes + len(name.encode()) + _TENSOR_HEADER_BYTES
        if group and group_bytes + size > max_file_bytes:
            yield group
            group, group_bytes = {}, _HEADER_BYTES
        group[name] = tensor
        group_bytes += size
    yield group


def _encode_part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: encode_tensors(tensors)}


def _encode_model(
    weights: Mapping[str, Tensor], card: ModelCard, source: bytes | None, further_halflife_images: int | None
) -> dict[str, bytes]:
    if further_halflife_images is not None:
        card = replace(card, average=f"half-life {further_halflife_images} images")
    model = pack_model(card, encode_tensors(weights), source)
    if further_halflife_images is None:
        return model.as_dict()
    card_name, weights_file = average_names(further_halflife_images)
    return {card_name: model.card_json, weights_file: model.weights}
