"""Shards: tar files of samples in the WebDataset layout (key.png, key.cls, key.json), and the one door to all shards.

A generation run may hold Parquet instead (parquet_shards.py), and WebP or JPEG instead of PNG (image_formats.py);
`read_shard` reads all of them, and verifies first.

The webdataset library writes and reads the tars. Their bytes are part of contracts (a digest names every shard):
members are plain files in a fixed order, owner 0, mode 0444, time 0, and a golden digest in the tests shows it if a
version of the library writes them otherwise. Reading here is strict, which the library is not: no member is skipped,
and nothing after a damaged header is lost in silence.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable

import webdataset

from pipeline.data.image_formats import EXTENSIONS, decode_image, decode_mask, decode_png, encode_png
from pipeline.data.manifest import DatasetManifest
from pipeline.data.parquet_shards import unpack_parquet
from pipeline.data.samples import Sample, check_key
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import DatasetError, ShardCorruptError
from pipeline.stores.object_store import ObjectStore

__all__ = [
    "Sample",
    "check_levels",
    "decode_image",
    "decode_mask",
    "decode_png",
    "encode_png",
    "pack_shard",
    "read_shard",
    "unpack",
    "unpack_shard",
]

_BLOCK = tarfile.BLOCKSIZE  # 512


def pack_shard(samples: Iterable[Sample]) -> bytes:
    """Pack samples into a tar; equal samples give equal bytes.

    Raises:
        ValueError: If a key is empty, repeated, longer than 90 bytes, not ASCII, or has a "." or "/" in it.
    """
    buffer, seen = io.BytesIO(), set[str]()
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for sample in samples:
            check_key(sample.key, seen)
            meta = json.dumps(sample.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
            members = {"__key__": sample.key, sample.extension: sample.image, "json": meta.encode()}
            tar.write(members if sample.cls is None else members | {"cls": str(sample.cls).encode()})
    return buffer.getvalue()


def unpack_shard(data: bytes, where: str = "shard") -> list[Sample]:
    """Parse a tar written by `pack_shard`.

    Args:
        data: The whole tar.
        where: Its URI, for messages.

    Raises:
        ShardCorruptError: If anything in it is not as `pack_shard` writes it.
    """
    samples: list[Sample] = []
    members: dict[str, bytes] = {}
    current, offset, image_offset = "", 0, 0
    try:
        while True:
            block = data[offset : offset + _BLOCK]
            if not any(block):
                break
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            key, _, extension = header.name.partition(".")
            if not header.isreg() or not 0 <= header.size <= len(data) - offset - _BLOCK:
                raise ValueError(f"member {header.name!r} is no plain file, or cut short")
            if key != current and members:
                samples.append(_sample(current, members, image_offset))
                members = {}
            if extension in members:
                raise ValueError(f"member {header.name!r} occurs twice")
            current = key
            members[extension] = data[offset + _BLOCK : offset + _BLOCK + header.size]
            if extension in EXTENSIONS:
                image_offset = offset + _BLOCK
            offset += _BLOCK + header.size + (-header.size % _BLOCK)
        if members:
            samples.append(_sample(current, members, image_offset))
        if len(data) < offset + 2 * _BLOCK or any(data[offset:]):
            raise ValueError("the end-of-archive mark is missing or followed by other data")
    except (tarfile.HeaderError, ValueError) as error:
        raise ShardCorruptError(
            f"{where}: malformed at byte {offset}: {error}; restore the file or make it again"
        ) from None
    return samples


def _sample(key: str, members: dict[str, bytes], offset_bytes: int) -> Sample:
    extension = next((one for one in EXTENSIONS if one in members), None)
    if extension is None or members.keys() - {"cls"} != {extension, "json"}:
        raise ValueError(f"sample {key!r} has the members {sorted(members)}")
    meta = json.loads(members["json"])
    if not isinstance(meta, dict):
        raise ValueError(f"the .json of sample {key!r} is no object")
    cls = int(members["cls"]) if "cls" in members else None
    return Sample(key=key, image=members[extension], extension=extension, cls=cls, meta=meta, offset_bytes=offset_bytes)


def unpack(key: str, data: bytes, where: str) -> list[Sample]:
    """Parse a tar or a Parquet file, as the end of its key says; arguments and errors as `unpack_shard`."""
    return (unpack_parquet if key.endswith(".parquet") else unpack_shard)(data, where)


def read_shard(store: ObjectStore, record: ShardRecord) -> list[Sample]:
    """Read a shard and verify it against its record before any sample is used.

    Raises:
        ShardCorruptError: If the size, the sha256, the number of samples or the format is not as recorded.
        ObjectMissingError: If the shard does not exist.
        StorageError: If the store gives no complete answer.
    """
    where = f"{store.uri}/{record.key}"
    data = store.read(record.key)
    if len(data) != record.size_bytes:
        _refuse(where, "size in bytes", record.size_bytes, len(data))
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != record.sha256:
        _refuse(where, "sha256", record.sha256, sha256)
    samples = unpack(record.key, data, where)
    if len(samples) != record.num_samples:
        _refuse(where, "number of samples", record.num_samples, len(samples))
    return samples


def check_levels(manifest: DatasetManifest, uri: str) -> None:
    """Refuse a dataset whose pixels the readers of this program cannot take.

    Raises:
        DatasetError: If they have more than 256 levels.
    """
    if manifest.num_levels != 256:
        raise DatasetError(
            f"{uri}: its pixels have {manifest.num_levels} levels, this program reads 256; prepare the dataset again "
            "from images of 8 bits"
        )


def _refuse(where: str, what: str, expected: object, found: object) -> None:
    raise ShardCorruptError(
        f"{where}: {what} is {found}, the manifest says {expected}; restore the file or prepare the dataset again"
    )
