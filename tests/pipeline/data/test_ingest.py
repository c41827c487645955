"""Real Ray Data streams: the global batches of the order, from any number of workers, or an error of our own."""

import hashlib
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import pipeline.data.ingest
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.data.ingest import RankBatch, check_read_buffer, rank_batches, read_buffer_bytes
from pipeline.data.shards import unpack_shard
from pipeline.errors import ConfigError, DatasetError, ObjectMissingError, PipelineError, ShardCorruptError
from tests.pipeline.small_datasets import NUM_CLASSES, SmallDataset, make_dataset

SIZES = (30, 17, 41, 25, 36, 22, 9)
CONFIG = DataConfig(lanes=4, window_shards=2)
NUM_STEPS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    return make_dataset(tmp_path_factory.mktemp("small"), SIZES)


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    """256-pixel RGB: a row is 192 KiB, a window of two shards 6 MiB."""
    return make_dataset(tmp_path_factory.mktemp("large"), (16,) * 8, image_size=(256, 256), channels=3)


def make_order(dataset: SmallDataset, config: DataConfig = CONFIG, global_batch: int = 8) -> DataOrder:
    return DataOrder.for_split(dataset.manifest, "train", config, seed=11, global_batch=global_batch)


def read(
    dataset: SmallDataset,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int = NUM_STEPS,
    config: DataConfig = CONFIG,
) -> list[RankBatch]:
    return list(
        rank_batches(
            dataset.uri,
            dataset.manifest,
            "train",
            make_order(dataset),
            config,
            rank=rank,
            world=world,
            start_step=start,
            stop_step=stop,
        )
    )


def test_pixels_of_16_bits_are_not_trained_on(dataset: SmallDataset) -> None:
    with pytest.raises(DatasetError, match=r"small.*: its pixels have 65536 levels, this program reads 256"):
        read(replace(dataset, manifest=replace(dataset.manifest, num_levels=65536)))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_workers_reads_the_global_batches(ray_session: None, dataset: SmallDataset, world: int) -> None:
    order = make_order(dataset)
    ranks = [read(dataset, rank=rank, world=world) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        expected = order.global_batch_rows(step)
        ids = np.concatenate([part.sample_ids for part in parts])
        np.testing.assert_array_equal(ids, expected.sample_id)
        np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), expected.epoch)
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), dataset.images[ids])
        labels = [part.labels for part in parts if part.labels is not None]
        np.testing.assert_array_equal(np.concatenate(labels), ids % NUM_CLASSES)
    assert len(ranks[0]) == NUM_STEPS


def test_a_stream_may_start_anywhere_and_reads_no_other_shard(
    ray_session: None, dataset: SmallDataset, tmp_path: Path
) -> None:
    order = make_order(dataset)
    start, stop = 5, 8
    shutil.copytree(dataset.root, tmp_path / "copy")
    copy = replace(dataset, root=tmp_path / "copy")
    needed = {int(shard) for step in range(start, stop) for shard in order.rank_rows(step, 1, 4).shard}
    others = set(range(len(SIZES))) - needed
    for shard in others:
        copy.path(shard).unlink()
    assert len(others) >= 3
    tail = read(copy, rank=1, world=4, start=start, stop=stop)
    assert len(tail) == stop - start
    for step, batch in enumerate(tail, start):
        np.testing.assert_array_equal(batch.sample_ids, order.rank_rows(step, 1, 4).sample_id)
        np.testing.assert_array_equal(batch.images, dataset.images[batch.sample_ids])


def test_a_long_run_is_a_chain_of_streams_of_concurrent_tasks(
    ray_session: None, dataset: SmallDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.data.ingest, "_MAX_TASKS", 3)
    monkeypatch.setattr(pipeline.data.ingest, "_MAX_WINDOWS", 7)
    monkeypatch.setattr(pipeline.data.ingest, "_MIN_TASK_BYTES", 50 * 64)
    monkeypatch.setattr(pipeline.data.ingest, "_MIN_BLOCK_BYTES", 10 * 64)
    order = make_order(dataset)
    batches = read(dataset, config=replace(CONFIG, read_concurrency=3))
    assert [b.sample_ids.tolist() for b in batches] == [
        order.global_batch_rows(step).sample_id.tolist() for step in range(NUM_STEPS)
    ]


