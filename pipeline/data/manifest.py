"""The dataset manifest: which shards a dataset consists of, and what is in them.

    manifest.json                                    last and once; readers trust only what it names
    _manifest/<split>/RRRRR-NNNNN-<sha256>.parquet   the shards of a split, 10,000 in each part (shard_parts.py)

A sample's id is its row number in manifest order within its split, 0..N-1, for ever.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from pipeline import config_io
from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord, read_part, write_part
from pipeline.data.shard_table import Int64Array, ShardRecord, ShardTable
from pipeline.errors import ConfigError, DatasetError, DatasetMissingError, ObjectMissingError
from pipeline.stores.object_store import ObjectStore

MANIFEST_KEY = "manifest.json"
_REMEDY = "prepare the dataset again into an empty place"
_NUM_THREADS = 8  # a dataset of a million shards has a hundred parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The shards of one split, in the order that gives samples their ids."""

    shards: Sequence[ShardRecord]
    """Shards in id order; kept as columns, whatever sequence is given."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", ShardTable.of(self.shards))
        empty = np.flatnonzero(self.shard_sizes < 1)
        if empty.size:
            raise ValueError(
                f"num_samples: a shard must hold at least 1, got {self.shard_sizes[empty[0]]} in "
                f"{self.shards[int(empty[0])].key!r}; the manifest is damaged"
            )

    @property
    def table(self) -> ShardTable:
        """The shards as columns."""
        return cast(ShardTable, self.shards)

    @property
    def shard_sizes(self) -> Int64Array:
        """Samples in every shard, int64 [S]."""
        return self.table.num_samples

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return int(self.shard_sizes.sum())

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.table.size_bytes.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What is said of a dataset beside its shards. Images are uint8 [*image_size, channels]."""

    name: str
    """Name of the dataset, for people."""
    source: str
    """Where the images came from, for people."""
    image_size: tuple[int, int]
    """Height and width in pixels."""
    num_levels: Literal[256, 65536] = 256
    """Levels of a pixel's value: 8 or 16 bits. Only datasets of 256 are made and read so far."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    class_names: tuple[str, ...]
    """Name of each label 0..; empty: the images have no labels."""
    num_quarantined: int
    """Source images left out because they do not decode; `quarantine.json` lists them."""

    def __post_init__(self) -> None:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size: must be at least 1 pixel each way, got {self.image_size}; this is damaged")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: must be 1 or 3, got {self.channels}; the manifest is damaged")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return (*self.image_size, self.channels)

    @property
    def num_classes(self) -> int | None:
        """Number of labels, None without labels."""
        return len(self.class_names) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRecord:
    """A split in `manifest.json`."""

    parts: tuple[PartRecord, ...]
    """Where its shards are listed, in id order."""

    def __post_init__(self) -> None:
        for number, part in enumerate(self.parts):
            is_whole = part.num_shards == SHARDS_PER_PART or number == len(self.parts) - 1
            if part.range_index != number or not is_whole:
                raise ValueError(f"parts: must list all ranges from 0, got {part.key!r} at {number}; do not edit it")


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRecord(DatasetFacts):
    """The content of `manifest.json`."""

    format_version: int = 3
    """Version of this record."""
    splits: dict[str, SplitRecord]
    """Splits by name: "train", and "held_out" if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest(DatasetFacts):
    """What a dataset is: its facts and its shards, 48 bytes of memory for each of them."""

    splits: dict[str, Split]
    """Splits by name: "train", and "held_out" if there is one."""

    def __post_init__(self) -> None:
        DatasetFacts.__post_init__(self)
        if not self.splits.get("train", Split(shards=())).shards:
            raise ValueError(f"splits: needs a 'train' split with shards, got {sorted(self.splits)}")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a reader can see; the same images prepared elsewhere have the same digest.

        It is that of canonical JSON (config_io.py): the fields of `DatasetFacts`, name and source empty, and in
        "splits" for each split {"num_shards": S, "sha256": `ShardTable.digest`}. No key of a shard is in it, and
        nothing of how the parts are written.
        """
        facts = DatasetFacts(**(_facts_of(self) | {"name": "", "source": ""}))
        splits = {
            name: {"num_shards": len(split.shards), "sha256": split.table.digest} for name, split in self.splits.items()
        }
        return config_io.digest(config_io.identity(facts) | {"splits": splits})


def load_manifest(store: ObjectStore) -> DatasetManifest:
    """Read a dataset's manifest with all its parts.

    Raises:
        DatasetMissingError: If there is none.
        DatasetError: If it is damaged; ShardCorruptError, which is one, if a part is.
        FormatVersionError: If it is of another version.
        StorageAccessError: If access is refused.
    """
    where = f"{store.uri}/{MANIFEST_KEY}"
    try:
        data = store.read(MANIFEST_KEY)
    except ObjectMissingError:
        raise DatasetMissingError(f"{where}: no dataset here; make one with jobs/prepare_data.py") from None
    try:
        record = config_io.read_record(ManifestRecord, data, where, remedy=_REMEDY)
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="manifest") as threads:
            splits = {
                name: Split(shards=ShardTable.joined(list(threads.map(lambda part: _read(store, part), split.parts))))
                for name, split in record.splits.items()
            }
        return DatasetManifest(**_facts_of(record), splits=splits)
    except ConfigError as error:
        raise DatasetError(f"{error}; {_REMEDY}") from None
    except ValueError as error:
        raise DatasetError(f"{where}: {error}; {_REMEDY}") from None


def write_manifest(store: ObjectStore, manifest: DatasetManifest) -> ManifestRecord | None:
    """Publish a dataset: the parts first, `manifest.json` last and once.

    Returns:
        What was written; None if there is a manifest already, which stays.

    Raises:
        StorageError: If the store fails.
    """
    splits = {
        name: SplitRecord(parts=tuple(write_part(store, rows, split=name) for rows in _ranges(split.table)))
        for name, split in manifest.splits.items()
    }
    record = ManifestRecord(**_facts_of(manifest), splits=splits)
    return record if store.create(MANIFEST_KEY, config_io.to_json(record)) else None


def _read(store: ObjectStore, part: PartRecord) -> ShardTable:
    try:
        return read_part(store, part, remedy=f"restore the file, or {_REMEDY}")
    except ObjectMissingError as error:
        raise DatasetError(f"{error}, and {MANIFEST_KEY} names it; restore the file, or {_REMEDY}") from None


def _ranges(table: ShardTable) -> Iterator[ShardTable]:
    for begin in range(0, len(table), SHARDS_PER_PART):
        yield table.rows(begin, min(begin + SHARDS_PER_PART, len(table)))


def _facts_of(facts: DatasetFacts) -> dict[str, Any]:
    return {field.name: getattr(facts, field.name) for field in dataclasses.fields(DatasetFacts)}
