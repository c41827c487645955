"""What a dataset of very many shards costs: its manifest, a rank's plan, a stream. Figures are printed (-s)."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm.noise
import pipeline.data.data_order
from ddpm import Stream
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.data.ingest import rank_batches
from pipeline.data.manifest import DatasetManifest, Split, load_manifest, write_manifest
from pipeline.data.read_task import ReadWindow
from pipeline.data.shard_table import KeyRule, ShardRecord, ShardTable
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.small_datasets import make_dataset
from tests.pipeline.training.small_runs import manifest as small_manifest

WORLD = 1024
MILLION = pytest.param(1_000_000, marks=pytest.mark.slow)


def many_shards(num_shards: int, num_samples: int = 1000) -> DatasetManifest:
    """A dataset of random digests."""
    table = ShardTable(
        sha256=np.random.default_rng(0).integers(0, 256, (num_shards, 32), dtype=np.uint8),
        size_bytes=np.full(num_shards, 50 << 20),
        num_samples=np.full(num_shards, num_samples),
        keys=KeyRule(prefix="train/", num_digits=16, suffix="tar"),
    )
    return replace(small_manifest(), splits={"train": Split(shards=table)})


@contextmanager
def figures(what: str) -> Iterator[None]:
    """Print seconds, and the MiB by which this process's memory grew at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started_s = memory("VmRSS"), time.perf_counter()
    yield
    took_s = time.perf_counter() - started_s
    print(f"\n{what}: {took_s:.2f} s, {(memory('VmHWM') - before) / 1024:.0f} MiB more at most")


def memory(name: str) -> int:
    """In KiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


class CountingStore:
    """A store that counts what is read from it."""

    def __init__(self, store: ObjectStore) -> None:
        self.uri, self.bytes_of = store.uri, Counter[str]()
        self._store, self.num_reads = store, 0

    def read(self, key: str) -> bytes:
        data = self._store.read(key)
        self.num_reads += 1
        self.bytes_of[key] += len(data)
        return data


@pytest.mark.parametrize("num_shards", [20_001, MILLION])
def test_a_manifest_of_many_shards_is_read_in_parts(tmp_path: Path, num_shards: int) -> None:
    manifest, store = many_shards(num_shards), open_store(str(tmp_path))
    with figures(f"a manifest of {num_shards:,} shards written"):
        assert write_manifest(store, manifest) is not None
    counting = CountingStore(store)
    with figures("loaded"):
        loaded = load_manifest(counting)  # type: ignore[arg-type]
    with figures("its digest"):
        digest = loaded.digest
    assert loaded == manifest and digest == manifest.digest
    assert counting.num_reads == len(counting.bytes_of) == 1 + -(-num_shards // 10_000)
    assert counting.bytes_of["manifest.json"] < 1000 + 150 * num_shards // 10_000
    assert sum(counting.bytes_of.values()) < 46 * num_shards + 5000 * counting.num_reads


@pytest.mark.parametrize("num_shards", [10_000, MILLION])
def test_a_rank_of_many_plans_from_any_step(num_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch's shards are sorted, and no row is permuted that is not of the rank's next windows."""
    keyed: Counter[Stream] = Counter()
    random_words = ddpm.noise.random_words

    def counted(seed: int, stream: Stream, numbers: torch.Tensor, *rest: int) -> torch.Tensor:
        keyed[stream] += len(numbers)
        return random_words(seed, stream, numbers, *rest)

    monkeypatch.setattr(pipeline.data.data_order, "random_words", counted)
    manifest, config = many_shards(num_shards), DataConfig(lanes=2 * WORLD, window_shards=4)
    shards = manifest.splits["train"].shards
    start = 10**7 + 3
    with figures(f"rank 999 of {WORLD} plans 256 windows of {num_shards:,} shards from step {start:,}"):
        order = DataOrder.for_split(manifest, "train", config, seed=1, global_batch=8 * WORLD)
        lanes = order.rank_lanes(999, WORLD)
        upcoming = (ReadWindow.of(window, order, shards) for window in order.windows(lanes, start, start + 10**6))
        windows = list(islice(upcoming, 256))
    assert len(windows) == 256 and keyed[Stream.ORDER_ROWS] == 0
    num_epochs = 1 + max(window.epoch for window in windows) - min(window.epoch for window in windows)
    assert keyed[Stream.ORDER_SHARDS] == num_epochs * num_shards
    with figures("and the rows of its first step"):
        rows = order.rank_rows(start, 999, WORLD)
    assert len(rows.sample_id) == 8 and keyed[Stream.ORDER_ROWS] <= 2 * 4 * 1000


@pytest.mark.slow
def test_a_stream_is_as_fast_with_a_million_records_as_with_few(ray_session: None, tmp_path: Path) -> None:
    """Decoding is done once: all records are of one shard, so that what remains is planning and handing on."""
    dataset = make_dataset(tmp_path, [1000], image_size=(32, 32), channels=3)
    record: ShardRecord = dataset.shards[0]
    config = DataConfig(lanes=8, window_shards=4)
    for number in range(3):
        for num_shards in (200, 100_000, 1_000_000):
            table = ShardTable.of([record]).rows(0, 1)
            table = ShardTable(
                sha256=np.repeat(table.sha256, num_shards, axis=0),
                size_bytes=np.repeat(table.size_bytes, num_shards),
                num_samples=np.repeat(table.num_samples, num_shards),
                keys=(record.key,) * num_shards,
            )
            manifest = replace(dataset.manifest, splits={"train": Split(shards=table)})
            order = DataOrder.for_split(manifest, "train", config, seed=1, global_batch=256)
            batches = rank_batches(
                dataset.uri, manifest, "train", order, config, rank=0, world=1, start_step=1000, stop_step=10**6
            )
            for _ in islice(batches, 100):  # processes have started
                pass
            started_s, num_steps = time.perf_counter(), 600
            for _ in islice(batches, num_steps):
                pass
            images_per_s = 256 * num_steps / (time.perf_counter() - started_s)
            batches.close()  # type: ignore[attr-defined]
            print(f"\nround {number}, {num_shards:,} shards: {images_per_s:,.0f} images of 32 x 32 per second")
