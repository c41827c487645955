"""Reading windows of a data order: the part of ingest that runs inside Ray Data's read tasks.

Every shard is fetched whole and verified before a row of it is used. Decoded shards stay in a cache that is bounded in
bytes and shared by the tasks that run in one process, because a small dataset is read hundreds of times over. Threads
fetch and decode the shards of one group of windows while the group before it is handed on.
"""

import functools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from pipeline.data.read_task import ReadWindow
from pipeline.data.shard_table import Int64Array, ShardRecord, UInt8Array
from pipeline.data.shards import Sample, decode_image, read_shard
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store

# Columns `image` uint8 [n, H, W, C], `sample_id` int64 [n] and, with classes, `label` int64 [n].
Block = dict[str, npt.NDArray[Any]]

_NUM_THREADS = 4
_GROUPS_AHEAD = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """What a read task must know beside its windows; pickled once for each stream."""

    store_uri: str
    """Root of the dataset."""
    seed: int
    """Seed of the order."""
    image_shape: tuple[int, int, int]
    """Height, width and channels of every image."""
    num_classes: int | None
    """Number of labels; None if the samples have none."""
    cache_bytes: int
    """Decoded shards to keep in each process, in bytes."""
    chunk_rows: int
    """Rows handed on at a time."""

    @property
    def row_bytes(self) -> int:
        """Size of one decoded image."""
        return int(np.prod(self.image_shape))


@dataclass(frozen=True, slots=True)
class _Decoded:
    images: UInt8Array
    labels: Int64Array

    @property
    def num_bytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes


def read_windows(plan: ReadPlan, windows: Iterable[ReadWindow]) -> Iterator[Block]:
    """Rows of the windows, in order, in chunks of at most `plan.chunk_rows`.

    However it ends, nothing that it started goes on: reads that have not begun are dropped, the others are waited for.

    Args:
        plan: The dataset, and how it is read.
        windows: Windows of its order.

    Yields:
        Blocks of rows.

    Raises:
        ShardCorruptError: If a shard is not the one that the manifest describes, on a second reading too.
        StorageError: If a shard cannot be read.
    """
    started: deque[_Group] = deque()  # a group stays in it until all its rows have been handed on
    try:
        for some in _groups(windows, plan.chunk_rows):
            group = _Group(plan, some)
            started.append(group)
            group.start()
            if len(started) > _GROUPS_AHEAD:
                yield from started[0].chunks()
                started.popleft()
        while started:
            yield from started[0].chunks()
            started.popleft()
    finally:
        wait([future for group in reversed(started) for future in group.cancel()])


def _groups(windows: Iterable[ReadWindow], num_rows: int) -> Iterator[list[ReadWindow]]:
    """Runs of windows of about num_rows together: with few rows in each, one gather serves many windows."""
    group: list[ReadWindow] = []
    missing = num_rows
    for window in windows:
        group.append(window)
        missing -= window.end - window.begin
        if missing <= 0:
            yield group
            group, missing = [], num_rows
    if group:
        yield group


class _Group:
    """Windows that are gathered together, in threads."""

    def __init__(self, plan: ReadPlan, windows: list[ReadWindow]) -> None:
        rows = zip(*(window.rows(plan.seed) for window in windows), strict=True)
        self._shards, self._rows, self._ids = (np.concatenate(column) for column in rows)
        self._records = {
            shard: record
            for window in windows
            for shard, record in zip(window.pieces.shard.tolist(), window.records, strict=True)
        }
        self._plan = plan
        self._images = np.empty((len(self._ids), *plan.image_shape), np.uint8)
        self._labels = np.empty(len(self._ids), np.int64)
        self._filled: list[Future[None]] = []

    def start(self) -> None:
        """Begin to gather."""
        by_shard = np.argsort(self._shards, kind="stable")
        shards, begins = np.unique(self._shards[by_shard], return_index=True)
        for shard, at in zip(shards.tolist(), np.split(by_shard, begins[1:]), strict=True):
            self._filled.append(_threads().submit(self._fill, self._records[shard], self._rows[at], at))

    def cancel(self) -> list[Future[None]]:
        """Drop what has not begun.

        Returns:
            What runs or is done. What was dropped is not in it: `wait` would wait until a thread comes by it.
        """
        return [future for future in reversed(self._filled) if not future.cancel()]

    def _fill(self, record: ShardRecord, rows: Int64Array, at: Int64Array) -> None:
        """Put rows of one shard in their places."""
        whole = _cached(self._plan, record)
        if whole is not None:
            self._images[at] = whole.images[rows]
            self._labels[at] = whole.labels[rows]
            return
        samples = _read(_store(self._plan.store_uri), record)
        for place, row in zip(at, rows, strict=True):
            self._images[place], self._labels[place] = _decode(self._plan, record, samples[row])

    def chunks(self) -> Iterator[Block]:
        """The rows, when they are all there."""
        for future in self._filled:
            future.result()
        for begin in range(0, len(self._ids), self._plan.chunk_rows):
            cut = slice(begin, begin + self._plan.chunk_rows)
            chunk: Block = {"image": self._images[cut], "sample_id": self._ids[cut]}
            if self._plan.num_classes is not None:
                chunk["label"] = self._labels[cut]
            yield chunk


