"""The images that an edit starts from: found, checked against the model before any work, and read row by row.

Inputs are a prepared dataset or an earlier generation run: both have a manifest that names verified shards. Which
pixels an inpainting keeps is decided here too.
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Bool

from pipeline import config_io
from pipeline.data.image_stream import LabelledImages, join_images, read_images
from pipeline.data.manifest import MANIFEST_KEY, load_manifest
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import check_levels, decode_mask
from pipeline.errors import ConfigError, DatasetError, DatasetMissingError, ObjectMissingError, ShardCorruptError
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.requests.requests import REGIONS, Edit, Inpaint, Request
from pipeline.generation.spec.edits import AnyEditSpec
from pipeline.models.model_files import ModelCard
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store, read_file

_KEPT_SHARDS = 2  # decoded: rows are asked for in order, and a batch may straddle two shards


@dataclass(frozen=True, kw_only=True, slots=True)
class InputImages:
    """Where the input images are, and what they are."""

    uri: str
    """Root of the dataset or of the generation run."""
    shards: Sequence[ShardRecord]
    """Their shards, in row order."""
    image_shape: tuple[int, int, int]
    """Height, width and channels."""
    class_names: tuple[str, ...]
    """Names of the classes; empty if they have no labels."""

    @property
    def num_images(self) -> int:
        """Rows."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """Of the shards' contents and their order, wherever they lie."""
        return config_io.digest([[shard.sha256, shard.num_samples] for shard in self.shards])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EditRequest:
    """A request, resolved."""

    spec: AnyEditSpec
    """What of it decides the images."""
    num_asked: int
    """Images that were asked for."""
    inputs: InputImages
    """What is edited."""
    known: Bool[np.ndarray, "h w"] | None
    """inpaint: which pixels are kept."""


def resolve_request(request: Request, card: ModelCard, model_uri: str) -> EditRequest | None:
    """Look up the inputs and the mask of an edit and check them against the model; None for plain generation.

    Raises:
        ConfigError: If inputs and model, or mask and images, do not fit each other, or there are too few inputs.
        DatasetMissingError: If there is no manifest where the inputs were named.
        DatasetError: If the manifest is damaged.
        StorageError: If something cannot be read.
    """
    if not isinstance(request, Edit):
        return None
    inputs = _find_inputs(request.inputs, request.split)
    _check_fits(inputs, request, card, model_uri)
    known = known_pixels(request.mask, inputs.image_shape[:2]) if isinstance(request, Inpaint) else None
    spec = request.spec(
        inputs_digest=inputs.digest,
        num_inputs=inputs.num_images,
        mask_digest=None if known is None else hashlib.sha256(known.tobytes()).hexdigest(),
    )
    if spec.num_images == 0:
        raise ConfigError(f"request.inputs: interpolate needs pairs, got {inputs.num_images} image in {inputs.uri}")
    if request.num_images is not None and request.num_images > spec.num_images:
        raise ConfigError(
            f"request.num_images: {inputs.num_images:,} inputs in {inputs.uri} give {spec.num_images:,} images, got "
            f"{request.num_images:,}; ask for fewer, or name more inputs"
        )
    return EditRequest(spec=spec, num_asked=request.num_images or spec.num_images, inputs=inputs, known=known)


def _find_inputs(uri: str, split: str | None) -> InputImages:
    """What the manifest in a place says, of whichever kind it is."""
    store = open_store(uri)
    if _is_generation_run(store):
        if split is not None:
            raise ConfigError(f"request.split: {uri} is a generation run, which has none, got {split!r}; leave it out")
        run = load_generation_manifest(store)
        assert run is not None, "it was there a moment ago"
        spec = run.spec
        names = run.class_names or tuple(str(k) for k in range(spec.num_classes or 0))
        return InputImages(
            uri=store.uri,
            shards=tuple(read_shards(store, run.parts)),
            image_shape=(*spec.image_size, spec.channels),
            class_names=names,
        )
    dataset = load_manifest(store)
    check_levels(dataset, store.uri)
    name = "train" if split is None else split
    if name not in dataset.splits:
        raise ConfigError(f"request.split: {uri} has {', '.join(sorted(dataset.splits))}, got {name!r}; choose one")
    return InputImages(
        uri=store.uri,
        shards=dataset.splits[name].shards,
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
    )


