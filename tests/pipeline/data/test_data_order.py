"""The data order against its own pseudocode, written out in plain Python with another library's Philox.

Everything else (worker counts, epochs, random access, cost) is a property of the order itself.
"""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import randomgen
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpm.noise
import pipeline.data.data_order
from ddpm import Stream
from pipeline.data.data_order import DataConfig, DataOrder, Rows, Window
from tests.seeds import SEEDS

SIZES = (5, 3, 7, 2, 6, 4)  # 27 samples
ORDER_SHARDS, ORDER_ROWS = 32, 33
# Batches of make() at steps 0 to 3, and at step 10^9. A change of these numbers breaks every run that is resumed.
GOLDEN = [
    [7, 15, 9, 11, 26, 17, 22, 0],
    [5, 6, 14, 12, 25, 24, 21, 20],
    [16, 8, 13, 10, 18, 23, 1, 19],
    [0, 1, 19, 2, 5, 22, 9, 10],
]
GOLDEN_FAR = [26, 23, 4, 2, 14, 18, 6, 20]

shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def make(
    sizes: Sequence[int] = SIZES, *, seed: int = 7, lanes: int = 4, global_batch: int = 8, window_shards: int = 2
) -> DataOrder:
    return DataOrder(shard_sizes=sizes, seed=seed, lanes=lanes, global_batch=global_batch, window_shards=window_shards)


@st.composite
def orders(draw: st.DrawFn) -> DataOrder:
    sizes = draw(shard_sizes)
    lanes = draw(st.integers(1, min(sum(sizes), 9)))
    return make(
        sizes,
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=lanes,
        global_batch=lanes * draw(st.integers(1, 5)),
        window_shards=draw(st.integers(1, 4)),
    )


def oracle_key(seed: int, stream: int, number: int, epoch: int) -> int:
    """key(stream, id, e) of the module's pseudocode; randomgen steps its counter before each block."""
    counter = (number & 0xFFFFFFFF) << 32 | ((number >> 32) << 16 | stream) << 64 | epoch << 96
    words = randomgen.Philox(key=seed, counter=(counter - 1) % 2**128, number=4, width=32).random_raw(2)
    return int(words[0]) << 32 | int(words[1])


def oracle_lane(order: DataOrder, lane: int, epoch: int) -> list[int]:
    """Sample ids of a lane's epoch, line by line as the pseudocode has it."""
    sizes, seed = order.shard_sizes.tolist(), order.seed
    first_id = [sum(sizes[:shard]) for shard in range(len(sizes))]
    shards = sorted(range(len(sizes)), key=lambda s: (oracle_key(seed, ORDER_SHARDS, s, epoch), s))
    sequence = [(shard, first_id[shard] + row) for shard in shards for row in range(sizes[shard])]
    num_rows = sum(sizes) // order.lanes
    rows = sequence[lane * num_rows : (lane + 1) * num_rows]
    touched = list(dict.fromkeys(shard for shard, _ in rows))
    ids: list[int] = []
    for begin in range(0, len(touched), order.window_shards):
        window = touched[begin : begin + order.window_shards]
        ids += sorted(
            (i for shard, i in rows if shard in window), key=lambda i: (oracle_key(seed, ORDER_ROWS, i, epoch), i)
        )
    return ids


def oracle_batch(order: DataOrder, step: int) -> list[int]:
    per_lane, per_epoch = order.global_batch // order.lanes, sum(order.shard_sizes) // order.lanes
    batch: list[int] = []
    for lane in range(order.lanes):
        begin, end = step * per_lane, (step + 1) * per_lane
        first, last = begin // per_epoch, (end - 1) // per_epoch
        endless = [i for epoch in range(first, last + 1) for i in oracle_lane(order, lane, epoch)]
        batch += endless[begin - first * per_epoch : end - first * per_epoch]
    return batch


def ids(rows: Rows) -> list[int]:
    return [int(i) for i in rows.sample_id]


def test_the_order_is_this_one_for_ever() -> None:
    order = make()
    assert [ids(order.global_batch_rows(step)) for step in range(4)] == GOLDEN
    assert ids(order.global_batch_rows(10**9)) == GOLDEN_FAR
    assert order.global_batch_rows(3).lane.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert order.global_batch_rows(3).epoch.tolist() == [1] * 8  # six rows per lane and epoch, two per step


@settings(max_examples=60, deadline=None)
@given(order=orders(), step=st.integers(0, 40))
def test_the_order_equals_its_pseudocode(order: DataOrder, step: int) -> None:
    assert ids(order.global_batch_rows(step)) == oracle_batch(order, step)


