"""The Ray Data streams that carry out a data order: one ordered stream for each training worker.

A worker builds its stream inside the train function, because only there is the step to resume from known. The plan is
a list of windows; read tasks turn them into blocks of decoded rows, in order; the worker holds one queue per lane, cuts
batches from the queues, and compares the sample ids of every batch with those that the order asks for.

Three settings keep it from hanging or wasting the machine (Ray 2.60):
- read tasks ask for no CPU. If they did, ranks in lockstep could wait for ever for each other's CPUs;
- blocks of about one step, and a limit on what a stream holds in the object store, bound its memory;
- the executor's thread is made to pause. When its consumer is slower than its tasks, which is what training wants, it
  otherwise spins without a pause and takes a whole core from the training that it runs beside.
"""

import functools
import math
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, cast

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

from pipeline.cluster import quiet_data_context
from pipeline.data.batch_cutter import BatchCutter, RankBatch
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.data.manifest import DatasetManifest
from pipeline.data.read_task import ReadWindow, from_columns, to_columns
from pipeline.data.shards import check_levels
from pipeline.data.window_reader import Block, ReadPlan, read_windows
from pipeline.errors import ConfigError
from pipeline.ray_errors import own_error

__all__ = ["RankBatch", "check_read_buffer", "rank_batches", "read_buffer_bytes"]

# A block costs some milliseconds wherever it passes, a task tens of them: small windows are sent together.
_MIN_BLOCK_BYTES = 1 << 20
_MIN_TASK_BYTES = 4 << 20
_MIN_STREAM_BYTES, _MAX_STREAM_BYTES = 64 << 20, 256 << 20
# Ray holds the plan of a stream as one object per task, made before the first is read: a longer run is a chain of
# streams, and the queues of the lanes bridge the moment between two of them.
_MAX_TASKS, _MAX_WINDOWS = 256, 4096
_EXECUTOR_PAUSE_S = 0.1


