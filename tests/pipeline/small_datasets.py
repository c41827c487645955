"""Small datasets of random pixels, packed as prepare_data packs them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data.manifest import DatasetManifest, Split, write_manifest
from pipeline.data.shard_table import ShardRecord, UInt8Array
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.stores.storage import open_store

NUM_CLASSES = 7


@dataclass(frozen=True, kw_only=True)
class SmallDataset:
    """A dataset in a folder, and the pixels that it must give back. The label of a sample is its id modulo 7."""

    root: Path
    manifest: DatasetManifest
    images: UInt8Array

    @property
    def uri(self) -> str:
        return str(self.root)

    @property
    def shards(self) -> Sequence[ShardRecord]:
        return self.manifest.splits["train"].shards

    def path(self, shard: int) -> Path:
        return self.root / self.shards[shard].key

    def with_record(self, shard: int, record: ShardRecord) -> "SmallDataset":
        """The same files under a manifest that says something else of one shard."""
        records = [*self.shards[:shard], record, *self.shards[shard + 1 :]]
        return replace(self, manifest=replace(self.manifest, splits={"train": Split(shards=tuple(records))}))


def make_dataset(
    root: Path, sizes: Sequence[int], *, image_size: tuple[int, int] = (8, 8), channels: int = 1, labelled: bool = True
) -> SmallDataset:
    """Write a dataset with one shard for each size."""
    store = open_store(str(root))
    shape = (sum(sizes), *image_size, channels)
    images = np.random.default_rng(len(sizes)).integers(0, 256, shape, dtype=np.uint8)
    records: list[ShardRecord] = []
    first = 0
    for number, size in enumerate(sizes):
        samples = [
            Sample(key=f"{i:08d}", image=encode_png(images[i]), cls=i % NUM_CLASSES if labelled else None, meta={})
            for i in range(first, first + size)
        ]
        data = pack_shard(samples)
        record = ShardRecord(
            key=f"train/{number:09d}.tar",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            num_samples=size,
        )
        store.write(record.key, data)
        records.append(record)
        first += size
    manifest = DatasetManifest(
        name="small",
        source="random pixels",
        image_size=image_size,
        channels=channels,
        class_names=tuple("abcdefg") if labelled else (),
        splits={"train": Split(shards=tuple(records))},
        num_quarantined=0,
    )
    assert write_manifest(store, manifest) is not None
    return SmallDataset(root=root, manifest=manifest, images=images)
