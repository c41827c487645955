"""What is in an output prefix: the shards that are committed, the manifest of a finished run, and what may go.

The driver of a run looks here before and after it: a `survey` says what is missing, `publish` writes the manifest when
nothing is, `collect_orphans` removes tars that no record names. A survey is one listing (1,000 keys per request) and
one read per record that neither the manifest nor this run knows already.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from pipeline import config_io
from pipeline.data.manifest import ShardRecord
from pipeline.errors import ObjectMissingError
from pipeline.generation.output.commits import CommitRecord, part_index, read_record, tar_index
from pipeline.generation.spec.sampling_plan import SamplingSpec, ShardPlan, check_same_shard
from pipeline.progress import say
from pipeline.stores.object_store import ObjectInfo, ObjectStore
from pipeline.stores.remover import Remover

MANIFEST_KEY = "manifest.json"
_READ_THREADS = 16
_READ_CHUNK = 1024  # records asked for at once: a run may have millions


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationManifest:
    """The content of `manifest.json`: a complete run. It names no machine and no time: equal runs have equal bytes."""

    format_version: int = 2
    """Version of this record."""
    spec: SamplingSpec
    """All that decides the images."""
    spec_digest: str
    """Digest of the spec."""
    class_names: tuple[str, ...]
    """Names of the classes; empty when images have no label."""
    num_images: int
    """Images of the run, with ids 0 .. num_images - 1."""
    shards: tuple[ShardRecord, ...]
    """The tars, in id order; readers verify size, digest and count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What of a plan is in the store."""

    done: bytearray
    """One byte per shard of the plan, 1 where it is committed and its tar is there."""
    tars: Mapping[int, ShardRecord]
    """The tars of the shards that are done, by index."""
    lost: tuple[int, ...]
    """Shards that are committed but whose tar is gone or cut short: to be made again."""
    unnamed: tuple[ObjectInfo, ...]
    """Tars that none of the records seen names: orphans, or of shards outside the plan, or just being committed."""


def survey(store: ObjectStore, plan: ShardPlan, known: Mapping[int, ShardRecord]) -> Survey:
    """List what is committed.

    Args:
        store: The output prefix.
        plan: The shards wanted; records of others are left alone.
        known: Tars of the plan whose records need not be read: from a manifest, or from this run's own commits.

    Raises:
        OutputExistsError: If a record cuts the ids differently (a run grown from a ragged end).
    """
    tars = dict(known)
    objects: dict[str, ObjectInfo] = {}
    unread: list[int] = []
    for item in store.list():
        if tar_index(item.key) is not None:
            objects[item.key] = item
        elif (index := part_index(item.key)) is not None and index not in tars and index < plan.num_shards:
            unread.append(index)
    for record in _read_records(store, unread):
        check_same_shard(plan.shard(record.index), record.shard, plan.num_images, store.uri)
        tars[record.index] = record.tar

    lost = []
    done = bytearray(plan.num_shards)
    for index, tar in tars.items():
        item_of_tar = objects.pop(tar.key, None)
        if item_of_tar is None or item_of_tar.size_bytes != tar.size_bytes:
            lost.append(index)
        else:
            done[index] = 1
    for index in lost:
        del tars[index]
    return Survey(done=done, tars=tars, lost=tuple(sorted(lost)), unnamed=tuple(objects.values()))


def _read_records(store: ObjectStore, indices: Sequence[int]) -> Iterator[CommitRecord]:
    if not indices:
        return
    with ThreadPool(_READ_THREADS) as threads:  # unlike an executor it waits for no thread when it is interrupted
        for start in range(0, len(indices), _READ_CHUNK):
            yield from threads.imap(lambda index: read_record(store, index), indices[start : start + _READ_CHUNK])


def load_generation_manifest(store: ObjectStore) -> GenerationManifest | None:
    """The manifest of the output prefix, or None when no run has finished there.

    Raises:
        ConfigError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    try:
        data = store.read(MANIFEST_KEY)
    except ObjectMissingError:
        return None
    where = f"{store.uri}/{MANIFEST_KEY}"
    return config_io.read_record(GenerationManifest, data, where, remedy="make the images again into another output")


def publish(store: ObjectStore, manifest: GenerationManifest) -> bool:
    """Write the manifest if it says something new; a shorter one never replaces a longer one.

    Returns:
        Whether it was written.
    """
    current = load_generation_manifest(store)
    if current is not None and (current == manifest or current.num_images > manifest.num_images):
        return False
    store.write(MANIFEST_KEY, config_io.to_json(manifest))
    return True


def write_if_changed(store: ObjectStore, key: str, data: bytes) -> bool:
    """Write an object unless it has these bytes already.

    Returns:
        Whether it was written.
    """
    try:
        if store.read(key) == data:
            return False
    except ObjectMissingError:
        pass
    store.write(key, data)
    return True


def collect_orphans(
    store: ObjectStore, unnamed: Sequence[ObjectInfo], *, older_than_s: float, now_s: float
) -> list[str]:
    """Delete the tars that no record names and that nobody can still be writing.

    Args:
        store: The output prefix.
        unnamed: The candidates, from a survey.
        older_than_s: Least age to collect, seconds; much longer than any writer takes from its tar to its record.
        now_s: The time, seconds since 1970.

    Returns:
        The keys that were deleted: up to the first that cannot be, of which a line is said.
    """
    collected, remover = [], Remover(store, say)
    for candidate in unnamed:
        index = tar_index(candidate.key)
        if index is None or now_s - candidate.modified_s <= older_than_s:
            continue
        try:
            named = read_record(store, index).key
        except ObjectMissingError:
            named = None
        # Its age once more: a writer that makes the same bytes may have adopted it since the listing.
        current = store.stat(candidate.key)
        if named != candidate.key and current is not None and now_s - current.modified_s > older_than_s:
            if not remover.remove([candidate.key]):
                break
            collected.append(candidate.key)
    return collected
