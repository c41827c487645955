"""Cutting batches from blocks of any size, and refusing a stream that brings anything else than it should."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch_cutter import BatchCutter
from pipeline.data.data_order import DataOrder
from pipeline.data.window_reader import Block, ReadPlan
from pipeline.errors import DatasetError
from tests.pipeline.small_datasets import NUM_CLASSES

SIZES = (9, 4, 12, 7, 5, 11)


def make_order(lanes: int = 6, per_lane: int = 2) -> DataOrder:
    return DataOrder(shard_sizes=SIZES, seed=5, lanes=lanes, global_batch=lanes * per_lane, window_shards=2)


def make_cutter(
    order: DataOrder,
    lanes: range,
    start: int,
    stop: int,
    blocks: Iterable[Block],
    num_classes: int | None = NUM_CLASSES,
) -> BatchCutter:
    plan = ReadPlan(
        store_uri="/data",
        seed=order.seed,
        image_shape=(2, 2, 1),
        num_classes=num_classes,
        cache_bytes=0,
        chunk_rows=1,
    )
    return BatchCutter(plan, order, order.windows(lanes, start, stop), iter(blocks))


def make_blocks(
    order: DataOrder, lanes: range, start: int, stop: int, sizes: list[int], *, labelled: bool = True
) -> Iterator[Block]:
    """What the stream brings, cut at any place; the pixels of a sample are its id."""
    ids = order.window_rows(*order.windows(lanes, start, stop)).sample_id
    begin = 0
    while begin < len(ids):
        for size in sizes:
            cut = ids[begin : begin + size]
            image = np.broadcast_to(cut[:, None, None, None], (len(cut), 2, 2, 1)).astype(np.uint8)
            block: Block = {"image": image, "sample_id": cut}
            if labelled:
                block["label"] = cut % NUM_CLASSES
            yield block
            begin += size


@settings(max_examples=60, deadline=None)
@given(
    lanes=st.integers(1, 6),
    per_lane=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    start=st.integers(0, 9),
    data=st.data(),
)
def test_batches_are_those_of_the_order(
    lanes: int, per_lane: int, sizes: list[int], start: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, lanes))
    rank = data.draw(st.integers(0, world - 1))
    order = make_order(lanes, per_lane)
    mine, stop = order.rank_lanes(rank, world), start + 8
    cutter = make_cutter(order, mine, start, stop, make_blocks(order, mine, start, stop, sizes))
    for step in range(start, stop):
        batch, expected = cutter.cut(step, rank, world), order.rank_rows(step, rank, world)
        np.testing.assert_array_equal(batch.sample_ids, expected.sample_id)
        np.testing.assert_array_equal(batch.epochs, expected.epoch)
        np.testing.assert_array_equal(batch.images[:, 1, 1, 0], expected.sample_id)
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, expected.sample_id % NUM_CLASSES)


def test_a_stream_that_ends_early_is_an_error() -> None:
    order = make_order()
    blocks = list(make_blocks(order, range(6), 0, 8, [5]))[:-1]
    cutter = make_cutter(order, range(6), 0, 8, blocks)
    with pytest.raises(DatasetError, match=r"^/data: the read stream ended before step 7; "):
        for step in range(8):
            cutter.cut(step, 0, 1)


@pytest.mark.parametrize("damage", ["lost", "twice", "swapped"])
def test_wrong_rows_are_an_error(damage: str) -> None:
    order = make_order()
    blocks = list(make_blocks(order, range(6), 0, 8, [5]))
    if damage == "lost":
        del blocks[3]
    elif damage == "twice":
        blocks.insert(3, blocks[3])
    else:
        blocks[3], blocks[4] = blocks[4], blocks[3]
    cutter = make_cutter(order, range(6), 0, 8, blocks)
    with pytest.raises(DatasetError, match=r"step \d+ should hold sample \d+ at row \d+ of rank 0 and"):
        for step in range(8):
            cutter.cut(step, 0, 1)


def test_without_classes_there_are_no_labels() -> None:
    order = make_order()
    blocks = make_blocks(order, range(6), 0, 1, [3], labelled=False)
    cutter = make_cutter(order, range(6), 0, 1, blocks, num_classes=None)
    assert cutter.cut(0, 0, 1).labels is None


def test_batches_belong_to_the_receiver() -> None:
    order = make_order()
    blocks = list(make_blocks(order, range(6), 0, 2, [50]))
    for column in blocks[0].values():
        column.flags.writeable = False  # as in the object store
    batch = make_cutter(order, range(6), 0, 2, blocks).cut(0, 0, 1)
    assert batch.images.flags.writeable and batch.images.flags.c_contiguous
    assert not np.shares_memory(batch.images, blocks[0]["image"])
