"""Which images a run makes, and how they are cut into output shards. Pure: no storage, no clock, no Ray.

A generation run is a function of its `SamplingSpec`, not of how many images are asked for: image 4711 of a spec is the
same image in a run of ten thousand and in a run of a billion. The digest of the spec names the output prefix. Ids are
cut into *output shards* of `shard_size` consecutive ids, the unit of work and of retry; the last one may be short.

Plans are lazy: a plan of ten million shards is two integers, and what is done is one byte per shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm.added_field import added_field
from ddpm.process.pixels import NumLevels
from ddpm.samplers.registry import AnySampler
from pipeline import config_io
from pipeline.data.image_formats import AnyImageFormat, Png
from pipeline.errors import OutputExistsError
from pipeline.generation.spec.edits import AnyEditSpec
from pipeline.generation.spec.labels import AnyLabelRule, IdModuloClasses
from pipeline.generation.spec.ticks import normal_tick
from pipeline.models.network_pass import Precision

MAX_IMAGES = 2**48
"""Ids have 48 bits in the counters of the noise."""
MAX_SHARDS = 10**9
"""Their numbers have nine digits in the keys of the output."""
Container = Literal["webdataset", "parquet"]
"""What an output shard is: a tar of images in the WebDataset layout, or a Parquet file in that of Hugging Face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """All that decides the bytes of the images, and nothing else: neither their number nor who makes them."""

    format_version: int = 3
    """Version of this record."""
    model_digest: str
    """Digest of the model files (card, weights, source)."""
    guide_digest: str | None
    """Digest of the files of the weaker model of autoguidance; None: there is none."""
    calibration_digest: str | None
    """Digest of the calibration, for the analytic variance; None: there is none."""
    request: AnyEditSpec | None
    """Which edit of which images; None: images from nothing."""
    sampler: AnySampler
    """Sampling method and its steps."""
    sampler_revision: int
    """The sampler's revision, by which the images are made."""
    seed: int
    """Seed of all noise, in [0, 2^64)."""
    tick: str | None = added_field(default=None, pin=None)
    """The scheduled moment that the images are for (ticks.py), by which the seed was chosen; None: of no schedule."""
    label_rule: AnyLabelRule = field(default_factory=IdModuloClasses)
    """How the label, and the id of the noise, follow from the sample id. An edit has its own rule, in request."""
    num_classes: int | None
    """Classes of the model; none: images have no label."""
    shard_size: int
    """Images per output shard."""
    batch_size: int
    """Images per network evaluation. It is part of the spec because rounding depends on it."""
    precision: Precision = added_field(default="float32", pin="float32")
    """How the network is evaluated, and only it. Rounding depends on this and on the next two."""
    channels_last: bool = added_field(default=False, pin=False)
    """Whether images and convolutions have the channels innermost."""
    compile: bool = added_field(default=False, pin=False)
    """Whether PyTorch compiles the network."""
    image_format: AnyImageFormat = field(default_factory=Png)
    """How an image is stored."""
    container: Container = "webdataset"
    """What an output shard is."""
    image_size: tuple[int, int]
    """Height and width, pixels."""
    channels: int
    """Channels of an image."""
    num_levels: NumLevels
    """Values of a pixel."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")
        if self.tick is not None and normal_tick(self.tick) != self.tick:
            raise ValueError(f"tick: must be in UTC, to the minute, got {self.tick!r}; write {normal_tick(self.tick)}")
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of this record, 64 hex digits; fields added later count off their pins only."""
        return config_io.digest(self)

    @property
    def suffix(self) -> str:
        """How the keys of the output shards end."""
        return "parquet" if self.container == "parquet" else "tar"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputShard:
    """Consecutive sample ids that are made, stored and retried together."""

    index: int
    """Place of the shard in the run, from 0."""
    first_id: int
    """Id of its first sample."""
    num_samples: int
    """Samples in it."""

    @property
    def sample_ids(self) -> range:
        """The ids, ascending."""
        return range(self.first_id, self.first_id + self.num_samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """The output shards of a run: disjoint, in id order, covering 0 .. num_images - 1."""

    shard_size: int
    """Images per shard."""
    num_images: int
    """Images of the run."""

    @property
    def num_shards(self) -> int:
        """Output shards of the run."""
        return -(-self.num_images // self.shard_size)

    def shard(self, index: int) -> OutputShard:
        """The shard at `index` in 0 .. num_shards - 1."""
        assert 0 <= index < self.num_shards, (index, self.num_shards)
        first = index * self.shard_size
        return OutputShard(index=index, first_id=first, num_samples=min(self.shard_size, self.num_images - first))

    def missing(self, done: bytes | bytearray) -> Iterator[OutputShard]:
        """The shards that are not done, in order.

        Args:
            done: One byte per shard, 0 where the shard is missing.
        """
        index = done.find(0)
        while index != -1:
            yield self.shard(index)
            index = done.find(0, index + 1)


def plan_shards(spec: SamplingSpec, num_images: int) -> ShardPlan:
    """The output shards of a run of `num_images` images.

    Raises:
        ValueError: If num_images is outside [1, 2^48], or there would be more than 10^9 shards.
    """
    if not 1 <= num_images <= MAX_IMAGES:
        raise ValueError(f"num_images: must be in [1, 2^48], got {num_images}; ask for another number of images")
    plan = ShardPlan(shard_size=spec.shard_size, num_images=num_images)
    if plan.num_shards > MAX_SHARDS:
        raise ValueError(
            f"shard_size: must be large enough for at most 10^9 shards, got {spec.shard_size} for {num_images} images; "
            "choose larger shards"
        )
    return plan


def fixed_batches(shard: OutputShard, batch_size: int) -> Iterator[tuple[range, int]]:
    """The batches in which a shard is made: always `batch_size` ids, in id order.

    The composition of a batch decides the rounding of its images, so it must not depend on the attempt, nor on how many
    images were asked for. The last batch is filled with the ids that would follow; their images are thrown away.

    Yields:
        The ids of a batch and how many of them, from the front, belong to the shard.
    """
    for start in range(0, shard.num_samples, batch_size):
        first = shard.first_id + start
        yield range(first, first + batch_size), min(batch_size, shard.num_samples - start)


def check_same_shard(planned: OutputShard, committed: OutputShard, num_images: int, where: str) -> None:
    """Refuse a plan that cuts the ids differently from what is already committed.

    Args:
        planned: A shard of this plan.
        committed: The shard of the same index in the output.
        num_images: Images that are asked for, for the message.
        where: URI of the output, for the message.

    Raises:
        OutputExistsError: If the two hold different ids.
    """
    if planned == committed:
        return
    end = committed.first_id + committed.num_samples
    raise OutputExistsError(
        f"{where}: shard {committed.index} is committed with {committed.num_samples} images, a run of {num_images} "
        f"images needs {planned.num_samples} there: a run grows only when its old number of images is a multiple of "
        f"shard_size; ask for {end} images, or choose another output or seed"
    )
