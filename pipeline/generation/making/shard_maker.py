"""One output shard: from ids to images to a committed tar. Plain Python: sampling_pool.py runs it in Ray.

Retry-safe: calling it again for the same shard makes the same bytes (on equal hardware and software, with as many
threads) and commits at most once.
"""

import dataclasses
import platform
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8

from ddpm import DiffusionModel, generate, images_to_x_0, x_0_to_images
from ddpm.shapes import Images
from pipeline.data.samples import Sample
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.making.network_setup import set_up
from pipeline.generation.making.packing import encode_samples, pack_samples
from pipeline.generation.output.commits import Commit, Provenance, write_once
from pipeline.generation.requests.edit_inputs import InputImages, RowReader
from pipeline.generation.spec.edits import EditSpec, EditTools, LabelledInputs
from pipeline.generation.spec.labels import LabelPlan
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec, fixed_batches
from pipeline.models.model_files import ModelFiles, load_model, read_card
from pipeline.stores.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ingredients:
    """What images are made of, beside the spec that names it by digests; travels to the actors once."""

    model: ModelFiles
    """The model."""
    guide: ModelFiles | None = None
    """The weaker model of autoguidance."""
    inputs: InputImages | None = None
    """The images to edit: where they are, not the images."""
    known: Bool[np.ndarray, "h w"] | None = None
    """Pixels that an inpainting keeps."""
    x_0_error: tuple[float, ...] | None = None
    """Mean squared error of x_0_hat, one per trained step, for the analytic variance."""
    label_plan: LabelPlan | None = None
    """The rows that the spec's label plan names by the digest of their file."""


class ImageMaker:
    """Makes the images of sample ids with one model, and perhaps a guide, on one device."""

    def __init__(self, ingredients: Ingredients, spec: SamplingSpec, device: torch.device) -> None:
        """Load the models.

        Args:
            ingredients: The models, and what else the spec names.
            spec: How the networks are evaluated: the same in every spec that images are made of afterwards.
            device: Where.

        Raises:
            CheckpointError: If a model's files are damaged.
            ConfigError: If a network of your own cannot be built here, or one cannot be compiled that is to be.
        """
        self._device = device
        self._model = self._load(ingredients.model, "model", spec)
        self._guide = None if ingredients.guide is None else self._load(ingredients.guide, "guide_model", spec)
        self._rows = None if ingredients.inputs is None else RowReader(ingredients.inputs)
        self._known = None
        if ingredients.known is not None:
            self._known = torch.from_numpy(ingredients.known)[None, None].to(device)
        error = ingredients.x_0_error
        self._x_0_error = None if error is None else torch.tensor(error, dtype=torch.float64)
        self._label_plan = ingredients.label_plan

    def _load(self, files: ModelFiles, field: str, spec: SamplingSpec) -> DiffusionModel:
        try:
            return set_up(load_model(files)[1], spec, self._device)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from error

    def __call__(self, spec: SamplingSpec, ids: range) -> tuple[Images, list[int | None]]:
        """Make the images of some ids, a function of spec and ids: from nothing, or edited from the inputs.

        Returns:
            Images [B, C, H, W] in [-1, 1], and the class that each was made as; None for models without classes.

        Raises:
            ShardCorruptError, StorageError: If inputs cannot be read.
            ValueError: As generate and the edits.
        """
        if spec.request is None:
            labels = spec.label_rule.labels(ids, spec.num_classes, self._label_plan)
            x_0 = generate(
                self._model,
                spec.sampler,
                seed=spec.seed,
                sample_ids=torch.tensor(spec.label_rule.noise_ids(ids, self._label_plan), device=self._device),
                label=None if spec.num_classes is None else torch.tensor(labels, device=self._device),
                guide=self._guide,
                x_0_error=self._x_0_error,
            )
            return x_0, labels
        sample_ids = torch.arange(ids.start, ids.stop, device=self._device)
        rows = zip(*map(spec.request.rows, ids))
        tools = EditTools(
            model=self._model,
            sampler=spec.sampler,
            seed=spec.seed,
            guide=self._guide,
            x_0_error=self._x_0_error,
            known=self._known,
        )
        return spec.request.edit(
            tools, sample_ids, tuple(self._inputs(spec, spec.request, of_each) for of_each in rows)
        )

    def meta(self, spec: SamplingSpec, sample_id: int) -> dict[str, Any]:
        """What the metadata of an image says of where it came from: the inputs of an edit, the row of a label plan."""
        if spec.request is not None:
            return {"input_rows": list(spec.request.rows(sample_id))}
        return spec.label_rule.meta(sample_id, self._label_plan)

    def _inputs(self, spec: SamplingSpec, edit: EditSpec, rows: Sequence[int]) -> LabelledInputs:
        """Input images in [-1, 1] and the classes to make of them."""
        assert self._rows is not None
        found = self._rows.read(rows)
        x_0 = images_to_x_0(torch.from_numpy(found.images), spec.num_levels).to(self._device)
        labels: list[int | None] = [edit.label] * len(rows)
        if spec.num_classes is not None and edit.label is None:
            if found.labels is None or not ((found.labels >= 0) & (found.labels < spec.num_classes)).all():
                raise ValueError(
                    f"request.inputs: each needs a label below {spec.num_classes}, got {found.labels}; make them again"
                )
            labels = [int(label) for label in found.labels]
        return LabelledInputs(x_0=x_0, labels=labels)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnShard:
    """The images of a shard that is not committed yet."""

    shard: OutputShard
    """Which ids."""
    pixels: UInt8[np.ndarray, "n h w c"]
    """uint8 [N, H, W, C], in id order."""
    labels: list[int | None]
    """The class that each was made as; None for models without classes."""
    made: Provenance
    """Who made them, and how long it took."""


