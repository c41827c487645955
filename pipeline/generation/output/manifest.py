"""The manifest of a finished run: a small JSON file that names Parquet files with the shards, 10,000 of them in each.

    manifest.json                                    last; readers trust only this and what it names
    _manifest/RRRRR-NNNNN-<sha256>.parquet           the shards of range RRRRR, NNNNN of them: a *part* (shard_parts.py)

A part is written once its range is complete, long before the run is, so that whoever goes on with a run of millions of
shards reads no record of it. The manifest is replaced by If-Match and only by a longer one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from pipeline import config_io
from pipeline.data import shard_parts
from pipeline.data.shard_parts import PART_FOLDER, SHARDS_PER_PART, PartRecord, is_part
from pipeline.data.shard_table import ShardRecord, ShardTable
from pipeline.errors import ObjectMissingError, OutputExistsError
from pipeline.generation.output.removals import num_planned, read_removals
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.stores.object_store import ObjectStore

MANIFEST_KEY = "manifest.json"
_REMEDY = "jobs/output.py repair makes it again"
_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationManifest:
    """The content of `manifest.json`: a complete run. It names no machine and no time: equal runs have equal bytes."""

    format_version: int = 3
    """Version of this record."""
    spec: SamplingSpec
    """All that decides the images."""
    spec_digest: str
    """Digest of the spec."""
    model_uri: str
    """Where the model was found: a hint, the spec holds its digest."""
    guide_uri: str | None
    """Where the guide was found; None: there is none."""
    class_names: tuple[str, ...]
    """Names of the classes; empty when images have no label."""
    num_images: int
    """Images of the run, with ids 0 .. num_images - 1."""
    parts: tuple[PartRecord, ...]
    """Where the shards are listed, in id order."""

    @property
    def num_shards(self) -> int:
        """Output shards of the run."""
        return sum(part.num_shards for part in self.parts)


def read_shards(store: ObjectStore, parts: Sequence[PartRecord]) -> Iterator[ShardRecord]:
    """The shards that parts list, in id order; readers verify size, digest and count of each.

    Args:
        store: The output prefix.
        parts: Which; read one by one, as far as the iterator is followed.

    Raises:
        ShardCorruptError: If a part was altered.
        ObjectMissingError, StorageError: If one cannot be read.
    """
    for part in parts:
        yield from read_part(store, part)


def read_part(store: ObjectStore, part: PartRecord) -> list[ShardRecord]:
    """The shards of one range; errors as `read_shards`."""
    return list(shard_parts.read_part(store, part, remedy=_REMEDY))


def write_part(store: ObjectStore, range_index: int, shards: Sequence[ShardRecord]) -> PartRecord:
    """Write the shards of a range, all of them in order; equal shards give equal bytes.

    Raises:
        StorageError: If the store fails.
    """
    return shard_parts.write_part(store, _table_of(range_index, shards))


def encode_part(range_index: int, shards: Sequence[ShardRecord]) -> tuple[PartRecord, bytes]:
    """What `write_part` writes, and its bytes."""
    return shard_parts.encode_part(_table_of(range_index, shards))


def unknown_part(range_index: int, num_shards: int) -> PartRecord:
    """Stands for a part that is not known: none has this digest."""
    return shard_parts.part_named(range_index, num_shards, "0" * 64)


def _table_of(range_index: int, shards: Sequence[ShardRecord]) -> ShardTable:
    return ShardTable.of(shards, first_number=range_index * SHARDS_PER_PART)


def list_parts(store: ObjectStore) -> list[PartRecord]:
    """All parts in an output prefix, those of killed and of shorter runs too."""
    return [part for part, _ in list_parts_with_times(store)]


def list_parts_with_times(store: ObjectStore) -> list[tuple[PartRecord, float]]:
    """The same parts, each with the time when it was written, seconds since 1970, on the storage's clock."""
    infos = (info for info in store.list(PART_FOLDER) if is_part(info.key))
    return [(PartRecord(key=info.key), info.modified_s) for info in infos]


def load_generation_manifest(store: ObjectStore) -> GenerationManifest | None:
    """The manifest of the output prefix, or None when no run has finished there.

    Raises:
        ConfigError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    try:
        return require_manifest(store)
    except ObjectMissingError:
        return None


def require_manifest(store: ObjectStore) -> GenerationManifest:
    """The manifest of a finished run.

    Raises:
        ObjectMissingError: If there is none, or none any more.
        ConfigError, FormatVersionError: As `load_generation_manifest`.
    """
    return _parse(store, store.read(MANIFEST_KEY))


def publish(store: ObjectStore, manifest: GenerationManifest) -> GenerationManifest:
    """Write the manifest unless one of as many images is there; of several drivers the longest stays.

    Returns:
        The manifest that stands.

    Raises:
        OutputExistsError: If its parts hold another number of images than it says; nothing is written then.
        ConfigError, FormatVersionError: As `load_generation_manifest`.
        ShardCorruptError: If a part was altered.
        StorageError: If the store fails.
    """
    _check_complete(store, manifest)
    data = config_io.to_json(manifest)
    while True:
        try:
            current = store.read_versioned(MANIFEST_KEY)
        except ObjectMissingError:
            if store.create(MANIFEST_KEY, data):
                return manifest
            continue
        standing = _parse(store, current.data)
        if standing.num_images >= manifest.num_images:
            return standing
        if store.replace(MANIFEST_KEY, data, current.etag) is not None:
            return manifest


def _check_complete(store: ObjectStore, manifest: GenerationManifest) -> None:
    """Refuse to publish what its parts do not hold: none of them was written by this plan alone."""
    removals = read_removals(store)

    def count(part: PartRecord) -> int:
        return num_planned(read_part(store, part), part.range_index * SHARDS_PER_PART, removals)

    with ThreadPool(_THREADS) as threads:
        num_listed = sum(threads.imap_unordered(count, manifest.parts))
    if num_listed != manifest.num_images:
        raise OutputExistsError(
            f"{store.uri}: the parts in {PART_FOLDER} list {num_listed} images of {manifest.num_images}, as a run of "
            f"another size wrote them: a run grows only when its old number of images is a multiple of shard_size; ask "
            "for the old number, or choose another output or seed"
        )


def replace_manifest(store: ObjectStore, manifest: GenerationManifest, etag: str) -> bool:
    """Put a manifest in the place of the version that the caller has read: of several callers one succeeds.

    Args:
        store: The output prefix.
        manifest: The new one: of the same images, as far as they were not removed, or mended.
        etag: The version that it replaces.

    Returns:
        False if it is another version by now, or gone; nothing was changed then.

    Raises:
        StorageError: If the store fails.
    """
    return store.replace(MANIFEST_KEY, config_io.to_json(manifest), etag) is not None


def _parse(store: ObjectStore, data: bytes) -> GenerationManifest:
    where = f"{store.uri}/{MANIFEST_KEY}"
    return config_io.read_record(GenerationManifest, data, where, remedy="make the images again into another output")


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
