"""Making one shard of a dataset: a plain function over plain values, safe to run again and on any machine."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.data.sources import Reader
from pipeline.errors import PipelineError
from pipeline.ray_errors import to_values
from pipeline.stores.object_store import ObjectStore

_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """The images of one shard, before they are read; a row of a Ray dataset."""

    split: str
    """Name of the split."""
    index: int
    """Number of the shard within the split."""
    first: int
    """Position of its first image within the split."""
    keys: list[str]
    """Images, as the source names them."""
    labels: list[int]
    """Their class numbers; -1 without classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What became of a task; a row of a Ray dataset."""

    split: str
    """Name of the split."""
    num_images: int
    """Images read, quarantined ones included."""
    key: str = ""
    """Key of the shard; empty if no image of it decoded."""
    size_bytes: int = 0
    """Size of the tar in bytes."""
    sha256: str = ""
    """Its SHA-256."""
    num_samples: int = 0
    """Samples in it."""
    quarantined: list[str] = field(default_factory=list)
    """Images that do not decode."""
    reasons: list[str] = field(default_factory=list)
    """Why, for each."""
    error: str = ""
    """Name of the class in pipeline/errors.py that ended the task; empty: none."""
    message: str = ""
    """Its message. Errors travel as values, so that Ray neither wraps nor retries them."""
    trace: str = ""
    """Its traceback."""

    @property
    def record(self) -> ShardRecord:
        """The shard's entry in the manifest."""
        return ShardRecord(key=self.key, size_bytes=self.size_bytes, sha256=self.sha256, num_samples=self.num_samples)


def make_shard(task: ShardTask, reader: Reader, store: ObjectStore, publish: bool) -> ShardResult:
    """Read, decode, pack and, if `publish`, write one shard.

    Args:
        task: Which images.
        reader: Reads them.
        store: The dataset.
        publish: False only computes the result.

    Returns:
        The shard's record, the images that do not decode, or the error.
    """
    quarantined: dict[str, str] = {}
    try:
        samples = list(_samples(task, reader, quarantined))
        result = ShardResult(
            split=task.split,
            num_images=len(task.keys),
            quarantined=list(quarantined),
            reasons=list(quarantined.values()),
        )
        if not samples:
            return result
        data = pack_shard(samples)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"{task.split}/{task.index:09d}-{sha256[:16]}.tar"
        if publish:
            _write_verified(store, key, data)
    except PipelineError as error:
        return ShardResult(split=task.split, num_images=len(task.keys), **to_values(error))
    return dataclasses.replace(result, key=key, size_bytes=len(data), sha256=sha256, num_samples=len(samples))


def _write_verified(store: ObjectStore, key: str, data: bytes) -> None:
    """Write once; an equal shard of an interrupted run stays, one altered since is replaced."""
    if not store.create(key, data) and store.read(key) != data:
        store.write(key, data)


def _samples(task: ShardTask, reader: Reader, quarantined: dict[str, str]) -> Iterator[Sample]:
    """Fetched by threads a few at a time, because images may be large; decoded here one by one."""
    with ThreadPool(_READ_THREADS) as pool:  # unlike an executor it waits for no thread when it is interrupted
        for start in range(0, len(task.keys), _READ_THREADS):
            keys = task.keys[start : start + _READ_THREADS]
            for position, data in enumerate(pool.map(reader.fetch, keys), start):
                try:
                    png = encode_png(reader.decode(data))
                except ValueError as error:
                    quarantined[task.keys[position]] = str(error)
                    continue
                label = task.labels[position]
                yield Sample(
                    key=f"{task.first + position:09d}",
                    image=png,
                    cls=None if label < 0 else label,
                    meta={"source": task.keys[position]},
                )
