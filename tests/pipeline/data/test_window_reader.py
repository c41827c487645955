"""The read tasks' work without Ray: the right pixels, every shard verified, nothing read or decoded twice."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.data.window_reader
from pipeline.data.data_order import DataOrder
from pipeline.data.read_task import ReadWindow
from pipeline.data.window_reader import ReadPlan, _groups, _ShardCache, read_windows
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.small_datasets import NUM_CLASSES, SmallDataset, make_dataset

SIZES = (9, 4, 12, 7, 5, 11)


class CountingStore:
    """A store that counts what is read from it, and spoils the first answers if asked to."""

    def __init__(self, store: ObjectStore, num_spoiled: int = 0) -> None:
        self.uri = store.uri
        self.reads: Counter[str] = Counter()
        self._store, self._num_spoiled = store, num_spoiled

    def read(self, key: str) -> bytes:
        self.reads[key] += 1
        data = self._store.read(key)
        return data[:-1] if self.reads[key] <= self._num_spoiled else data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"), SIZES)


@pytest.fixture(autouse=True)
def _no_cache_from_other_tests() -> Iterator[None]:
    pipeline.data.window_reader._cache.cache_clear()
    pipeline.data.window_reader._store.cache_clear()
    yield
    pipeline.data.window_reader._store.cache_clear()


def make_order(dataset: SmallDataset, lanes: int = 3) -> DataOrder:
    sizes = dataset.manifest.splits["train"].shard_sizes
    return DataOrder(shard_sizes=sizes, seed=1, lanes=lanes, global_batch=6, window_shards=2)


def windows_of(
    dataset: SmallDataset, start: int, stop: int, lanes: int = 3, of: range | None = None
) -> list[ReadWindow]:
    order = make_order(dataset, lanes)
    windows = order.windows(range(lanes) if of is None else of, start, stop)
    return [ReadWindow.of(window, order, dataset.shards) for window in windows]


def make_plan(dataset: SmallDataset, *, cache_bytes: int = 1 << 20, chunk_rows: int = 10) -> ReadPlan:
    manifest = dataset.manifest
    return ReadPlan(
        store_uri=dataset.uri,
        seed=1,
        image_shape=manifest.image_shape,
        num_classes=manifest.num_classes,
        cache_bytes=cache_bytes,
        chunk_rows=chunk_rows,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunk_rows=st.integers(1, 40),
    cache_bytes=st.sampled_from([0, 300, 900, 1 << 20]),
    lanes=st.sampled_from([1, 2, 3, 6]),
    start=st.integers(0, 20),
)
def test_rows_come_in_order_with_their_pixels_and_labels(
    dataset: SmallDataset, chunk_rows: int, cache_bytes: int, lanes: int, start: int
) -> None:
    order = make_order(dataset, lanes)
    plan = make_plan(dataset, chunk_rows=chunk_rows, cache_bytes=cache_bytes)
    chunks = list(read_windows(plan, windows_of(dataset, start, start + 15, lanes)))
    ids = np.concatenate([chunk["sample_id"] for chunk in chunks])
    np.testing.assert_array_equal(ids, order.window_rows(*order.windows(range(lanes), start, start + 15)).sample_id)
    np.testing.assert_array_equal(np.concatenate([chunk["image"] for chunk in chunks]), dataset.images[ids])
    np.testing.assert_array_equal(np.concatenate([chunk["label"] for chunk in chunks]), ids % NUM_CLASSES)
    assert all(0 < len(chunk["sample_id"]) <= chunk_rows for chunk in chunks)


def test_a_dataset_that_fits_the_cache_is_read_once(dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore(open_store(dataset.uri))
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    plan = make_plan(dataset)
    for start in (0, 100):
        list(read_windows(plan, windows_of(dataset, start, start + 40)))
    assert store.reads == {record.key: 1 for record in dataset.shards}


def test_the_cache_keeps_to_its_bytes(dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore(open_store(dataset.uri))
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    plan = make_plan(dataset, cache_bytes=1000)  # a shard of 12 images of 64 bytes and their labels takes 864
    list(read_windows(plan, windows_of(dataset, 0, 80)))
    assert pipeline.data.window_reader._cache(1000)._shards.currsize <= 1000
    assert max(store.reads.values()) > 5


def test_one_bad_transfer_is_read_again(dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore(open_store(dataset.uri), num_spoiled=1)
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    plan = make_plan(dataset)
    chunks = list(read_windows(plan, windows_of(dataset, 0, 8)))
    ids = np.concatenate([chunk["sample_id"] for chunk in chunks])
    np.testing.assert_array_equal(np.concatenate([chunk["image"] for chunk in chunks]), dataset.images[ids])
    assert set(store.reads.values()) == {2}


def test_two_bad_transfers_are_an_error(dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CountingStore(open_store(dataset.uri), num_spoiled=2)
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    plan = make_plan(dataset)
    with pytest.raises(ShardCorruptError, match="size in bytes"):
        list(read_windows(plan, windows_of(dataset, 0, 8)))


def test_no_shard_is_read_that_has_no_row_in_the_windows(
    dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CountingStore(open_store(dataset.uri))
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    plan = make_plan(dataset)
    for step in range(20):
        store.reads.clear()
        pipeline.data.window_reader._cache.cache_clear()
        order = make_order(dataset)
        list(read_windows(plan, windows_of(dataset, step, step + 1, of=range(1))))
        rows = order.window_rows(*order.windows(range(1), step, step + 1))
        wanted = {dataset.shards[shard].key for shard in rows.shard}
        assert set(store.reads) == wanted


def shards_of(windows: list[ReadWindow]) -> set[int]:
    """Those that have rows in them."""
    return {int(shard) for window in windows for shard in window.rows(1)[0]}


class GatedStore:
    """A store whose reads wait at a gate, but for those of some shards; spoils what it is told to."""

    def __init__(self, store: ObjectStore, free: set[str], spoiled: set[str]) -> None:
        self.uri = store.uri
        self.gate, self.arrived = threading.Event(), threading.Event()
        self.num_waiting, self.num_read = 0, 0
        self._store, self._free, self._spoiled = store, free, spoiled
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes:
        if key not in self._free:
            with self._lock:
                self.num_waiting += 1
            self.arrived.set()
            assert self.gate.wait(300)
            with self._lock:
                self.num_waiting -= 1
                self.num_read += 1
        data = self._store.read(key)
        return data[:-1] if key in self._spoiled else data


def ends_only_after_the_gate(store: GatedStore, end: Callable[[], None]) -> int:
    """Number of gated reads that were made, all of them before the end."""
    thread = threading.Thread(target=end)
    thread.start()
    assert store.arrived.wait(300)
    thread.join(0.3)
    assert thread.is_alive(), "reads that run are waited for"
    store.gate.set()
    thread.join(300)
    assert not thread.is_alive() and store.num_waiting == 0
    num_read = store.num_read
    time.sleep(0.1)
    assert store.num_read == num_read, "nothing goes on"
    return num_read


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_closed_early_nothing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    dataset = make_dataset(tmp_path, [4] * 24)
    plan = make_plan(dataset, chunk_rows=30, cache_bytes=cache_bytes)
    windows = windows_of(dataset, 0, 12, lanes=1)
    first, second, *_ = (shards_of(group) for group in _groups(windows, 30))
    assert len(second - first) > 5, "more than there are threads"
    store = GatedStore(open_store(dataset.uri), {dataset.shards[s].key for s in first}, set())
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    blocks = read_windows(plan, windows)
    next(blocks)
    assert store.arrived.wait(300)
    assert 1 <= ends_only_after_the_gate(store, blocks.close) <= 4, "what had not begun was dropped"  # type: ignore[attr-defined]
    num_rows = sum(len(block["sample_id"]) for block in read_windows(plan, windows))
    assert num_rows == 72, "the threads are free again"


def test_after_an_error_nothing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path, [4] * 24)
    plan = make_plan(dataset, chunk_rows=30, cache_bytes=0)
    windows = windows_of(dataset, 0, 12, lanes=1)
    bad = {dataset.shards[min(shards_of(next(_groups(windows, 30))))].key}
    store = GatedStore(open_store(dataset.uri), bad, bad)
    monkeypatch.setattr(pipeline.data.window_reader, "_store", lambda uri: store)
    errors: list[Exception] = []

    def read() -> None:
        try:
            list(read_windows(plan, windows))
        except ShardCorruptError as error:
            errors.append(error)

    assert ends_only_after_the_gate(store, read) <= 4
    assert len(errors) == 1 and "size in bytes" in str(errors[0])


def test_a_shard_is_decoded_once_and_an_error_is_not_kept(
    dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cache, num_calls = make_plan(dataset), _ShardCache(1 << 20), 0
    decode_all = pipeline.data.window_reader._decode_all
    together, asking = threading.Barrier(8), threading.Semaphore(0)

    def decode(plan: ReadPlan, record: object) -> object:
        nonlocal num_calls
        num_calls += 1
        for _ in range(8):
            asking.acquire()
        time.sleep(0.2)  # until all have asked
        if num_calls == 1:
            raise ShardCorruptError("damaged on its way")
        return decode_all(plan, record)  # type: ignore[arg-type]

    def ask(_: int) -> object:
        together.wait()
        asking.release()
        try:
            return cache.get(plan, dataset.shards[0])
        except ShardCorruptError as error:
            return str(error)

    monkeypatch.setattr(pipeline.data.window_reader, "_decode_all", decode)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(8))) == {"damaged on its way"} and num_calls == 1
        assert not cache._decoding
        decoded = list(threads.map(ask, range(8)))
    assert num_calls == 2 and all(one is decoded[0] for one in decoded) and not cache._decoding


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_shape": (8, 8, 3)}, r"the image has the shape \(8, 8, 1\), the manifest says \(8, 8, 3\)"),
        ({"num_classes": 3}, "the label is [3-6], the manifest has 3 classes"),
    ],
)
def test_a_shard_with_other_images_than_announced_is_refused(
    dataset: SmallDataset, change: dict[str, object], reason: str
) -> None:
    plan = replace(make_plan(dataset), **change)  # type: ignore[arg-type]
    with pytest.raises(ShardCorruptError, match=f"train/00000000[0-9].tar: sample '[0-9]+': {reason}; prepare"):
        list(read_windows(plan, windows_of(dataset, 0, 8)))


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SIZES, labelled=False)
    chunks = list(read_windows(make_plan(dataset), windows_of(dataset, 0, 8)))
    assert all(set(chunk) == {"image", "sample_id"} for chunk in chunks)
