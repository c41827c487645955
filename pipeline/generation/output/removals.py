"""Images that were taken down for good: records that supersede the commit record of a shard.

    _removed/NNNNNNNNN-KKKK.json    the K-th time that images of output shard NNNNNNNNN were removed; create-once

A shard is what its newest removal record says, and what its commit record says where there is none. The commit record
stays as it was made. Each record names only what it took itself: the images that are gone are those of all of a shard's
records. The images are never made again, however the run grows and whatever is repaired. Where all images of a shard
are gone, it still has a tar (or Parquet file), an empty one with 0 samples: shards keep their places, and no reader
needs a rule.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

from pipeline import config_io
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError
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

    def num_gone(self, key: str) -> int:
        """Images that are gone from the tar of a key: none from the original, all from the one that stands."""
        num_gone = 0
        for record in self.records:
            if record.old_key == key:
                break
            num_gone += len(record.ids)
        return num_gone


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
        ConfigError: If a record is damaged, or does not go on from the one before.
        FormatVersionError: If one is of another version.
        StorageError: If the store fails.
    """
    found = look_at_removals(store, digits)
    for of_shard in found.values():
        if (fault := fault_of_removals(of_shard)) is not None:
            key, text = fault
            raise ConfigError(f"{store.uri}/{key}: {text}; jobs/output.py repair {store.uri} mends what can be mended")
    return {index: sound_removals(of_shard) for index, of_shard in found.items()}


def look_at_removals(store: ObjectStore, digits: str = "") -> dict[int, dict[str, RemovalRecord | str]]:
    """The removal records of each shard, by key and in order; of one that cannot be read, why not.

    Nothing is believed yet; arguments and other errors as `read_removals`.
    """
    keys = [info.key for info in store.list(f"{REMOVAL_FOLDER}{digits}") if _REMOVAL.fullmatch(info.key)]
    if not keys:
        return {}
    found: dict[int, dict[str, RemovalRecord | str]] = {}
    with ThreadPool(min(_THREADS, len(keys))) as threads:
        for key, record in zip(keys, threads.map(partial(_read, store), keys), strict=True):
            found.setdefault(int(key.removeprefix(REMOVAL_FOLDER)[:9]), {})[key] = record
    return found


def sound_removals(of_shard: Mapping[str, RemovalRecord | str]) -> Removals:
    """The removals of a shard in which `fault_of_removals` finds no fault."""
    return Removals(records=tuple(one for one in of_shard.values() if isinstance(one, RemovalRecord)))


def fault_of_removals(of_shard: Mapping[str, RemovalRecord | str]) -> tuple[str, str] | None:
    """The first of a shard's removal records that does not agree with itself or with the one before, and why; or None.

    Args:
        of_shard: One entry of `look_at_removals`.
    """
    before: RemovalRecord | None = None
    gone = set[int]()
    for sequence, (key, record) in enumerate(of_shard.items()):
        if isinstance(record, str):
            return key, f"is damaged ({record})"
        if key != removal_key(record.index, record.sequence):
            return key, f"says that it is number {record.sequence} of shard {record.index}"
        if record.sequence != sequence:
            return key, f"is there, and {removal_key(record.index, sequence)} is not"
        for name, of_tar, sha256 in (
            ("key", record.key, record.sha256),
            ("old_key", record.old_key, record.old_sha256),
        ):
            if not of_tar.startswith(f"{record.index:09d}-{sha256}."):
                return key, f"is damaged ({name} and digest disagree)"
        if not record.ids or tuple(sorted(set(record.ids))) != record.ids or gone & set(record.ids):
            return key, "is damaged (ids must ascend, and name no image twice)"
        if record.num_samples < 0 or record.size_bytes < 1 or record.old_size_bytes < 1:
            return key, "is damaged (sizes must be positive)"
        if before is not None and record.tar_before != before.tar:
            return key, "does not go on from the record before"
        before, gone = record, gone | set(record.ids)
    return None


def without_removed(tars: Sequence[ShardRecord], first: int, removals: Mapping[int, Removals]) -> list[ShardRecord]:
    """The tars that stand.

    Args:
        tars: Tars of consecutive shards, as some record names them.
        first: Index of the first.
        removals: What was removed.
    """
    return [removals[index].tar if index in removals else tar for index, tar in enumerate(tars, start=first)]


def num_planned(tars: Iterable[ShardRecord], first: int, removals: Mapping[int, Removals]) -> int:
    """Images that consecutive shards had when they were made: those in their tars, and those that are gone from them.

    Args:
        tars: The tars.
        first: Index of the first.
        removals: What was removed.
    """
    return sum(
        tar.num_samples + (removals[index].num_gone(tar.key) if index in removals else 0)
        for index, tar in enumerate(tars, start=first)
    )


def _read(store: ObjectStore, key: str) -> RemovalRecord | str:
    remedy = "run the program that wrote it"
    try:
        return config_io.read_record(RemovalRecord, store.read(key), f"{store.uri}/{key}", remedy=remedy)
    except ConfigError as error:
        return str(error)
