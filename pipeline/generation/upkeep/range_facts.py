"""What stands in a run's prefix about a range of 10,000 shards: its part, records, tars and removals."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import unpack
from pipeline.errors import ConfigError, ObjectMissingError, ShardCorruptError
from pipeline.generation.output.commits import CommitRecord, part_index, read_record, tar_index
from pipeline.generation.output.manifest import read_part
from pipeline.generation.output.removals import (
    RemovalRecord,
    Removals,
    fault_of_removals,
    look_at_removals,
    sound_removals,
)
from pipeline.stores.object_store import ObjectInfo, ObjectStore

THREADS = 8
"""Shards that are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeFacts:
    """One range, as it is found; nothing in it is believed yet."""

    indices: range
    """Its shards, as many as the manifest names."""
    rows: Sequence[ShardRecord] | None
    """What the manifest's part says of each; None: it is missing or altered."""
    part_fault: str | None
    """What is wrong with the part; None: nothing."""
    records: Mapping[int, CommitRecord]
    """Commit records that can be read; empty where only their keys were listed."""
    record_faults: Mapping[int, str]
    """Why the others cannot be, by index."""
    tars: Mapping[str, ObjectInfo]
    """Tars of the range, by key."""
    removals: Mapping[int, Removals]
    """What was removed of it, where its records agree with each other."""
    broken: Mapping[int, Mapping[str, RemovalRecord | str]]
    """Removal records, as `look_at_removals` gives them, of shards where they do not."""
    removal_faults: Mapping[str, str]
    """Why not, by the key of the first that does not."""

    def committed(self, index: int) -> ShardRecord | None:
        """The tar that stands of a shard by its records alone; None where no record can be read."""
        if index in self.removals:
            return self.removals[index].tar
        return self.records[index].tar if index in self.records else None

    def row(self, index: int) -> ShardRecord | None:
        """The tar of a shard by the manifest."""
        return None if self.rows is None else self.rows[index - self.indices.start]

    def expected_commit(self, index: int) -> ShardRecord | None:
        """The tar that the commit record of a shard must name, by the manifest and what was removed since."""
        return self.removals[index].original if index in self.removals else self.row(index)


def read_range(store: ObjectStore, part: PartRecord, threads: ThreadPool, *, with_records: bool) -> RangeFacts:
    """Look at a range.

    Args:
        store: The run's prefix.
        part: What the manifest names for it.
        threads: Read the records.
        with_records: Whether to read the records, or only to see which are there.

    Raises:
        FormatVersionError: If something is of another version.
        StorageError: If the store fails.
    """
    first = part.range_index * SHARDS_PER_PART
    indices, digits = range(first, first + part.num_shards), f"{part.range_index:05d}"
    rows: Sequence[ShardRecord] | None = None
    fault: str | None = None
    try:
        rows = read_part(store, part)
    except ObjectMissingError:
        fault = "is missing"
    except ShardCorruptError:
        fault = "was altered or cut short"
    there = {part_index(info.key) for info in store.list(f"_parts/{digits}")}
    faults = {index: "is missing" for index in indices if index not in there}
    records: dict[int, CommitRecord] = {}
    if with_records:
        for index, found in zip(indices, threads.imap(lambda one: _read(store, one, there), indices)):
            if isinstance(found, CommitRecord):
                records[index] = found
            elif found is not None:
                faults[index] = found
    removals: dict[int, Removals] = {}
    broken, removal_faults = {}, {}
    for index, of_shard in look_at_removals(store, digits).items():
        if (why := fault_of_removals(of_shard)) is not None:
            broken[index] = of_shard
            removal_faults[why[0]] = why[1]
        else:
            removals[index] = sound_removals(of_shard)
    return RangeFacts(
        indices=indices,
        rows=rows,
        part_fault=fault,
        records=records,
        record_faults=faults,
        tars={info.key: info for info in store.list(digits) if tar_index(info.key) is not None},
        removals=removals,
        broken=broken,
        removal_faults=removal_faults,
    )


def tar_faults(
    store: ObjectStore,
    facts: RangeFacts,
    wanted: Mapping[int, ShardRecord],
    threads: ThreadPool,
    *,
    quick: bool,
) -> Iterator[tuple[int, str | None]]:
    """What is wrong with the tar of each of some shards, in order; None: nothing.

    Args:
        store: The run's prefix.
        facts: The range, with its listing.
        wanted: The tar that each must have.
        threads: Read the tars, a few at once.
        quick: Whether to compare sizes, as they were listed, alone.
    """

    def look(item: tuple[int, ShardRecord]) -> tuple[int, str | None]:
        index, tar = item
        found = facts.tars.get(tar.key)
        if found is None:
            return index, "is missing"
        if found.size_bytes != tar.size_bytes:
            return index, f"has {found.size_bytes} bytes, {tar.size_bytes} are recorded"
        if quick:
            return index, None
        try:
            sha256 = hashlib.sha256(store.read(tar.key)).hexdigest()
        except ObjectMissingError:  # since the listing
            return index, "is missing"
        return index, None if sha256 == tar.sha256 else f"was altered, its sha256 is {sha256}"

    return threads.imap(look, wanted.items())


def _read(store: ObjectStore, index: int, there: set[int | None]) -> CommitRecord | str | None:
    """A record, or what is wrong with it; None where the listing has told already."""
    if index not in there:
        return None
    try:
        record = read_record(store, index)
    except ObjectMissingError:
        return "is missing"
    except ConfigError:
        return "is damaged"
    return record


def measure(store: ObjectStore, key: str) -> tuple[ShardRecord, frozenset[int]] | None:
    """What an output shard's file itself says: its bytes must have the digest in its key.

    Returns:
        A record of it, and the sample ids in it; None if it is not there, or altered.
    """
    try:
        data = store.read(key)
    except ObjectMissingError:
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    if not key.partition("-")[2].startswith(sha256):
        return None
    samples = unpack(key, data, f"{store.uri}/{key}")
    tar = ShardRecord(key=key, size_bytes=len(data), sha256=sha256, num_samples=len(samples))
    return tar, frozenset(int(sample.key) for sample in samples)
