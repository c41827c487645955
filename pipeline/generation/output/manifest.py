"""The manifest of a finished run: a small JSON file that names Parquet files with the shards, 10,000 of them in each.

    manifest.json                                    last; readers trust only this and what it names
    _manifest/RRRRR-NNNNN-<sha256>.parquet           the shards of range RRRRR, NNNNN of them: a *part*

Range r is the shards 10,000 r to 10,000 r + 9,999: those whose nine-digit numbers begin with the five digits of r. A
part is written once its range is complete, long before the run is, so that whoever goes on with a run of millions of
shards reads no record of it. Parts are named by their digest and never change; the manifest is replaced by If-Match and
only by a longer one.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet

from pipeline import config_io
from pipeline.data.manifest import ShardRecord
from pipeline.errors import ObjectMissingError, ShardCorruptError
from pipeline.generation.output.commits import tar_key
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.stores.object_store import ObjectStore

MANIFEST_KEY = "manifest.json"
SHARDS_PER_PART = 10_000
_PART_FOLDER = "_manifest/"
_PART = re.compile(r"_manifest/(\d{5})-(\d{5})-([0-9a-f]{64})\.parquet")
_SUFFIX = b"suffix"
"""In a part's metadata: how the keys of its shards end. They follow from number and digest otherwise."""
_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("sha256", pyarrow.binary(32), nullable=False),
        pyarrow.field("size_bytes", pyarrow.int64(), nullable=False),
        pyarrow.field("num_samples", pyarrow.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """One Parquet file of the manifest."""

    key: str
    """Its key; the range, the number of shards and the digest of its bytes stand in it."""

    @property
    def range_index(self) -> int:
        """Which range."""
        return int(self._match[1])

    @property
    def num_shards(self) -> int:
        """Shards in it."""
        return int(self._match[2])

    @property
    def sha256(self) -> str:
        """Digest of its bytes, 64 hex digits."""
        return self._match[3]

    @property
    def _match(self) -> re.Match[str]:
        match = _PART.fullmatch(self.key)
        assert match is not None, "checked when it was made"
        return match

    def __post_init__(self) -> None:
        """Refuse a key that is none of a part."""
        if _PART.fullmatch(self.key) is None:
            raise ValueError(
                f"key: must be {_PART_FOLDER}RRRRR-NNNNN-<sha256>.parquet, got {self.key!r}; do not edit it"
            )


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
    data = store.read(part.key)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ShardCorruptError(
            f"{store.uri}/{part.key}: was altered or cut short, sha256 differs; jobs/output.py repair makes it again"
        )
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    suffix = table.schema.metadata[_SUFFIX].decode()
    columns = (table.column(name).to_pylist() for name in ("sha256", "size_bytes", "num_samples"))
    first = part.range_index * SHARDS_PER_PART
    return [
        ShardRecord(key=tar_key(index, sha256.hex(), suffix), size_bytes=size, sha256=sha256.hex(), num_samples=number)
        for index, (sha256, size, number) in enumerate(zip(*columns, strict=True), start=first)
    ]


def write_part(store: ObjectStore, range_index: int, shards: Sequence[ShardRecord]) -> PartRecord:
    """Write the shards of a range, all of them in order; equal shards give equal bytes.

    Raises:
        StorageError: If the store fails.
    """
    columns = [
        [bytes.fromhex(shard.sha256) for shard in shards],
        [shard.size_bytes for shard in shards],
        [shard.num_samples for shard in shards],
    ]
    arrays = [pyarrow.array(values, type=field.type) for values, field in zip(columns, _SCHEMA)]
    buffer = io.BytesIO()
    # Digests cannot be compressed; without compression the bytes depend on one library less.
    pyarrow.parquet.write_table(
        pyarrow.table(arrays, schema=_SCHEMA.with_metadata({_SUFFIX: shards[0].key.rpartition(".")[2]})),
        buffer,
        compression="none",
        use_dictionary=False,
    )
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    part = PartRecord(key=f"{_PART_FOLDER}{range_index:05d}-{len(shards):05d}-{sha256}.parquet")
    store.create(part.key, data)  # whoever was first wrote the same
    return part


def list_parts(store: ObjectStore) -> list[PartRecord]:
    """All parts in an output prefix, those of killed and of shorter runs too."""
    return [PartRecord(key=info.key) for info in store.list(_PART_FOLDER) if _PART.fullmatch(info.key)]


def load_generation_manifest(store: ObjectStore) -> GenerationManifest | None:
    """The manifest of the output prefix, or None when no run has finished there.

    Raises:
        ConfigError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    try:
        return _parse(store, store.read(MANIFEST_KEY))
    except ObjectMissingError:
        return None


def publish(store: ObjectStore, manifest: GenerationManifest) -> GenerationManifest:
    """Write the manifest unless one of as many images is there; of several drivers the longest stays.

    Returns:
        The manifest that stands.

    Raises:
        ConfigError, FormatVersionError: As `load_generation_manifest`.
        StorageError: If the store fails.
    """
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