def _is_generation_run(store: ObjectStore) -> bool:
    """Whether the manifest is one of generation, by the field that only those have."""
    try:
        record = json.loads(store.read(MANIFEST_KEY))
    except ObjectMissingError:
        raise DatasetMissingError(
            f"request.inputs: no {MANIFEST_KEY} in {store.uri}; name a prepared dataset, or the prefix of a finished "
            "generation run (below its output)"
        ) from None
    except ValueError:
        raise DatasetError(f"{store.uri}/{MANIFEST_KEY}: is not valid JSON; make the inputs again") from None
    return isinstance(record, dict) and "spec_digest" in record


def _check_fits(inputs: InputImages, request: Edit, card: ModelCard, model_uri: str) -> None:
    """Refuse inputs of other images than the model's, and labels that the model would not understand."""
    network = card.config
    theirs = (*network.image_size, network.channels)
    if inputs.image_shape != theirs:
        raise ConfigError(
            f"request.inputs: {inputs.uri} holds images of {' x '.join(map(str, inputs.image_shape))} (height, width, "
            f"channels), {model_uri} makes {' x '.join(map(str, theirs))}; name other inputs, or prepare them so"
        )
    if network.num_classes is None:
        if request.label is not None:
            raise ConfigError(f"request.label: {model_uri} has no classes, got {request.label}; leave it out")
        return
    if request.label is not None:
        if request.label >= network.num_classes:
            raise ConfigError(
                f"request.label: must be below {network.num_classes}, the model's classes, got {request.label}"
            )
        return
    if len(inputs.class_names) != network.num_classes or (card.class_names or inputs.class_names) != inputs.class_names:
        raise ConfigError(
            f"request.label: the classes of {inputs.uri} ({_listed(inputs.class_names)}) are not those of {model_uri} "
            f"({_listed(card.class_names) if card.class_names else network.num_classes}); choose a label for all"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def known_pixels(mask: str, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Which pixels an inpainting keeps.

    Args:
        mask: Name of a region to make anew, or the URI of a PNG whose white, opaque pixels are made anew.
        size: Height and width of the images.

    Raises:
        ConfigError: If the file is missing, is no such PNG or has another size, or nothing would be made anew.
    """
    height, width = size
    new = np.zeros(size, dtype=bool)
    if mask in REGIONS:
        regions = {
            "upper_half": np.s_[: height // 2, :],
            "lower_half": np.s_[height // 2 :, :],
            "left_half": np.s_[:, : width // 2],
            "right_half": np.s_[:, width // 2 :],
            "centre": np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4],
        }
        new[regions[mask]] = True
        if not new.any():
            raise ConfigError(f"request.mask: {mask} of {height} x {width} pixels is empty; choose another region")
        return ~new
    try:
        white = decode_mask(read_file(mask))
    except ObjectMissingError:
        raise ConfigError(
            f"request.mask: {mask!r} is neither a file nor one of {', '.join(REGIONS)}; choose one of them"
        ) from None
    except ValueError as error:
        raise ConfigError(f"request.mask: {mask}: {error}; save it as black and white PNG") from None
    if white.shape != size:
        raise ConfigError(
            f"request.mask: {mask} has {white.shape[0]} x {white.shape[1]} pixels, the images {height} x {width}; "
            "give it their size"
        )
    if not white.any():
        raise ConfigError(f"request.mask: {mask} has no white pixel, so that nothing would be made anew")
    return ~white


class RowReader:
    """Reads single rows of the inputs; a shard is fetched whole, verified, and kept while rows near it are wanted."""

    def __init__(self, inputs: InputImages) -> None:
        self._inputs = inputs
        self._store = open_store(inputs.uri)
        self._starts = list(accumulate((shard.num_samples for shard in inputs.shards), initial=0))
        self._decoded = functools.lru_cache(maxsize=_KEPT_SHARDS)(self._decode)

    def read(self, rows: Sequence[int]) -> LabelledImages:
        """Some rows, in the order asked for.

        Raises:
            ShardCorruptError: If a shard is not as the manifest says.
            StorageError: If it cannot be read.
        """
        parts = []
        for row in rows:
            index = bisect.bisect_right(self._starts, row) - 1
            start = row - self._starts[index]
            parts.append(self._decoded(index)[start : start + 1])
        return join_images(parts)

    def _decode(self, index: int) -> LabelledImages:
        shard = self._inputs.shards[index]
        images = read_images(self._store, [shard])
        if images.images.shape[1:] != self._inputs.image_shape:
            raise ShardCorruptError(
                f"{self._inputs.uri}/{shard.key}: its images have the shape {images.images.shape[1:]}, the manifest "
                f"says {self._inputs.image_shape}; make the inputs again"
            )
        return images
