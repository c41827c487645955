"""What travels to a read task: the rows of the order without the order, in a large dataset no more than in a small."""

import json

import numpy as np
import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.data_order import DataOrder
from pipeline.data.read_task import ReadWindow, from_columns, to_columns
from pipeline.data.shard_table import KeyRule, ShardTable


def table_of(sizes: list[int]) -> ShardTable:
    return ShardTable(
        sha256=np.random.default_rng(0).integers(0, 256, (len(sizes), 32), dtype=np.uint8),
        size_bytes=1000 + np.asarray(sizes),
        num_samples=np.asarray(sizes),
        keys=KeyRule(prefix="train/", num_digits=16, suffix="tar"),
    )


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    start=st.integers(0, 40),
    window_shards=st.integers(1, 4),
    data=st.data(),
)
def test_a_task_reads_the_rows_of_the_order(
    sizes: list[int], start: int, window_shards: int, data: st.DataObject
) -> None:
    lanes = data.draw(st.integers(1, min(sum(sizes), 9)))
    seed = data.draw(st.integers(0, 2**64 - 1))
    order = DataOrder(shard_sizes=sizes, seed=seed, lanes=lanes, global_batch=3 * lanes, window_shards=window_shards)
    shards, windows = table_of(sizes), list(order.windows(range(lanes), start, start + 6))
    sent = to_columns(ReadWindow.of(window, order, shards) for window in windows)
    received = from_columns(pyarrow.Table.from_pylist([sent]).to_pylist()[0])
    for window, task in zip(windows, received, strict=True):
        expected = order.window_rows(window)
        shard, row, sample_id = task.rows(seed)
        np.testing.assert_array_equal(shard, expected.shard)
        np.testing.assert_array_equal(row, expected.row)
        np.testing.assert_array_equal(sample_id, expected.sample_id)
        assert task.records == tuple(shards[number] for number in task.pieces.shard)
        assert set(expected.shard) <= set(task.pieces.shard)


def sent_bytes(num_shards: int) -> int:
    order = DataOrder(shard_sizes=[10] * num_shards, seed=0, lanes=4, global_batch=8, window_shards=4)
    shards, windows = table_of([10] * num_shards), list(order.windows(range(4), 0, 5))
    assert len(windows) == 4
    return len(json.dumps(to_columns(ReadWindow.of(window, order, shards) for window in windows)))


def test_a_task_of_a_large_dataset_carries_no_more_than_that_of_a_small_one() -> None:
    """But for the digits of larger numbers."""
    small, large = sent_bytes(200), sent_bytes(20_000)
    assert small < 200 * 4 * 4 and large < small + 10 * 4 * 4