class _ShardCache:
    """Decoded shards, the least recently used leave first; each is decoded once, however many threads ask for it."""

    def __init__(self, max_bytes: int) -> None:
        self._shards: LRUCache[tuple[str, str], _Decoded] = LRUCache(max_bytes, getsizeof=lambda d: d.num_bytes)
        self._lock = threading.Lock()
        self._decoding: dict[tuple[str, str], Future[_Decoded]] = {}

    def get(self, plan: ReadPlan, record: ShardRecord) -> _Decoded:
        """The decoded shard; an error goes to all threads that ask while it is read, and is not kept."""
        key = (plan.store_uri, record.sha256)
        with self._lock:
            found = self._shards.get(key)
            if found is not None:
                return found
            others = self._decoding.get(key)
            if others is None:
                mine = self._decoding[key] = Future[_Decoded]()
        if others is not None:
            return others.result()
        try:
            found = _decode_all(plan, record)
            with self._lock:
                self._shards[key] = found
            mine.set_result(found)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._decoding[key]
        return found


def _cached(plan: ReadPlan, record: ShardRecord) -> _Decoded | None:
    """The whole shard decoded; None if it alone would fill the cache."""
    size_bytes = record.num_samples * (plan.row_bytes + np.dtype(np.int64).itemsize)
    return _cache(plan.cache_bytes).get(plan, record) if size_bytes <= plan.cache_bytes else None


def _decode_all(plan: ReadPlan, record: ShardRecord) -> _Decoded:
    samples = _read(_store(plan.store_uri), record)
    images = np.empty((len(samples), *plan.image_shape), np.uint8)
    labels = np.empty(len(samples), np.int64)
    for row, sample in enumerate(samples):
        images[row], labels[row] = _decode(plan, record, sample)
    return _Decoded(images, labels)


def _read(store: ObjectStore, record: ShardRecord) -> list[Sample]:
    """The verified samples; a second reading tells a bad transfer from a bad object."""
    try:
        return read_shard(store, record)
    except ShardCorruptError:
        return read_shard(store, record)


def _decode(plan: ReadPlan, record: ShardRecord, sample: Sample) -> tuple[UInt8Array, int]:
    """Image and label, -1 for none; both must be what the manifest announces."""
    label = -1 if sample.cls is None else sample.cls
    try:
        image = decode_image(sample.image, sample.extension)
        if image.shape != plan.image_shape:
            raise ValueError(f"the image has the shape {image.shape}, the manifest says {plan.image_shape}")
        if plan.num_classes is not None and not 0 <= label < plan.num_classes:
            raise ValueError(f"the label is {sample.cls}, the manifest has {plan.num_classes} classes")
    except ValueError as error:
        raise ShardCorruptError(
            f"{plan.store_uri}/{record.key}: sample {sample.key!r}: {error}; prepare the dataset again"
        ) from None
    return image, label


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="shards")


@functools.lru_cache(maxsize=1)
def _cache(max_bytes: int) -> _ShardCache:
    return _ShardCache(max_bytes)


@functools.lru_cache(maxsize=4)
def _store(uri: str) -> ObjectStore:
    return open_store(uri)