def read_buffer_bytes(manifest: DatasetManifest, order: DataOrder, world: int) -> int:
    """Estimate of what one worker's stream holds: a window for each of its lanes, and the blocks on their way.

    The read process beside it holds two windows more, and its cache.

    Args:
        manifest: The dataset.
        order: Order of the split.
        world: Number of workers.

    Returns:
        Bytes, for the worker with the most lanes.
    """
    lanes_per_worker = -(-order.lanes // world)
    return lanes_per_worker * order.max_window_rows * _row_bytes(manifest) + _stream_bytes(manifest, order, world)


def check_read_buffer(manifest: DatasetManifest, order: DataOrder, config: DataConfig, world: int) -> int:
    """The estimate of `read_buffer_bytes`, if it is within the configured limit.

    Raises:
        ConfigError: If it is not.
    """
    size_bytes = read_buffer_bytes(manifest, order, world)
    if size_bytes > config.read_buffer_limit_bytes:
        raise ConfigError(
            f"data.read_buffer_limit_bytes: at least the estimated read buffer of a worker ({size_bytes} bytes), got "
            f"{config.read_buffer_limit_bytes}; lower data.lanes or data.window_shards, or raise the limit"
        )
    return size_bytes


def rank_batches(
    store_uri: str,
    manifest: DatasetManifest,
    split: str,
    order: DataOrder,
    config: DataConfig,
    *,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
) -> Iterator[RankBatch]:
    """One rank's batches of global steps [start_step, stop_step), read by a Ray Data stream of its own.

    Closing the iterator, or dropping it, ends the stream.

    Args:
        store_uri: Root of the dataset, absolute: read tasks run in other working directories.
        manifest: The dataset's manifest.
        split: Name of the split.
        order: Order of that split (`DataOrder.for_split`).
        config: Buffers and concurrency.
        rank: Rank in [0, world).
        world: Number of ranks.
        start_step: First step; nothing before it is read.
        stop_step: One past the last step.

    Yields:
        One batch per step, in order.

    Raises:
        ShardCorruptError: If a shard is not the one that the manifest describes.
        StorageError: If a shard cannot be read until patience ended.
        DatasetError: If the stream does not deliver exactly the rows of the order, or the pixels have 65,536 levels.
        ConfigError: If the read buffer would be larger than the limit.
        ValueError: If order and split do not belong together, or the rank does not exist.
    """
    shards = manifest.splits[split].shards
    if not np.array_equal(order.shard_sizes, manifest.splits[split].shard_sizes):
        raise ValueError(f"order: must be that of split {split!r}; make it with DataOrder.for_split")
    check_read_buffer(manifest, order, config, world)
    check_levels(manifest, store_uri)
    plan = ReadPlan(
        store_uri=store_uri,
        seed=order.seed,
        image_shape=manifest.image_shape,
        num_classes=manifest.num_classes,
        cache_bytes=config.cache_bytes,
        chunk_rows=max(1, _block_bytes(manifest, order, world) // _row_bytes(manifest)),
    )
    lanes = order.rank_lanes(rank, world)
    context = _stream_context(_block_bytes(manifest, order, world), _stream_bytes(manifest, order, world))
    windows = (ReadWindow.of(window, order, shards) for window in order.windows(lanes, start_step, stop_step))
    blocks = _blocks(plan, windows, context, config.read_concurrency)
    with closing(blocks):
        cutter = BatchCutter(plan, order, order.windows(lanes, start_step, stop_step), blocks)
        for step in range(start_step, stop_step):
            yield cutter.cut(step, rank, world)


def _blocks(
    plan: ReadPlan, windows: Iterator[ReadWindow], context: DataContext, concurrency: int
) -> Generator[Block, None, None]:
    """Blocks of rows in the order of the windows; our own errors come out as themselves."""
    try:
        while tasks := _next_tasks(windows, plan.row_bytes):
            with DataContext.current(context):
                stream = _stream(plan, tasks, concurrency)
            blocks = iter(stream.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
            while (block := _next(blocks)) is not None:
                yield block
    except Exception as error:
        own = own_error(error)
        if own is None or own is error:
            raise
        raise own from error  # --traceback shows what the task said


def _next(blocks: Iterator[Any]) -> Block | None:
    with _waiting_consumers:
        return cast(Block | None, next(blocks, None))


def _stream(plan: ReadPlan, tasks: list[list[ReadWindow]], concurrency: int) -> ray.data.Dataset:
    """A stream of the rows of some tasks; nothing is read before it is iterated."""
    items = [to_columns(task) for task in tasks]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        functools.partial(_read_task, plan),
        batch_size=None,
        batch_format="numpy",
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(concurrency, len(tasks))),
        # Beside the worker that uses the rows: CPUs are set apart there, and blocks stay on their node. Without this
        # Ray spreads such tasks over all nodes.
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


def _read_task(plan: ReadPlan, batch: Block) -> Iterator[Block]:
    """Runs in a Ray task. Retry-safe: it changes nothing and always gives the same rows."""
    for row in range(len(batch["windows"])):
        yield from read_windows(plan, from_columns({name: column[row] for name, column in batch.items()}))


def _next_tasks(windows: Iterator[ReadWindow], row_bytes: int) -> list[list[ReadWindow]]:
    """Windows that each task of the next stream reads: at least one, and together about _MIN_TASK_BYTES."""
    tasks: list[list[ReadWindow]] = []
    missing_bytes = 0
    for window in islice(windows, _MAX_WINDOWS):
        if missing_bytes <= 0:
            tasks.append([])
            missing_bytes = _MIN_TASK_BYTES
        tasks[-1].append(window)
        missing_bytes -= (window.end - window.begin) * row_bytes
        if len(tasks) == _MAX_TASKS and missing_bytes <= 0:
            break
    return tasks


def _stream_context(block_bytes: int, stream_bytes: int) -> DataContext:
    """Settings of one stream; those of the process stay as they are."""
    context = quiet_data_context().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=stream_bytes)
    # Chunks are cut to block_bytes; twice that, so that ids and labels do not make Ray cut them again.
    context.target_max_block_size = 2 * block_bytes
    # Our own errors, not Ray's wrapper: their class and their one line survive the way back.
    context.raise_original_map_exception = True
    context.custom_execution_callback_classes = [
        *context.custom_execution_callback_classes,
        cast(Any, _PauseUntilWanted),
    ]
    return context


class _WaitingConsumers:
    """How many consumers in this process wait for a block; streams that run side by side share it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_waiting = 0

    def __enter__(self) -> None:
        with self._condition:
            self._num_waiting += 1
            self._condition.notify_all()

    def __exit__(self, *error: object) -> None:
        with self._condition:
            self._num_waiting -= 1

    def wait(self, timeout_s: float) -> None:
        """Return when a consumer waits, or after timeout_s."""
        with self._condition:
            self._condition.wait_for(lambda: self._num_waiting > 0, timeout_s)


_waiting_consumers = _WaitingConsumers()


class _PauseUntilWanted:
    """Execution callback: the executor's loop runs at full speed only while a consumer waits for a block.

    The loop waits for new blocks of its tasks. When blocks lie ready that the stream's limit does not let it take, that
    wait returns at once, and the loop turns thousands of times a second.
    """

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        _waiting_consumers.wait(_EXECUTOR_PAUSE_S)

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


def _row_bytes(manifest: DatasetManifest) -> int:
    return math.prod(manifest.image_shape)


def _block_bytes(manifest: DatasetManifest, order: DataOrder, world: int) -> int:
    """About one step of a worker, and not too little."""
    return max(_MIN_BLOCK_BYTES, order.global_batch // world * _row_bytes(manifest))


def _stream_bytes(manifest: DatasetManifest, order: DataOrder, world: int) -> int:
    """What a stream may hold in the object store: about a window, and at least two blocks."""
    window_bytes = order.max_window_rows * _row_bytes(manifest)
    bounded = min(max(_MIN_STREAM_BYTES, window_bytes), _MAX_STREAM_BYTES)
    return max(bounded, 4 * _block_bytes(manifest, order, world))
