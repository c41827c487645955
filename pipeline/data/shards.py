"""Shards: tar files of samples in the WebDataset layout (key.png, key.cls, key.json).

The webdataset library writes and reads them. Their bytes are part of contracts (a digest names every shard): members
are plain files in a fixed order, owner 0, mode 0444, time 0, and a golden digest in the tests shows it if a version of
the library writes them otherwise. Reading here is strict, which the library is not: no member is skipped, and nothing
after a damaged header is lost in silence.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import webdataset
from numpy.typing import NDArray

from pipeline.data.manifest import DatasetManifest, ShardRecord
from pipeline.errors import DatasetError, ShardCorruptError
from pipeline.stores.object_store import ObjectStore

_BLOCK = tarfile.BLOCKSIZE  # 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a shard."""

    key: str
    """Name within the shard, no "." in it (WebDataset cuts keys at the first dot)."""
    png: bytes
    """The image as PNG."""
    cls: int | None = None
    """Label; None: the shard has no .cls member for it."""
    meta: dict[str, Any]
    """JSON values: where the image came from, or how it was made."""
    offset_bytes: int | None = field(default=None, compare=False)
    """Where the PNG begins in the shard that the sample was read from; None: it was not read from one."""


def pack_shard(samples: Iterable[Sample]) -> bytes:
    """Pack samples into a tar; equal samples give equal bytes.

    Raises:
        ValueError: If a key is empty, repeated, longer than 90 bytes, not ASCII, or has a "." or "/" in it.
    """
    buffer, seen = io.BytesIO(), set[str]()
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for sample in samples:
            key = sample.key
            if not key or key in seen or len(key) > 90 or not key.isascii() or set("./\0") & set(key):
                raise ValueError(f"key: must be unique ASCII of 1 to 90 letters without '.' or '/', got {key!r}")
            seen.add(key)
            meta = json.dumps(sample.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
            members = {"__key__": key, "png": sample.png, "json": meta.encode()}
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
    current, offset, png_offset = "", 0, 0
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
                samples.append(_sample(current, members, png_offset))
                members = {}
            if extension in members:
                raise ValueError(f"member {header.name!r} occurs twice")
            current = key
            members[extension] = data[offset + _BLOCK : offset + _BLOCK + header.size]
            if extension == "png":
                png_offset = offset + _BLOCK
            offset += _BLOCK + header.size + (-header.size % _BLOCK)
        if members:
            samples.append(_sample(current, members, png_offset))
        if len(data) < offset + 2 * _BLOCK or any(data[offset:]):
            raise ValueError("the end-of-archive mark is missing or followed by other data")
    except (tarfile.HeaderError, ValueError) as error:
        raise ShardCorruptError(
            f"{where}: malformed at byte {offset}: {error}; restore the file or make it again"
        ) from None
    return samples


def _sample(key: str, members: dict[str, bytes], png_offset: int) -> Sample:
    if set(members) not in ({"png", "json"}, {"png", "cls", "json"}):
        raise ValueError(f"sample {key!r} has the members {sorted(members)}")
    meta = json.loads(members["json"])
    if not isinstance(meta, dict):
        raise ValueError(f"the .json of sample {key!r} is no object")
    cls = int(members["cls"]) if "cls" in members else None
    return Sample(key=key, png=members["png"], cls=cls, meta=meta, offset_bytes=png_offset)


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
    samples = unpack_shard(data, where)
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


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG to uint8 [H, W, C], C = 1 (grey) or 3 (RGB).

    Raises:
        ValueError: If it is not such a PNG.
    """
    pixels = _decode(data, ("L", "RGB"), convert_to=None)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def decode_mask(data: bytes) -> NDArray[np.bool_]:
    """Which pixels [H, W] of a PNG are white and opaque: whose channels are all in the upper half of their range.

    Raises:
        ValueError: If it is no PNG of at most 8 bits per channel.
    """
    channels = _decode(data, ("1", "L", "LA", "P", "PA", "RGB", "RGBA"), convert_to="RGBA")
    return np.asarray((channels >= 128).all(axis=2))


def _decode(data: bytes, modes: tuple[str, ...], convert_to: str | None) -> NDArray[np.uint8]:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in modes:
                kinds = "8-bit grey or RGB" if convert_to is None else "8-bit"
                raise ValueError(f"png: must be {kinds}, got mode {image.mode}")
            # A copy: writable, and independent of the file.
            return np.array(image if convert_to is None else image.convert(convert_to))
    except PIL.UnidentifiedImageError:  # its own words hold the address of the buffer
        raise ValueError("png: is no PNG, or its header is damaged") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"png: does not decode: {error}") from None


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, C], C = 1 or 3, without loss and without metadata.

    Raises:
        ValueError: If the array has another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"image: must be uint8 [H, W, 1 or 3], got {image.dtype} {image.shape}")
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
