"""The blocks of a gallery: labels, ids and thumbnails of some thousand consecutive images of a run.

    gallery/NNNNNN-<16 hex>/00.webp, 01.webp, ...   sheets of thumbnails, 16 to a row, 128 to a sheet
                            block.js                last: ids, labels and shards, as a call of the page's own function

A block is a function of the shards it is made of, and the digits in its name are a digest of them: equal shards give
equal bytes under equal names, other shards another name. No file of a block is ever overwritten, so that a browser
that keeps files, or a reader in between, never sees the thumbnails of one state under the labels of another.

Blocks end where groups of shards end, so that images that go from a shard, or shards that are added, change the blocks
of their group only. (Where a whole shard goes, the groups behind it move up and are made again.) Inside a block the
thumbnails stand in the order of (label, id): a page of one class then needs few sheets even where there are a thousand
classes, and so does a page of consecutive ids.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from pipeline.data.image_formats import decode_image
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import Sample, read_shard
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore

FOLDER = "gallery/"
BLOCK_IMAGES = 8192
"""Images of a block at most: what is in memory at once is a shard and their thumbnails, 96 MiB of 64x64 RGB."""
SHEET_COLUMNS = 16
SHEET_IMAGES = 128
"""Large enough that a page needs few requests, small enough that a page of many classes does not fetch much in vain."""
LARGEST_SIDE = 64
"""Pixels of a thumbnail's longer side; smaller images are their own thumbnails, without loss."""
_FORMAT = 1  # in every digest: raise it when the bytes of a block change


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some consecutive samples of a shard."""

    shard: ShardRecord
    """The shard."""
    start: int
    """Its first sample here, by place in the shard."""
    stop: int
    """Behind the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What a block is made of."""

    index: int
    """Place in the gallery."""
    parts: tuple[Part, ...]
    """Where its images are, in the order of their ids."""

    @property
    def num_images(self) -> int:
        """Images of the block."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def name(self) -> str:
        """Its folder: the place, and a digest of what it is made of."""
        made_of = [[part.shard.sha256, part.start, part.stop] for part in self.parts]
        digest = hashlib.sha256(json.dumps([_FORMAT, made_of]).encode()).hexdigest()
        return f"{self.index:06d}-{digest[:16]}"

    @property
    def data_key(self) -> str:
        """Key of its labels and ids; written when its sheets are there."""
        return f"{FOLDER}{self.name}/block.js"

    @property
    def sheet_keys(self) -> tuple[str, ...]:
        """Keys of its thumbnails."""
        return tuple(f"{FOLDER}{self.name}/{k:02d}.webp" for k in range(-(-self.num_images // SHEET_IMAGES)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockImages:
    """The images of a block, as the gallery shows them."""

    ids: tuple[int, ...]
    """Sample ids, ascending; images that were removed leave gaps."""
    labels: tuple[int, ...] | None
    """Classes; None: images have no label."""
    inputs: tuple[tuple[int, ...], ...] | None
    """Of an edit, the rows of its inputs that each image was made of."""
    places: tuple[tuple[int, int], ...] | None
    """Where each PNG is in its shard, offset and length in bytes; None where the thumbnail is the image."""
    thumbnails: UInt8[np.ndarray, "n h w c"]
    """uint8 [N, H, W, C], C = 1 or 3."""


def thumbnail_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the thumbnails, pixels: of the images where they are small, else of their proportions."""
    longer = max(image_size)
    if longer <= LARGEST_SIDE:
        return image_size
    height, width = (max(1, round(side * LARGEST_SIDE / longer)) for side in image_size)
    return height, width


def plan_blocks(shards: Iterable[ShardRecord], shard_size: int, max_images: int) -> Iterator[Block]:
    """Cut the first images of a run into blocks.

    Args:
        shards: The run's shards in the order of their ids; no more of them are asked for than are needed.
        shard_size: Images of a whole shard, which says how many shards make a group.
        max_images: Images at most.
    """
    shards, index, left = iter(shards), 0, max_images
    while left > 0 and (group := list(itertools.islice(shards, max(1, BLOCK_IMAGES // shard_size)))):
        for parts in _cut(group, left):
            yield Block(index=index, parts=parts)
            index += 1
            left -= sum(part.stop - part.start for part in parts)


def _cut(group: Sequence[ShardRecord], max_images: int) -> Iterator[tuple[Part, ...]]:
    """The parts of each block of a group: a block is full, or the group or the gallery ends with it."""
    parts: list[Part] = []
    room, left = BLOCK_IMAGES, max_images
    for shard in group:
        start = 0
        while start < shard.num_samples and left:
            stop = min(start + room, start + left, shard.num_samples)
            parts.append(Part(shard=shard, start=start, stop=stop))
            room, left, start = room - (stop - start), left - (stop - start), stop
            if not room:
                yield tuple(parts)
                parts, room = [], BLOCK_IMAGES
    if parts:
        yield tuple(parts)


class BlockReader:
    """Reads the images of blocks, one shard in memory at a time; a shard of several blocks is fetched once."""

    def __init__(self, store: ObjectStore, image_size: tuple[int, int], channels: int, threads: ThreadPool) -> None:
        """Nothing is read yet.

        Args:
            store: The output prefix.
            image_size: Height and width of the images, pixels.
            channels: 1 or 3.
            threads: Decode images: of 192x256 each takes 7 ms, which is hours for a million.
        """
        self._store, self._image_size, self._channels, self._threads = store, image_size, channels, threads
        self._shard: ShardRecord | None = None
        self._samples: list[Sample] = []

    def read(self, block: Block) -> BlockImages:
        """The images of a block.

        Raises:
            ShardCorruptError: If a shard is not as its record says, or its images are not of this run's shape.
            StorageError: If the store gives no complete answer.
        """
        thumbnails = np.empty((block.num_images, *thumbnail_size(self._image_size), self._channels), dtype=np.uint8)
        ids: list[int] = []
        labels: list[int] = []
        inputs: list[tuple[int, ...]] = []
        places: list[tuple[int, int]] = []
        for part in block.parts:
            if part.shard != self._shard:
                self._samples = []  # gone before the next one comes
                self._samples, self._shard = read_shard(self._store, part.shard), part.shard
            samples = self._samples[part.start : part.stop]
            small = self._threads.imap(partial(self._thumbnail, part.shard), samples, chunksize=16)
            for sample, thumbnail in zip(samples, small, strict=True):
                thumbnails[len(ids)] = thumbnail
                ids.append(int(sample.meta["sample_id"]))
                if sample.cls is not None:
                    labels.append(sample.cls)
                if sample.offset_bytes is not None and thumbnails.shape[1:3] != self._image_size:
                    places.append((sample.offset_bytes, len(sample.image)))
                if "input_rows" in sample.meta:
                    inputs.append(tuple(sample.meta["input_rows"]))
        return BlockImages(
            ids=tuple(ids),
            labels=tuple(labels) if len(labels) == len(ids) else None,
            inputs=tuple(inputs) if len(inputs) == len(ids) else None,
            places=tuple(places) if len(places) == len(ids) else None,
            thumbnails=thumbnails,
        )

    def _thumbnail(self, shard: ShardRecord, sample: Sample) -> UInt8[np.ndarray, "h w c"]:
        try:
            image = decode_image(sample.image, sample.extension)
            if image.shape != (*self._image_size, self._channels):
                raise ValueError(f"is an image of {list(image.shape)}, the run's are {self._image_size}")
        except ValueError as error:
            raise ShardCorruptError(f"{self._store.uri}/{shard.key}: {sample.key}: {error}") from error
        height, width = thumbnail_size(self._image_size)
        if (height, width) == self._image_size:
            return image
        picture = PIL.Image.fromarray(image[:, :, 0] if self._channels == 1 else image)
        small = np.asarray(picture.resize((width, height), PIL.Image.Resampling.LANCZOS))
        return small.reshape(height, width, self._channels)


def encode_block(block: Block, images: BlockImages) -> bytes:
    """The labels, ids and shards of a block as a script: what `file://` pages may load, unlike JSON."""
    data = {
        "ids": _runs(images.ids),
        "labels": images.labels,
        "inputs": images.inputs,
        "places": images.places,
        "shards": [[part.shard.key, part.stop - part.start] for part in block.parts],
    }
    return script(f"{block.name}/block.js", data)


def script(file: str, data: Any) -> bytes:
    """A file of data that calls the page: ASCII, so that nothing depends on how it is served."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return f"gallery.deliver({json.dumps(file)},{text});\n".encode("ascii")


def parse_script(data: bytes) -> Any:
    """The data of a file that `script` wrote.

    Raises:
        ValueError: If it is none.
    """
    text = data.decode("ascii")
    head, comma, body = text.partition(",")
    if not head.startswith("gallery.deliver(") or not comma or not body.endswith(");\n"):
        raise ValueError("is no file of a gallery")
    return json.loads(body.removesuffix(");\n"))


def _runs(ids: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, count] of consecutive ones."""
    runs: list[list[int]] = []
    for sample_id in ids:
        if runs and sample_id == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([sample_id, 1])
    return runs


def sheets(images: BlockImages) -> list[UInt8[np.ndarray, "n h w c"]]:
    """The thumbnails of each sheet, in the order of (label, id): the page derives the same order from the labels."""
    order = np.arange(len(images.ids)) if images.labels is None else np.argsort(images.labels, kind="stable")
    return [images.thumbnails[order[start : start + SHEET_IMAGES]] for start in range(0, len(order), SHEET_IMAGES)]


def encode_sheet(thumbnails: UInt8[np.ndarray, "n h w c"], *, lossless: bool) -> bytes:
    """Thumbnails side by side as WebP; equal ones give equal bytes, by the same libwebp.

    Of 128 crops of photographs, WebP without loss took 244 KiB at 32x32 (PNG 259) and 920 KiB at 64x64 (PNG 972), in
    a fifth of PNG's time; more effort saves a tenth and takes 15 times as long. With loss, 64x64 took 143 KiB at 31.3
    dB; JPEG of that sharpness 175 KiB.
    """
    count, height, width, channels = thumbnails.shape
    rows = -(-count // SHEET_COLUMNS)
    cells = np.zeros((rows * SHEET_COLUMNS, height, width, channels), dtype=np.uint8)
    cells[:count] = thumbnails
    grid = cells.reshape(rows, SHEET_COLUMNS, height, width, channels).swapaxes(1, 2)
    sheet = grid.reshape(rows * height, SHEET_COLUMNS * width, channels)
    buffer = io.BytesIO()
    options = {"lossless": True, "method": 0, "quality": 0} if lossless else {"method": 2, "quality": 85}
    PIL.Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(buffer, format="WEBP", **options)
    return buffer.getvalue()
