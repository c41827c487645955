"""Images that were taken down for good: records that supersede the commit record of a shard.

    _removed/NNNNNNNNN-KKKK.json    the K-th time that images of output shard NNNNNNNNN were removed; create-once

A shard is what its newest removal record says, and what its commit record says where there is none. The commit record
stays as it was made. Each record names only what it took itself: the images that are gone are those of all of a shard's
records. The images are never made again, however the run grows and whatever is repaired.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

from pipeline import config_io
from pipeline.data.shard_table import ShardRecord
from pipeline.stores.object_store import ObjectStore

REMOVAL_FOLDER = "_removed/"
_REMOVAL = re.compile(r"_removed/(\d{9})-(\d{4})\.json")
_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalRecord:
    """The content of `_removed/NNNNNNNNN-KKKK.json`."""

    format_version: int = 2
    """Version of this record."""
    index: int
    """Place of the shard in the run."""
    sequence: int
    """How many removals of this shard came before."""
    ids: tuple[int, ...]
    """Sample ids that this removal took, ascending."""
    reason: str
    """Why, as who removed them said."""
    old_key: str
    """Key of the tar before."""
    old_sha256: str
    """Digest of the tar before, 64 hex digits."""
    old_size_bytes: int
    """Size of the tar before, bytes."""
    key: str
    """Key of the tar without them."""
    sha256: str
    """Digest of the tar without them, 64 hex digits."""
    size_bytes: int
    """Size of the tar without them, bytes."""
    num_samples: int
    """Images that are left in it."""
    removed_at_utc: str
    """When, ISO 8601: for people, it stands apart from what is compared."""

    @property
    def tar(self) -> ShardRecord:
        """What a reader needs to fetch and verify the tar without the images."""
        return ShardRecord(key=self.key, size_bytes=self.size_bytes, sha256=self.sha256, num_samples=self.num_samples)

    @property
    def tar_before(self) -> ShardRecord:
        """The same of the tar that still had them."""
        return ShardRecord(
            key=self.old_key,
            size_bytes=self.old_size_bytes,
            sha256=self.old_sha256,
            num_samples=self.num_samples + len(self.ids),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Removals:
    """All that was removed from one shard."""

    records: tuple[RemovalRecord, ...]
    """In the order in which they were made, at least one."""

    @property
    def tar(self) -> ShardRecord:
        """The tar that stands."""
        return self.records[-1].tar

    @property
    def original(self) -> ShardRecord:
        """The tar that the commit record names."""
        return self.records[0].tar_before

    @property
    def ids(self) -> frozenset[int]:
        """Sample ids that are gone."""
        return frozenset(one for record in self.records for one in record.ids)

    @property
    def superseded_keys(self) -> frozenset[str]:
        """Tars that hold images which are gone."""
        return frozenset(record.old_key for record in self.records)

    @property
    def keys(self) -> frozenset[str]:
        """All tars that the records name."""
        return self.superseded_keys | {self.tar.key}


def removal_key(index: int, sequence: int) -> str:
    """Key of a removal record."""
    return f"{REMOVAL_FOLDER}{index:09d}-{sequence:04d}.json"


def removal_index(key: str) -> int | None:
    """Index of the output shard whose removal record has this key; None for another object."""
    match = _REMOVAL.fullmatch(key)
    return int(match[1]) if match else None


def read_removals(store: ObjectStore, digits: str = "") -> dict[int, Removals]:
    """What was removed, by the index of the shard; one listing where nothing was.

    Args:
        store: The output prefix.
        digits: First digits of the shards' nine-digit numbers, such as the five of a range; empty: of all.

    Raises:
        ConfigError: If a record is damaged.
        FormatVersionError: If one is of another version.
        StorageError: If the store fails.
    """
    keys = [info.key for info in store.list(f"{REMOVAL_FOLDER}{digits}") if _REMOVAL.fullmatch(info.key)]
    if not keys:
        return {}
    with ThreadPool(min(_THREADS, len(keys))) as threads:
        records = threads.map(partial(_read, store), keys)
    by_shard: dict[int, list[RemovalRecord]] = {}
    for record in records:  # listings are sorted by key, and so by sequence
        by_shard.setdefault(record.index, []).append(record)
    return {index: Removals(records=tuple(of_shard)) for index, of_shard in by_shard.items()}


def without_removed(tars: Sequence[ShardRecord], first: int, removals: Mapping[int, Removals]) -> list[ShardRecord]:
    """The tars that stand.

    Args:
        tars: Tars of consecutive shards, as some record names them.
        first: Index of the first.
        removals: What was removed.
    """
    return [removals[index].tar if index in removals else tar for index, tar in enumerate(tars, start=first)]


def _read(store: ObjectStore, key: str) -> RemovalRecord:
    remedy = "run the program that wrote it"
    return config_io.read_record(RemovalRecord, store.read(key), f"{store.uri}/{key}", remedy=remedy)