class ShardMaker:
    """Makes and commits output shards with one network on one device."""

    def __init__(
        self, ingredients: Ingredients, spec: SamplingSpec, store: ObjectStore, *, num_threads: int, device: str
    ) -> None:
        """Load the network.

        Args:
            ingredients: The model, and what else the spec names by digest.
            spec: What to make.
            store: The output prefix.
            num_threads: CPU threads of this process's tensor operations; more or fewer may change the last bits.
            device: torch device.

        Raises:
            CheckpointError: If the model's files are damaged.
            ConfigError: As ImageMaker.
        """
        torch.set_num_threads(num_threads)
        torch.backends.cudnn.deterministic = True  # a retry on the same kind of GPU makes the same bytes
        self._spec = spec
        self._store = store
        self._device = torch.device(device)
        self._images = ImageMaker(ingredients, spec, self._device)
        self._class_names = read_card(ingredients.model).class_names

    def __call__(self, shard: OutputShard) -> Commit:
        """Make a shard's images, pack them and commit them; errors as `draw` and `commit`."""
        return self.commit(self.draw(shard))

    def draw(self, shard: OutputShard) -> DrawnShard:
        """Make a shard's images, on the device.

        Raises:
            PipelineError: If memory runs out (the message says which batch_size to choose) or images are not numbers.
        """
        started_at, started_s = datetime.now(UTC), time.monotonic()
        try:
            pixels, labels = draw_shard(self._images, self._spec, shard)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise PipelineError(self._out_of_memory_message(shard)) from error
        except ValueError as error:  # images that are not numbers, or a network that answers in another shape
            raise PipelineError(f"output shard {shard.index} (ids from {shard.first_id}): {error}") from error
        made = Provenance(
            host=socket.gethostname(),
            device=_device_name(self._device),
            software=f"python {platform.python_version()}, torch {torch.__version__}",
            started_at_utc=started_at.isoformat(timespec="seconds"),
            wall_s=round(time.monotonic() - started_s, 3),
        )
        return DrawnShard(shard=shard, pixels=pixels, labels=labels, made=made)

    def commit(self, drawn: DrawnShard) -> Commit:
        """Pack images and commit them: off the device, so that another thread may do it while the next are drawn.

        Raises:
            CommitConflictError, StorageError: As write_once.
        """
        return write_once(self._store, self._spec, drawn.shard, self.pack(drawn), drawn.made)

    def pack(self, drawn: DrawnShard, without: Collection[int] = ()) -> bytes:
        """The bytes of an output shard, without images of some ids; arguments as `pack_samples`."""
        return pack_samples(self._spec, self._class_names, self.encode(drawn), without)

    def remake(self, shard: OutputShard, wanted: Collection[int]) -> list[Sample]:
        """Make some images of a shard again: only its fixed batches that hold them; nothing is committed.

        Args:
            shard: The shard.
            wanted: Sample ids of it.

        Returns:
            The samples, in id order.

        Raises:
            PipelineError: As `draw`.
        """
        made: list[Sample] = []
        for ids, num_own in fixed_batches(shard, self._spec.batch_size):
            of_batch = ids[:num_own]
            if set(wanted).isdisjoint(of_batch):
                continue
            part = OutputShard(index=shard.index, first_id=ids.start, num_samples=num_own)
            made += [sample for sample in self.encode(self.draw(part)) if int(sample.key) in wanted]
        return made

    def encode(self, drawn: DrawnShard) -> list[Sample]:
        """The samples of a shard, in id order, as they are packed."""
        ids = drawn.shard.sample_ids
        metas = [self._images.meta(self._spec, sample_id) for sample_id in ids]
        return encode_samples(self._spec, self._class_names, ids, drawn.labels, drawn.pixels, metas)

    def _out_of_memory_message(self, shard: OutputShard) -> str:
        """Try smaller batches, so that the message can name one that fits."""
        fits = self._spec.batch_size // 2
        while fits and not self._evaluates(fits):
            fits //= 2
        advice = (
            f"choose batch_size={fits}, which was tried and fits (it is part of the spec: such a run has a prefix of "
            "its own), or run again where there is more memory to go on from the shards already committed"
            if fits
            else "not even batch_size=1 fits; use a device with more memory"
        )
        return (
            f"out of memory on {_device_name(self._device)} at output shard {shard.index} with "
            f"batch_size={self._spec.batch_size}: {advice}"
        )

    def _evaluates(self, batch_size: int) -> bool:
        """Whether one network evaluation of this batch fits into memory."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        spec = dataclasses.replace(self._spec, batch_size=batch_size)
        one_step = dataclasses.replace(spec.sampler, num_steps=1)
        first = OutputShard(index=0, first_id=0, num_samples=batch_size)
        try:
            draw_shard(self._images, dataclasses.replace(spec, sampler=one_step), first)
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                return False
            raise
        return True


def draw_shard(
    images: ImageMaker, spec: SamplingSpec, shard: OutputShard
) -> tuple[UInt8[np.ndarray, "n h w c"], list[int | None]]:
    """The pixels of an output shard and the class that each image was made as: a function of spec and ids.

    Args:
        images: Makes the images.
        spec: What to make.
        class_names: Names of the model's classes; empty if it has none, or none for them.
        shard: Which ids.

    Returns:
        uint8 [N, H, W, C], and N classes; None for models without classes.
    """
    pixels: list[np.ndarray] = []
    labels: list[int | None] = []
    for ids, num_wanted in fixed_batches(shard, spec.batch_size):
        x_0, of_batch = images(spec, ids)
        pixels.append(x_0_to_images(x_0[:num_wanted], spec.num_levels).cpu().numpy())
        labels += of_batch[:num_wanted]
    return np.concatenate(pixels), labels


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a class for accelerators and only a text for the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