def flip_a_bit(dataset: SmallDataset) -> SmallDataset:
    data = bytearray(dataset.path(2).read_bytes())
    data[len(data) // 2] ^= 1
    dataset.path(2).write_bytes(data)
    return dataset


def cut_after_a_member(dataset: SmallDataset) -> SmallDataset:
    """What remains is a well-formed tar with fewer samples: tar readers do not notice."""
    data = dataset.path(2).read_bytes()
    kept = data[: len(data) // 1024 * 512]
    while kept and not is_well_formed(kept + bytes(1024)):
        kept = kept[:-512]
    dataset.path(2).write_bytes(kept + bytes(1024))
    return dataset


def is_well_formed(data: bytes) -> bool:
    try:
        return 0 < len(unpack_shard(data)) < SIZES[2]
    except ShardCorruptError:
        return False


def hold_fewer_samples(dataset: SmallDataset) -> SmallDataset:
    """Size and sha256 are as announced, the number of samples is not."""
    cut_after_a_member(dataset)
    data = dataset.path(2).read_bytes()
    record = replace(dataset.shards[2], size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return dataset.with_record(2, record)


def remove(dataset: SmallDataset) -> SmallDataset:
    dataset.path(2).unlink()
    return dataset


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (flip_a_bit, ShardCorruptError, "sha256 is"),
        (cut_after_a_member, ShardCorruptError, "size in bytes is"),
        (hold_fewer_samples, ShardCorruptError, "number of samples is"),
        (remove, ObjectMissingError, ""),
    ],
)
def test_a_damaged_shard_is_an_error_of_its_own_in_one_line(
    ray_session: None,
    dataset: SmallDataset,
    tmp_path: Path,
    damage: Callable[[SmallDataset], SmallDataset],
    error: type[PipelineError],
    reason: str,
) -> None:
    shutil.copytree(dataset.root, tmp_path / "copy")
    damaged = damage(replace(dataset, root=tmp_path / "copy"))
    with pytest.raises(PipelineError) as raised:
        read(damaged)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert damaged.shards[2].key in str(raised.value)
    assert reason in str(raised.value)
    shown = "".join(traceback.format_exception(raised.value))  # --traceback
    assert "window_reader.py" in shown and shown.rstrip().endswith(str(raised.value))


def test_a_closed_stream_leaves_nothing_running(ray_session: None, large_images: SmallDataset) -> None:
    before = set(threading.enumerate())
    batches = large_stream(large_images, 0, 1, num_steps=10_000)
    next(batches)
    assert any("StreamingExecutor" in thread.name for thread in set(threading.enumerate()) - before)
    batches.close()
    while any("StreamingExecutor" in t.name for t in set(threading.enumerate()) - before):
        time.sleep(0.1)


def test_a_stream_rests_while_its_consumer_does(
    ray_session: None, large_images: SmallDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's executor alone takes a whole core: its loop stands still here until a consumer waits for a block."""
    waiting, resting, over = pipeline.data.ingest._waiting_consumers, threading.Event(), threading.Event()

    def rest(timeout_s: float) -> None:
        while not over.is_set() and waiting._num_waiting == 0:
            resting.set()
            over.wait(0.01)

    monkeypatch.setattr(waiting, "wait", rest)
    batches = large_stream(large_images, 0, 1, num_steps=10_000)
    for _ in range(3):
        for _ in range(20):  # more than the stream holds: it must have been woken
            next(batches)
        resting.clear()
        assert resting.wait(60)
    over.set()
    batches.close()


def large_stream(dataset: SmallDataset, rank: int, world: int, num_steps: int) -> Any:
    return rank_batches(
        dataset.uri,
        dataset.manifest,
        "train",
        make_order(dataset),
        CONFIG,
        rank=rank,
        world=world,
        start_step=0,
        stop_step=num_steps,
    )


class Rank:
    """A worker that holds one CPU for itself, as a training worker does."""

    def __init__(self, dataset: SmallDataset, rank: int, world: int, num_steps: int) -> None:
        self._batches = large_stream(dataset, rank, world, num_steps)

    def step(self) -> list[int]:
        return [int(i) for i in next(self._batches).sample_ids]


def test_two_ranks_in_lockstep_on_two_cpus_do_not_hang(ray_session: None, large_images: SmallDataset) -> None:
    """No CPU is left for read tasks, and either rank waits for the other at every step."""
    num_steps = 80  # five epochs
    actor: Any = ray.remote(num_cpus=1)(Rank)
    ranks = [actor.remote(large_images, rank, 2, num_steps) for rank in range(2)]
    order = make_order(large_images)
    for step in range(num_steps):
        parts = ray.get([rank.step.remote() for rank in ranks])
        assert parts[0] + parts[1] == order.global_batch_rows(step).sample_id.tolist()
    for rank in ranks:
        ray.kill(rank)


def train_in_lockstep(config: dict[str, Any]) -> None:
    """A train function: at every step the ranks add up their sample ids, which no rank can do alone."""
    import ray.train
    import torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    sums = []
    for batch in large_stream(config["dataset"], rank, world, config["num_steps"]):
        total = torch.tensor(int(batch.sample_ids.sum()))
        torch.distributed.all_reduce(total)
        sums.append(str(int(total)))
    if rank == 0:
        Path(config["result"]).write_text(" ".join(sums))


@pytest.mark.parametrize("num_steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_two_ddp_workers_of_ray_train_on_two_cpus_do_not_hang(
    ray_session: None, large_images: SmallDataset, tmp_path: Path, num_steps: int
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = tmp_path / "sums"
    TorchTrainer(
        train_in_lockstep,
        train_loop_config={"dataset": large_images, "num_steps": num_steps, "result": str(result)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="lockstep", storage_path=str(tmp_path)),
    ).fit()
    order = make_order(large_images)
    expected = [int(order.global_batch_rows(step).sample_id.sum()) for step in range(num_steps)]
    assert [int(word) for word in result.read_text().split()] == expected


def test_the_read_buffer_is_bounded(dataset: SmallDataset) -> None:
    order = make_order(dataset)
    size_bytes = read_buffer_bytes(dataset.manifest, order, 2)
    assert size_bytes == 2 * order.max_window_rows * 64 + (64 << 20)
    assert read_buffer_bytes(dataset.manifest, order, 3) == size_bytes  # one of three workers has two of four lanes
    assert check_read_buffer(dataset.manifest, order, replace(CONFIG, read_buffer_limit_bytes=size_bytes), 2) > 0
    with pytest.raises(ConfigError, match=r"^data\.read_buffer_limit_bytes: at least .* \(\d+ bytes\), got 1; lower"):
        check_read_buffer(dataset.manifest, order, replace(CONFIG, read_buffer_limit_bytes=1), 2)


def test_an_order_of_another_dataset_is_refused(dataset: SmallDataset, large_images: SmallDataset) -> None:
    batches = rank_batches(
        dataset.uri,
        dataset.manifest,
        "train",
        make_order(large_images),
        CONFIG,
        rank=0,
        world=1,
        start_step=0,
        stop_step=1,
    )
    with pytest.raises(ValueError, match=r"^order: "):
        next(batches)
