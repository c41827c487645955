"""Exactly-once output: how a shard becomes part of a run, and how readers know.

    NNNNNNNNN-<sha256>.tar   the images of output shard NNNNNNNNN; .parquet if the spec says so
    _parts/NNNNNNNNN.json    the commit record of that shard: create-once; only a record makes a shard exist
    manifest.json            written last, when every shard is committed; readers trust only this

A writer puts its tar first and then tries to create the record. The digest in the tar's key keeps two writers whose
bytes differ (other hardware or software) from overwriting each other: each has its own key, one record names one of
them, and the loser removes its own. Writers whose bytes are equal write the same object, and both have succeeded.
Safety comes from the create-once record alone; there are no locks, clocks or leases in it.

A writer killed between tar and record leaves a tar that no record names: an *orphan*. The next attempt usually makes
the same bytes and adopts it; what stays is collected when nobody can still be writing it (see inventory.py).

Indices have nine digits, so that the order of the keys is the order of the shards.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from pipeline import config_io
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import CommitConflictError, ConfigError
from pipeline.generation.output.removals import read_removals
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec
from pipeline.progress import say
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.remover import Remover

_TAR = re.compile(r"(\d{9})-[0-9a-f]{64}\.(?:tar|parquet)")
_PART = re.compile(r"_parts/(\d{9})\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Who made a shard, where and how long it took. Kept for people, never compared."""

    host: str
    """Name of the machine."""
    device: str
    """Device the images were computed on."""
    software: str
    """Versions that decide rounding."""
    started_at_utc: str
    """Start, ISO 8601."""
    wall_s: float
    """Time to make the shard, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord:
    """The content of `_parts/NNNNNNNNN.json`: one committed output shard."""

    format_version: int = 2
    """Version of this record."""
    index: int
    """Place of the shard in the run."""
    first_id: int
    """Id of its first sample."""
    num_samples: int
    """Samples in it, with consecutive ids."""
    key: str
    """Key of the tar in the output prefix."""
    size_bytes: int
    """Size of the tar, bytes."""
    sha256: str
    """Digest of the tar, 64 hex digits."""
    model_digest: str
    """Digest of the model files."""
    spec_digest: str
    """Digest of the sampling spec."""
    made: Provenance
    """Who, where, how long: stands apart from what is compared."""

    @property
    def shard(self) -> OutputShard:
        """The ids that the record commits."""
        return OutputShard(index=self.index, first_id=self.first_id, num_samples=self.num_samples)

    @property
    def tar(self) -> ShardRecord:
        """What a reader needs to fetch and verify the tar."""
        return ShardRecord(key=self.key, size_bytes=self.size_bytes, sha256=self.sha256, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What became of one attempt to commit a shard."""

    record: CommitRecord
    """The record that stands, whoever wrote it."""
    outcome: Literal["first", "equal", "lost"]
    """first: this writer's record; equal: another's, same bytes; lost: another's, other bytes."""


def tar_key(index: int, sha256: str, suffix: str = "tar") -> str:
    """Key of an output shard's tar, or of its Parquet file."""
    return f"{index:09d}-{sha256}.{suffix}"


def part_key(index: int) -> str:
    """Key of an output shard's commit record."""
    return f"_parts/{index:09d}.json"


def tar_index(key: str) -> int | None:
    """Index of the output shard whose tar or Parquet file has this key; None for another object."""
    match = _TAR.fullmatch(key)
    return int(match[1]) if match else None


def part_index(key: str) -> int | None:
    """Index of the output shard whose commit record has this key; None for another object."""
    match = _PART.fullmatch(key)
    return int(match[1]) if match else None


def write_once(store: ObjectStore, spec: SamplingSpec, shard: OutputShard, tar: bytes, made: Provenance) -> Commit:
    """Commit a shard exactly once, however many writers try.

    Args:
        store: The output prefix.
        spec: Spec of the run.
        shard: Which ids the tar holds.
        tar: The packed images, a tar or what else the spec says.
        made: Who made them.

    Returns:
        The record that stands and whether it is this writer's. A lost writer's tar is removed, where that is allowed;
        whoever makes images again that were removed for good (removals.py) is one.

    Raises:
        CommitConflictError: If the standing record is of another plan or spec, or if it names a tar that is gone and
            this writer makes other bytes.
        StorageError: If the store fails; nothing half written is ever visible.
    """
    digest = hashlib.sha256(tar).hexdigest()
    record = CommitRecord(
        index=shard.index,
        first_id=shard.first_id,
        num_samples=shard.num_samples,
        key=tar_key(shard.index, digest, spec.suffix),
        size_bytes=len(tar),
        sha256=digest,
        model_digest=spec.model_digest,
        spec_digest=spec.digest,
        made=made,
    )
    # An existing object of this key has these bytes; writing it again makes it young, so that no collector takes it.
    store.write(record.key, tar)
    if store.create(part_key(shard.index), config_io.to_json(record)):
        return Commit(record=record, outcome="first")
    standing = read_record(store, shard.index)
    where = f"{store.uri}: {part_key(shard.index)}"
    if (standing.spec_digest, standing.shard) != (record.spec_digest, record.shard):
        raise CommitConflictError(
            f"{where} commits {standing.num_samples} images from id {standing.first_id} of spec "
            f"{standing.spec_digest[:16]}, this run {shard.num_samples} from id {shard.first_id} of spec "
            f"{record.spec_digest[:16]}; choose another output"
        )
    removed = read_removals(store, f"{shard.index:09d}").get(shard.index)
    if removed is not None and removed.tar.key != record.key:
        Remover(store, say).remove([record.key])
        return Commit(record=standing, outcome="lost")
    if standing.tar == record.tar:
        return Commit(record=standing, outcome="equal")
    Remover(store, say).remove([record.key])  # never the winner's: other bytes, other key
    if store.stat(standing.key) is None:
        raise CommitConflictError(
            f"{where} names {standing.key}, which is gone, and this machine makes other bytes; "
            "restore that object, or delete the record to have the shard made anew"
        )
    return Commit(record=standing, outcome="lost")


def read_record(store: ObjectStore, index: int) -> CommitRecord:
    """The commit record of shard `index`.

    Raises:
        ObjectMissingError: If the shard is not committed.
        ConfigError: If the record is damaged: it is that of another shard, or its key has another digest.
        FormatVersionError: If it is of another version.
    """
    key = part_key(index)
    where = f"{store.uri}/{key}"
    record = config_io.read_record(CommitRecord, store.read(key), where, remedy="name another output")
    if record.index != index or not record.key.startswith(f"{index:09d}-{record.sha256}."):
        raise ConfigError(
            f"{where}: is damaged: it says shard {record.index}, the key {record.key} and the sha256 {record.sha256}; "
            f"jobs/output.py repair {store.uri} mends what can be mended"
        )
    return record
