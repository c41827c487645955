"""One output shard: from ids to a committed tar. Plain Python; only pipeline/generation/sample.py knows Ray.

Retry-safe: calling it again for the same shard makes the same bytes (on equal hardware and software, with as many
threads) and commits at most once.
"""

import dataclasses
import platform
import socket
import time
from datetime import UTC, datetime
from typing import Any

import torch

from ddpm import x_0_to_images
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.errors import PipelineError
from pipeline.generation.commits import Commit, Provenance, write_once
from pipeline.generation.image_maker import ImageMaker, Ingredients
from pipeline.generation.sampling_plan import OutputShard, SamplingSpec, fixed_batches
from pipeline.stores.object_store import ObjectStore


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
            ConfigError: If a network of your own cannot be built here.
        """
        torch.set_num_threads(num_threads)
        torch.backends.cudnn.deterministic = True  # a retry on the same kind of GPU makes the same bytes
        self._spec = spec
        self._store = store
        self._device = torch.device(device)
        self._images = ImageMaker(ingredients, self._device)

    def __call__(self, shard: OutputShard) -> Commit:
        """Make a shard's images, pack them and commit them.

        Raises:
            PipelineError: If memory runs out (the message says which batch_size to choose) or images are not numbers.
            CommitConflictError, StorageError: As write_once.
        """
        started_at, started_s = datetime.now(UTC), time.monotonic()
        try:
            tar = make_tar(self._images, self._spec, shard)
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
        return write_once(self._store, self._spec, shard, tar, made)

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
            make_tar(self._images, dataclasses.replace(spec, sampler=one_step), first)
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                return False
            raise
        return True


def make_tar(images: ImageMaker, spec: SamplingSpec, shard: OutputShard) -> bytes:
    """The bytes of an output shard: a function of its arguments.

    Args:
        images: Makes the images.
        spec: What to make.
        shard: Which ids.

    Returns:
        A WebDataset tar: per sample a PNG, its label (.cls) if the model has classes, and a .json with seed, sample id,
        label, sampler and model digest; of an edit also what was asked for and which inputs it was made of.
    """
    common: dict[str, Any] = {
        "seed": spec.seed,
        "sampler": dataclasses.asdict(spec.sampler),
        "model_digest": spec.model_digest,
    }
    if spec.guide_digest is not None:
        common["guide_digest"] = spec.guide_digest
    if spec.request is not None:
        common["request"] = dataclasses.asdict(spec.request)
    samples = []
    for ids, num_wanted in fixed_batches(shard, spec.batch_size):
        made = images(spec, ids)
        pixels = x_0_to_images(made.x_0[:num_wanted]).cpu().numpy()
        for sample_id, image, label in zip(ids, pixels, made.labels):
            meta = {**common, "sample_id": sample_id, "label": label}
            if spec.request is not None:
                meta["input_rows"] = list(spec.request.rows(sample_id))
            samples.append(Sample(key=f"{sample_id:012d}", png=encode_png(image), cls=label, meta=meta))
    return pack_shard(samples)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a class for accelerators and only a text for the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
