"""Images of verified shards, one shard in memory at a time: of a dataset's split or of a generation run."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from pipeline.data.shard_table import ShardRecord, ShardTable
from pipeline.data.shards import decode_image, read_shard
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Some consecutive images."""

    images: UInt8[np.ndarray, "n h w c"]
    """uint8 [N, H, W, C]."""
    labels: Int64[np.ndarray, " n"] | None
    """Class of each [N]; None when images have no label."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, rows: slice) -> "LabelledImages":
        """Some of the images, as views."""
        return LabelledImages(images=self.images[rows], labels=None if self.labels is None else self.labels[rows])

    def without_labels(self) -> "LabelledImages":
        """The images alone."""
        return LabelledImages(images=self.images, labels=None)


def stream_images(
    store: ObjectStore, shards: Iterable[ShardRecord], stop: int | None = None
) -> Iterator[LabelledImages]:
    """The images of some shards, in order, verified before use.

    Args:
        store: Where the shards are.
        shards: Which, in id order.
        stop: Read no more than this many images; shards beyond it are not fetched.

    Yields:
        The images of one shard after the other, without those shards that hold none.

    Raises:
        ShardCorruptError: If a shard is not as its record says, or an image in it does not decode.
    """
    left = sys.maxsize if stop is None else stop
    if left <= 0:
        return
    for shard in shards:
        samples = read_shard(store, shard)[:left]
        if not samples:
            continue  # all of them were taken down
        try:
            images = np.stack([decode_image(sample.image, sample.extension) for sample in samples])
        except ValueError as error:
            raise ShardCorruptError(f"{store.uri}/{shard.key}: {error}; restore the file or make it again") from error
        labels = [sample.cls for sample in samples if sample.cls is not None]
        left -= len(samples)
        yield LabelledImages(
            images=images, labels=np.array(labels, dtype=np.int64) if len(labels) == len(samples) else None
        )
        if left <= 0:
            return


def read_images(store: ObjectStore, shards: Iterable[ShardRecord], stop: int | None = None) -> LabelledImages:
    """The images of some shards at once; arguments and errors as `stream_images`, at least one image."""
    return join_images(list(stream_images(store, shards, stop)))


def spread_shards(shards: Sequence[ShardRecord], num_images: int) -> tuple[ShardRecord, ...]:
    """Evenly spaced shards that hold about `num_images`, or all: datasets are often sorted by class."""
    total = int(ShardTable.of(shards).num_samples.sum())
    num_kept = min(len(shards), -(-len(shards) * num_images // total))
    return tuple(shards[i * len(shards) // num_kept] for i in range(num_kept))


def regroup(stream: Iterable[LabelledImages], size: int) -> Iterator[LabelledImages]:
    """The same images in the same order, `size` at a time; the last group may be smaller."""
    waiting: list[LabelledImages] = []
    for part in stream:
        waiting.append(part)
        if sum(map(len, waiting)) >= size:
            whole = join_images(waiting)
            num_full = len(whole) // size * size
            for start in range(0, num_full, size):
                yield whole[start : start + size]
            waiting = [whole[num_full:]] if num_full < len(whole) else []
    if waiting:
        yield join_images(waiting)


def join_images(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Several groups as one; labels only if all have them."""
    labels = [part.labels for part in parts if part.labels is not None]
    return LabelledImages(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate(labels) if len(labels) == len(parts) else None,
    )
