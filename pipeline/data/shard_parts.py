"""Parts of a manifest: Parquet files that list the shards of a range, 10,000 in each.

    _manifest/RRRRR-NNNNN-<sha256>.parquet            of a generation run
    _manifest/<split>/RRRRR-NNNNN-<sha256>.parquet    of a dataset's split

Range r is the shards 10,000 r to 10,000 r + 9,999: those whose nine-digit numbers begin with the five digits of r. A
part holds the first N of its range, and never changes: the digest of its bytes stands in its key. Its columns are
sha256 (32 bytes), size_bytes and num_samples; how the keys of the shards follow from these and from their numbers
stands in its metadata (`KeyRule`), or the keys are a fourth column.
"""

import hashlib
import io
import re
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet

from pipeline.data.shard_table import SHA256_BYTES, KeyRule, ShardTable
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore

SHARDS_PER_PART = 10_000
PART_FOLDER = "_manifest/"
_PART = re.compile(r"_manifest/(?:[a-z_]+/)?(\d{5})-(\d{5})-([0-9a-f]{64})\.parquet")
# In a part's metadata. Without the first two, as generation writes it: no prefix, and all digits.
_PREFIX, _DIGITS, _SUFFIX = b"prefix", b"digits", b"suffix"
_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("sha256", pyarrow.binary(SHA256_BYTES), nullable=False),
        pyarrow.field("size_bytes", pyarrow.int64(), nullable=False),
        pyarrow.field("num_samples", pyarrow.int32(), nullable=False),
    ]
)
_KEY_FIELD = pyarrow.field("key", pyarrow.string(), nullable=False)
_ALL_DIGITS = 2 * SHA256_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """One Parquet file of a manifest."""

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
        if not is_part(self.key):
            raise ValueError(
                f"key: must be {PART_FOLDER}RRRRR-NNNNN-<sha256>.parquet, got {self.key!r}; do not edit it"
            )


def is_part(key: str) -> bool:
    """Whether an object is a part, by its key."""
    return _PART.fullmatch(key) is not None


def write_part(store: ObjectStore, shards: ShardTable, *, split: str | None = None) -> PartRecord:
    """Write the first shards of a range, in order; equal shards give equal bytes with equal versions of pyarrow.

    Args:
        store: Where the manifest is.
        shards: At most 10,000, numbered from the beginning of their range.
        split: Name of the split; None: of a generation run.

    Raises:
        StorageError: If the store fails.
    """
    part, data = encode_part(shards, split=split)
    store.create(part.key, data)  # whoever was first wrote the same
    return part


def encode_part(shards: ShardTable, *, split: str | None = None) -> tuple[PartRecord, bytes]:
    """What `write_part` writes, and its bytes."""
    range_index, rest = divmod(shards.first_number, SHARDS_PER_PART)
    assert rest == 0 and 0 < len(shards) <= SHARDS_PER_PART
    data = _pack(shards)
    return part_named(range_index, len(shards), hashlib.sha256(data).hexdigest(), split=split), data


def part_named(range_index: int, num_shards: int, sha256: str, *, split: str | None = None) -> PartRecord:
    """The part of a range, so many shards and a digest of its bytes."""
    folder = PART_FOLDER if split is None else f"{PART_FOLDER}{split}/"
    return PartRecord(key=f"{folder}{range_index:05d}-{num_shards:05d}-{sha256}.parquet")


def read_part(store: ObjectStore, part: PartRecord, *, remedy: str) -> ShardTable:
    """The shards of a part.

    Args:
        store: Where the manifest is.
        part: Which.
        remedy: What to do about one that was altered.

    Raises:
        ShardCorruptError: If it was altered.
        ObjectMissingError, StorageError: If it cannot be read.
    """
    data = store.read(part.key)
    where = f"{store.uri}/{part.key}"
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ShardCorruptError(f"{where}: was altered or cut short, sha256 differs; {remedy}")
    try:
        shards = _unpack(data, part.range_index * SHARDS_PER_PART)
        if len(shards) != part.num_shards:
            raise ValueError(f"{len(shards)} shards in it, {part.num_shards} in its name")
    except (pyarrow.ArrowException, KeyError, ValueError) as error:  # as it was written: no part of a manifest
        raise ShardCorruptError(f"{where}: malformed: {' '.join(str(error).split())}; {remedy}") from None
    return shards


def _pack(shards: ShardTable) -> bytes:
    digests = pyarrow.py_buffer(np.ascontiguousarray(shards.sha256))
    arrays = [
        pyarrow.FixedSizeBinaryArray.from_buffers(_SCHEMA.field("sha256").type, len(shards), [None, digests]),
        pyarrow.array(shards.size_bytes),
        pyarrow.array(shards.num_samples).cast(pyarrow.int32()),
    ]
    schema, rule = _SCHEMA, shards.keys
    if not isinstance(rule, KeyRule):
        arrays.append(pyarrow.array(rule))
        schema = schema.append(_KEY_FIELD)
    elif (rule.prefix, rule.num_digits) == ("", _ALL_DIGITS):
        schema = schema.with_metadata({_SUFFIX: rule.suffix})
    else:
        schema = schema.with_metadata({_PREFIX: rule.prefix, _DIGITS: str(rule.num_digits), _SUFFIX: rule.suffix})
    buffer = io.BytesIO()
    # Digests cannot be compressed; without compression the bytes depend on one library less.
    pyarrow.parquet.write_table(pyarrow.table(arrays, schema=schema), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


def _unpack(data: bytes, first_number: int) -> ShardTable:
    table = pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False)
    for field in _SCHEMA:
        if table.schema.field(field.name).type != field.type or table[field.name].null_count:
            raise ValueError(f"column {field.name!r} must be {field.type} without nulls")
    digests = b"".join(_values_of(chunk) for chunk in table["sha256"].chunks)
    metadata = table.schema.metadata or {}
    keys: KeyRule | tuple[str, ...]
    if _KEY_FIELD.name in table.column_names:
        keys = tuple(table[_KEY_FIELD.name].to_pylist())
    else:
        digits = int(metadata.get(_DIGITS, _ALL_DIGITS))
        keys = KeyRule(prefix=metadata.get(_PREFIX, b"").decode(), num_digits=digits, suffix=metadata[_SUFFIX].decode())
    return ShardTable(
        sha256=np.frombuffer(digests, np.uint8).reshape(-1, SHA256_BYTES),
        size_bytes=table["size_bytes"].to_numpy(),
        num_samples=table["num_samples"].to_numpy().astype(np.int64),
        keys=keys,
        first_number=first_number,
    )


def _values_of(chunk: pyarrow.FixedSizeBinaryArray) -> memoryview:
    """The bytes of a chunk, one value after the other."""
    begin = chunk.offset * SHA256_BYTES
    return memoryview(chunk.buffers()[1])[begin : begin + len(chunk) * SHA256_BYTES]