@settings(max_examples=60, deadline=None)
@given(order=orders(), step=st.integers(0, 2**29), data=st.data())
def test_global_batches_do_not_depend_on_the_number_of_workers(
    order: DataOrder, step: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, order.lanes))
    lanes = [lane for rank in range(world) for lane in order.rank_lanes(rank, world)]
    assert lanes == list(range(order.lanes))
    whole = order.global_batch_rows(step)
    parts = [make_like(order).rank_rows(step, rank, world) for rank in range(world)]
    for name in ("lane", "epoch", "shard", "row", "sample_id"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def make_like(order: DataOrder) -> DataOrder:
    """The same order, with nothing remembered."""
    return make(
        order.shard_sizes,  # type: ignore[arg-type]
        seed=order.seed,
        lanes=order.lanes,
        global_batch=order.global_batch,
        window_shards=order.window_shards,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_one_to_four_workers_read_the_same_global_batches(world: int, seed: int) -> None:
    order = make(seed=seed)
    for step in range(20):
        batch = [i for rank in range(world) for i in ids(make_like(order).rank_rows(step, rank, world))]
        assert batch == ids(order.global_batch_rows(step))


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_has_no_duplicate_and_leaves_out_fewer_rows_than_lanes(order: DataOrder, epoch: int) -> None:
    per_lane, per_epoch = order.lane_rows_per_step, order.lane_rows_per_epoch
    steps = range(epoch * per_epoch // per_lane, (epoch + 1) * per_epoch // per_lane + 1)
    batches = [order.global_batch_rows(step) for step in steps]
    epochs = np.concatenate([rows.epoch for rows in batches])
    seen = np.concatenate([rows.sample_id for rows in batches])[epochs == epoch]
    assert len(np.unique(seen)) == len(seen) == order.lanes * per_epoch
    assert 0 <= order.num_samples - len(seen) < order.lanes


def test_what_an_epoch_leaves_out_changes() -> None:
    order = make(lanes=4)  # 27 samples: 3 are left out
    left_out = set()
    for epoch in range(12):
        steps = range(3 * epoch, 3 * epoch + 3)  # six rows per lane and epoch, two per step
        left_out |= set(range(27)) - {i for step in steps for i in ids(order.global_batch_rows(step))}
    assert len(left_out) > 12


@settings(max_examples=20, deadline=None)
@given(order=orders(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_random_access_equals_a_walk(order: DataOrder, steps: list[int]) -> None:
    walk = [ids(order.global_batch_rows(step)) for step in range(31)]
    assert [ids(order.global_batch_rows(step)) for step in steps] == [walk[step] for step in steps]
    assert [ids(make_like(order).global_batch_rows(step)) for step in steps] == [walk[step] for step in steps]


@settings(max_examples=30, deadline=None)
@given(order=orders(), start=st.integers(0, 30), length=st.integers(0, 12), data=st.data())
def test_windows_bring_just_the_rows_of_the_steps_in_the_order_of_their_need(
    order: DataOrder, start: int, length: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, order.lanes))
    rank = data.draw(st.integers(0, world - 1))
    lanes = order.rank_lanes(rank, world)
    windows = list(order.windows(lanes, start, start + length))
    queues: dict[int, list[int]] = {lane: [] for lane in lanes}
    upcoming = iter(windows)
    for step in range(start, start + length):
        batch: list[int] = []
        for lane in lanes:
            while len(queues[lane]) < order.lane_rows_per_step:
                window = next(upcoming)
                assert window.lane == lane, "a window came before its turn"
                queues[lane] += ids(order.window_rows(window))
            batch += queues[lane][: order.lane_rows_per_step]
            del queues[lane][: order.lane_rows_per_step]
        assert batch == ids(order.rank_rows(step, rank, world))
    assert next(upcoming, None) is None
    assert not any(queues.values())
    assert all(0 < window.num_rows <= order.max_window_rows for window in windows)
    per_window = [set(order.window_rows(window).shard.tolist()) for window in windows]
    assert all(len(shards) <= order.window_shards for shards in per_window)


@settings(max_examples=15, deadline=None)
@given(order=orders(), start=st.integers(0, 30))
def test_the_pieces_of_a_window_are_its_rows_before_they_are_permuted(order: DataOrder, start: int) -> None:
    first_ids = np.concatenate([[0], np.cumsum(order.shard_sizes)])
    for window in order.windows(range(order.lanes), start, start + 5):
        pieces = order.pieces(window)
        shards = np.repeat(pieces.shard, pieces.num_rows)
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(pieces.first_row, pieces.num_rows, strict=True)])
        np.testing.assert_array_equal(pieces.sample_ids(), first_ids[shards] + rows)
        permuted = order.window_rows(replace(window, begin=0, end=len(rows)))
        assert sorted(zip(permuted.shard, permuted.row, strict=True)) == sorted(zip(shards, rows, strict=True))
        assert len(pieces.shard) <= order.window_shards and pieces.num_rows.min() > 0


def test_rows_name_their_shard_and_row() -> None:
    order = make()
    first_ids = np.concatenate([[0], np.cumsum(SIZES)])
    for step in range(10):
        rows = order.global_batch_rows(step)
        np.testing.assert_array_equal(first_ids[rows.shard] + rows.row, rows.sample_id)
        assert np.all((rows.row >= 0) & (rows.row < np.asarray(SIZES)[rows.shard]))


def test_every_shard_is_as_likely_to_be_the_first() -> None:
    """Chi-square over 1,000 epochs; a fair order fails with probability 1e-6, and then always (fixed seed)."""
    order = make((1,) * 6, lanes=1, global_batch=1, window_shards=1)
    first = [int(order.global_batch_rows(6 * epoch).sample_id[0]) for epoch in range(1000)]
    assert scipy.stats.chisquare(np.bincount(first, minlength=6)).pvalue > 1e-6


def test_rows_of_a_window_are_well_mixed() -> None:
    """Neighbours in file order land apart: the rank correlation of one window of 20,000 rows is within 5 sigma."""
    order = make((5000,) * 8, lanes=2, global_batch=2, window_shards=4)
    window = next(order.windows(range(1), 0, 10**6))
    sample_id = order.window_rows(window).sample_id
    correlation = np.corrcoef(np.arange(len(sample_id)), np.argsort(np.argsort(sample_id)))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(sample_id))
    assert len(set(order.window_rows(window).shard[:100].tolist())) == 4


def test_a_step_far_away_costs_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    keyed: list[tuple[Stream, int]] = []
    random_words = ddpm.noise.random_words

    def counted(seed: int, stream: Stream, numbers: torch.Tensor, *rest: int) -> torch.Tensor:
        keyed.append((stream, len(numbers)))
        return random_words(seed, stream, numbers, *rest)

    monkeypatch.setattr(pipeline.data.data_order, "random_words", counted)
    order = make((100,) * 40, lanes=8, global_batch=16, window_shards=3)
    order.rank_rows(10**6, rank=1, world=4)
    assert sum(n for stream, n in keyed if stream is Stream.ORDER_SHARDS) == 40  # one epoch's shards
    assert sum(n for stream, n in keyed if stream is Stream.ORDER_ROWS) <= 2 * 300  # one window of each lane
    keyed.clear()
    order.rank_rows(10**6 + 1, rank=1, world=4)
    assert sum(n for _, n in keyed) <= 300  # at most one lane has come to its next window


@pytest.mark.parametrize("lanes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_lanes_over_millions_of_samples(lanes: int) -> None:
    order = make((1000,) * (10 * lanes), lanes=lanes, global_batch=8 * lanes, window_shards=4)
    seen = np.zeros(order.num_samples, np.bool_)
    num_windows = 0
    for window in order.windows(range(lanes), 0, order.lane_rows_per_epoch // order.lane_rows_per_step):
        seen[order.window_rows(window).sample_id] = True
        num_windows += 1
    assert bool(seen.all())
    assert 2.5 * lanes <= num_windows <= 4 * lanes
    order.rank_rows(10**6, rank=17, world=lanes)


def test_a_billion_samples_cost_a_shard_table() -> None:
    tracemalloc.start()
    try:
        order = make((1000,) * 1_000_000, lanes=1000, global_batch=8000, window_shards=4)
        rows = order.rank_rows(10**6, rank=999, world=1000)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert len(rows.sample_id) == 8


@pytest.mark.parametrize(
    ("numbers", "field"),
    [
        ({"lanes": 28}, "lanes"),
        ({"lanes": 0}, "lanes"),
        ({"global_batch": 9}, "global_batch"),
        ({"global_batch": 0}, "global_batch"),
        ({"window_shards": 0}, "window_shards"),
        ({"sizes": ()}, "shard_sizes"),
        ({"sizes": (3, 0, 9)}, "shard_sizes"),
    ],
)
def test_impossible_numbers_are_refused_by_name(numbers: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        make(**numbers)  # type: ignore[arg-type]


def test_impossible_ranks_and_steps_are_refused() -> None:
    order = make()
    with pytest.raises(ValueError, match=r"^lanes: at least the number of workers"):
        order.rank_lanes(0, 5)
    with pytest.raises(ValueError, match=r"^rank: "):
        order.rank_lanes(2, 2)
    with pytest.raises(ValueError, match=r"^step: "):
        order.global_batch_rows(-1)


@pytest.mark.parametrize("name", ["lanes", "window_shards", "read_concurrency", "read_buffer_limit_bytes"])
def test_config_refuses_impossible_values(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        DataConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"^cache_bytes: "):
        DataConfig(cache_bytes=-1)


def test_window_num_rows() -> None:
    assert Window(lane=0, epoch=0, index=0, begin=3, end=10).num_rows == 7
