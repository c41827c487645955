"""A model as three files: its card, its weights and, for a network of your own, that network's source.

JSON and safetensors only: reading a model unpickles nothing, and the code of a network of your own runs only where
`ModelFiles.trusted` says so. The card holds the digests of the other two files, so a
model is verified wherever it was copied to. The same three files lie in a checkpoint's folder and in a registered
model. Beside them a checkpoint may hold further moving averages of the same network, each with a card of its own:
`ema-20000.json` and `ema-20000.safetensors` for a half-life of 20,000 images.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm import DiffusionModel, ModelConfig, OwnNetworkConfig, build_network
from pipeline.config_io import read_record, to_json
from pipeline.errors import CheckpointError, ConfigError, ModelMissingError, ObjectMissingError, UntrustedCodeError
from pipeline.models.model_source import activate_source
from pipeline.redact import redact
from pipeline.stores.object_store import ObjectStore

MODEL_JSON = "model.json"
WEIGHTS = "weights.safetensors"
SOURCE_JSON = "source.json"

_REMEDY = "train the model again, or use it with the version of this program that made it"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a model is, and what it was trained on."""

    format_version: int = 2
    """Version of this record's form."""
    config: ModelConfig
    """Network, images and noise schedule."""
    class_names: tuple[str, ...] = ()
    """Names of the dataset's classes, by label; empty if it has none."""
    dataset_digest: str = ""
    """Digest of the dataset manifest that it was trained on."""
    train_step: int = 0
    """Optimiser steps behind the weights."""
    weights_sha256: str = ""
    """Digest of the weights file, hexadecimal; `pack_model` fills it in."""
    average: str = ""
    """Which moving average of the training's weights this is, where it is not the one that training registers."""
    source_sha256: str | None = None
    """Digest of the source file of a network of your own; None without one; `pack_model` fills it in."""

    def __post_init__(self) -> None:
        """Check that names and classes agree."""
        num_classes = self.config.num_classes
        if num_classes is not None and self.class_names and len(self.class_names) != num_classes:
            raise ValueError(f"class_names: one per class, got {len(self.class_names)} names for {num_classes} classes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """The bytes of a model; a plain value that travels to other processes."""

    card_json: bytes
    """Contents of model.json."""
    weights: bytes
    """Contents of weights.safetensors."""
    source: bytes | None = None
    """Contents of source.json, for a network of your own."""
    trusted: bool = field(default=False, compare=False)
    """Whether code that comes with the model may run here; no part of the model, and never stored."""

    @property
    def digest(self) -> str:
        """SHA-256 over the names, lengths and contents of the files, hexadecimal: the model's identity."""
        whole = hashlib.sha256()
        for name, data in self.as_dict().items():
            whole.update(f"{name}\0{len(data)}\0".encode())
            whole.update(data)
        return whole.hexdigest()

    def as_dict(self) -> dict[str, bytes]:
        """Contents by file name, in a fixed order."""
        files = {MODEL_JSON: self.card_json, WEIGHTS: self.weights}
        if self.source is not None:
            files[SOURCE_JSON] = self.source
        return files


def encode_model(card: ModelCard, state_dict: Mapping[str, Tensor], source: bytes | None) -> ModelFiles:
    """The files of a model; equal inputs give equal bytes.

    Args:
        card: What the model is; its two digests are filled in here.
        state_dict: The network's weights and buffers, on any device.
        source: What `collect_source` gave for the network's factory.

    Returns:
        The model's files.
    """
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    return pack_model(card, safetensors.torch.save(tensors), source)


def pack_model(card: ModelCard, weights: bytes, source: bytes | None) -> ModelFiles:
    """The files of a model whose weights are safetensors bytes already; otherwise as `encode_model`."""
    complete = replace(
        card,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        source_sha256=None if source is None else hashlib.sha256(source).hexdigest(),
    )
    return ModelFiles(card_json=to_json(complete), weights=weights, source=source)


def read_card(files: ModelFiles, where: str = "model") -> ModelCard:
    """The card of a model, after its weights and source have been compared with it.

    Args:
        files: The model's files.
        where: What messages call the model: its URI.

    Raises:
        CheckpointError: If the card is damaged, or another file is not the one that it names.
        FormatVersionError: If the card is of another version.
    """
    card = _parse_card(files.card_json, where)
    if hashlib.sha256(files.weights).hexdigest() != card.weights_sha256:
        raise CheckpointError(
            f"{where}: {WEIGHTS} ({len(files.weights)} bytes) is not the file that {MODEL_JSON} names: sha256 differs, "
            "so it was altered or cut short; use another checkpoint or version"
        )
    source_sha256 = None if files.source is None else hashlib.sha256(files.source).hexdigest()
    if source_sha256 != card.source_sha256:
        raise CheckpointError(
            f"{where}: {SOURCE_JSON} is not the file that {MODEL_JSON} names (sha256 differs, or it is missing); "
            "use another checkpoint or version"
        )
    return card


def load_model(files: ModelFiles, where: str = "model") -> tuple[ModelCard, DiffusionModel]:
    """The model, its network on the CPU in evaluation mode.

    Args:
        files: The model's files; verified first.
        where: What messages call the model: its URI.

    Returns:
        The card and the model.

    Raises:
        CheckpointError: If the files are damaged, or the weights do not fit the network.
        FormatVersionError: If the card is of another version.
        UntrustedCodeError: As check_trust, before any code of the model runs.
        ValueError: If a network of your own cannot be built; see `activate_source` and `build_network`.
    """
    card = read_card(files, where)
    check_trust(files, where)
    if files.source is not None:
        activate_source(files.source, card.config.network)
    network = build_network(card.config)
    try:
        network.load_state_dict(safetensors.torch.load(files.weights), strict=True)
    except (RuntimeError, SafetensorError) as error:
        reason = redact(" ".join(str(error).split()))[:300]
        raise CheckpointError(
            f"{where}: the weights do not fit the network {card.config.network.title!r}: {reason}"
        ) from error
    return card, DiffusionModel.of(card.config, network.eval())


def check_trust(files: ModelFiles, where: str = "model") -> None:
    """Refuse a network of one's own that nobody has trusted: building it imports what its card names.

    That is so without a source file too: the card may name anything that is installed here.

    Args:
        files: The model's files.
        where: What messages call the model: its URI.

    Raises:
        UntrustedCodeError: If the model brings code and `files.trusted` is False.
    """
    network = _parse_card(files.card_json, where).config.network
    if isinstance(network, OwnNetworkConfig) and not files.trusted:
        raise UntrustedCodeError(
            f"{where}: its network {network.factory!r} is code that comes with the model and would run here; if you "
            "trust who made it, pass --trust-model-code (in Python trust_model_code=True, for the registered pyfunc "
            'model_config={"trust_model_code": True})'
        )


def average_names(halflife_images: int) -> tuple[str, str]:
    """File names of the card and the weights of a checkpoint's further average with this half-life."""
    return f"ema-{halflife_images}.json", f"ema-{halflife_images}.safetensors"


def read_model_files(store: ObjectStore, prefix: str = "", *, ema_halflife_images: int | None = None) -> ModelFiles:
    """Read a model from object storage and verify it.

    Args:
        store: The object store.
        prefix: Folder of the files inside the store; empty for its root.
        ema_halflife_images: Which of the checkpoint's further averages; None for the one that training registers.

    Returns:
        The model's files, verified against the card.

    Raises:
        ModelMissingError: If there is no model.json, or no such average.
        CheckpointError: If a file is missing, cut short or altered.
        FormatVersionError: If the card is of another version.
    """
    folder = prefix.strip("/")
    where = f"{store.uri.rstrip('/')}/{folder}".rstrip("/")
    if ema_halflife_images is not None:
        where += f"?ema={ema_halflife_images}"
    inside = f"{folder}/" if folder else ""
    card_name, weights_name = (
        (MODEL_JSON, WEIGHTS) if ema_halflife_images is None else average_names(ema_halflife_images)
    )
    try:
        card_json = store.read(inside + card_name)
    except ObjectMissingError as error:
        raise ModelMissingError(_what_is_there(store, inside, where, ema_halflife_images)) from error
    card = _parse_card(card_json, where)
    try:
        files = ModelFiles(
            card_json=card_json,
            weights=store.read(inside + weights_name),
            source=None if card.source_sha256 is None else store.read(inside + SOURCE_JSON),
        )
    except ObjectMissingError as error:
        raise CheckpointError(f"{where}: incomplete, use another checkpoint ({error})") from error
    read_card(files, where)
    return files


def _what_is_there(store: ObjectStore, inside: str, where: str, ema_halflife_images: int | None) -> str:
    """The message of a model that is missing."""
    if ema_halflife_images is None or store.stat(inside + MODEL_JSON) is None:
        return (
            f"{where}: no {MODEL_JSON} there, so it is no checkpoint; give a checkpoint's own folder (step-...), or "
            "models:/name@alias"
        )
    names = (info.key.removeprefix(inside) for info in store.list(f"{inside}ema-"))
    found = [name.removeprefix("ema-").removesuffix(".json") for name in names if name.endswith(".json")]
    return (
        f"{where}: no further average with a half-life of {ema_halflife_images} images; "
        f"there {'are' if found else 'is'} {', '.join(found) or 'none'} (optimizer.more_ema_halflives_images)"
    )


def _parse_card(card_json: bytes, where: str) -> ModelCard:
    place = f"{where}/{MODEL_JSON}"
    try:
        return read_record(ModelCard, card_json, place, remedy=_REMEDY)
    except ConfigError as error:  # nobody typed this file: it is damaged, not a mistake in a config
        raise CheckpointError(f"{error}; use another checkpoint or version") from error
