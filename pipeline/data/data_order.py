"""Which samples make up global batch s, as a pure function of the dataset, the seed, the lanes and the batch size.

Nothing here reads data, knows a worker or keeps a cursor: any step is computed from its number alone, in any process.
A sample's id is its row number in manifest order within its split. The order, so that it is never built differently:

    N samples in S shards, C lanes, W shards per window, global batch B;  L = N // C, b = B // C
    key(stream, id, e) = w0 * 2^32 + w1, the first two Philox4x32-10 words of (seed, stream, id, draw = e)

    epoch e:  P = the shards, sorted by (key(ORDER_SHARDS, shard, e), shard)
              sequence = the rows of shard P[0], then of P[1], ..., each shard's in file order       # N rows
              lane c of epoch e = sequence[c * L : (c + 1) * L]                                      # L rows
              cut the lane after every W-th shard it touches, counted from its first: its windows
              inside each window, sort the rows by (key(ORDER_ROWS, sample id, e), sample id)
    lane c  = lane c of epoch 0, lane c of epoch 1, ...                                              # endless
    batch s = rows [s * b, (s + 1) * b) of lane 0, the same rows of lane 1, ..., of lane C - 1        # B rows
    rank r of R reads lanes floor(r * C / R) to floor((r + 1) * C / R) - 1

A batch may straddle epochs. An epoch leaves out N - C * L < C rows, others in each epoch because the shards move.
A window is permuted only when a row of it is asked for; what is held is one window of ids per lane and the shard table.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from ddpm import Stream, random_words
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shard_table import Int64Array

# Lanes are in at most two epochs at a time; random access may come back to one.
_MAX_EPOCHS_KEPT = 4
# Of which keys are drawn. What Philox holds on the way stays in the processor's cache: twice as fast for a million.
_IDS_AT_A_TIME = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How training reads its samples: the lanes fix the order, the rest bounds memory and work."""

    lanes: int = 8
    """Number of independent row sequences that make up every global batch; the largest possible number of workers."""
    window_shards: int = 4
    """Number of shards of a lane whose rows are shuffled together."""
    read_concurrency: int = 1
    """Number of read tasks that run at a time for each training worker; each decodes with several threads."""
    cache_bytes: int = 64 << 20
    """Decoded shards that each reading process keeps, in bytes; a dataset that fits is decoded once."""
    read_buffer_limit_bytes: int = 2 << 30
    """Largest estimated read buffer of one training worker, in bytes; a larger one is refused before the start."""

    def __post_init__(self) -> None:
        for name in ("lanes", "window_shards", "read_concurrency", "read_buffer_limit_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, got {getattr(self, name)}; leave it out for the default")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes: at least 0, got {self.cache_bytes}; 0 switches the cache off")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows in the order in which they are used; every field is int64 [n]."""

    lane: Int64Array
    """Lane that the row belongs to."""
    epoch: Int64Array
    """Epoch of the lane, from 0."""
    shard: Int64Array
    """Shard's position in the manifest."""
    row: Int64Array
    """Row within the shard."""
    sample_id: Int64Array
    """Permanent id of the sample: its row number in manifest order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Rows [begin, end) of one permuted window of one lane; what is read at once."""

    lane: int
    """Lane that the rows belong to."""
    epoch: int
    """Epoch of the lane, from 0."""
    index: int
    """Number of the window within the lane's epoch, from 0."""
    begin: int
    """First row wanted, counted within the permuted window."""
    end: int
    """One past the last row wanted."""

    @property
    def num_rows(self) -> int:
        """Number of rows wanted."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """A whole window before it is permuted: some rows of each of its shards; every field is int64 [shards]."""

    shard: Int64Array
    """Shard's position in the manifest."""
    first_row: Int64Array
    """First row of it that is in the window."""
    num_rows: Int64Array
    """Rows of it that are in the window."""
    first_id: Int64Array
    """Sample id of the first row."""

    def sample_ids(self) -> Int64Array:
        """Ids of all rows, piece after piece, int64 [sum of num_rows]."""
        begins = np.cumsum(self.num_rows) - self.num_rows
        ids: Int64Array = np.repeat(self.first_id - begins, self.num_rows)
        return ids + np.arange(len(ids))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The shards of one epoch: their order, and where each begins in the sequence of rows (S + 1 entries)."""

    shards: Int64Array
    starts: Int64Array


@dataclass(frozen=True, slots=True)
class _Span:
    """One whole window: the shards at [first, last) of the epoch's order, cut to the positions [begin, end)."""

    epoch: int
    index: int
    first: int
    last: int
    begin: int
    end: int


class DataOrder:
    """The order in which one split of a dataset is read.

    Not thread-safe: it remembers the window that each lane was last asked for.
    """

    def __init__(
        self, *, shard_sizes: npt.ArrayLike, seed: int, lanes: int, global_batch: int, window_shards: int
    ) -> None:
        """Check the numbers and lay out the lanes; no permutation is computed yet.

        Args:
            shard_sizes: Samples in every shard, in manifest order, int64 [S].
            seed: 64-bit seed of the run.
            lanes: Number of lanes C, at most the number of samples.
            global_batch: Samples per global batch B, a multiple of C.
            window_shards: Shards of a lane whose rows are permuted together.

        Raises:
            ValueError: If a number is out of range; the message begins with its name.
        """
        self._sizes: Int64Array = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.ndim != 1 or self._sizes.size == 0 or int(self._sizes.min()) < 1:
            raise ValueError("shard_sizes: one or more shards of at least one sample; prepare the dataset again")
        self._first_ids: Int64Array = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self.seed = seed
        self.lanes = lanes
        self.global_batch = global_batch
        self.window_shards = window_shards
        if not 1 <= lanes <= self.num_samples:
            raise ValueError(f"lanes: from 1 to the number of samples ({self.num_samples}), got {lanes}; lower it")
        if global_batch < 1 or global_batch % lanes:
            raise ValueError(f"global_batch: a multiple of lanes ({lanes}), got {global_batch}; change one of the two")
        if window_shards < 1:
            raise ValueError(f"window_shards: at least 1, got {window_shards}; 4 is a good start")
        self._epochs: dict[int, _Epoch] = {}
        self._recent: dict[int, tuple[_Span, Int64Array]] = {}

    @classmethod
    def for_split(
        cls, manifest: DatasetManifest, split: str, config: DataConfig, *, seed: int, global_batch: int
    ) -> Self:
        """The order of one split of a dataset; raises as the constructor, and ValueError if there is no such split."""
        if split not in manifest.splits:
            raise ValueError(f"split: one of {', '.join(sorted(manifest.splits))}, got {split!r}")
        return cls(
            shard_sizes=manifest.splits[split].shard_sizes,
            seed=seed,
            lanes=config.lanes,
            global_batch=global_batch,
            window_shards=config.window_shards,
        )

    @property
    def shard_sizes(self) -> Int64Array:
        """Samples in every shard, in manifest order; int64 [S]."""
        return self._sizes

    @property
    def num_samples(self) -> int:
        """Samples in the split, N."""
        return int(self._first_ids[-1])

    @property
    def lane_rows_per_epoch(self) -> int:
        """Rows that every lane reads in an epoch, L = N // C."""
        return self.num_samples // self.lanes

    @property
    def lane_rows_per_step(self) -> int:
        """Rows that every lane gives to a global batch, b = B // C."""
        return self.global_batch // self.lanes

    @property
    def max_window_rows(self) -> int:
        """Upper bound of the rows in a window."""
        num_shards = min(self.window_shards, self._sizes.size)
        largest = np.partition(self._sizes, -num_shards)[-num_shards:]
        return min(int(largest.sum()), self.lane_rows_per_epoch)

    def rank_lanes(self, rank: int, world: int) -> range:
        """Lanes that one rank reads.

        Args:
            rank: Rank in [0, world).
            world: Number of ranks, at most the number of lanes.

        Returns:
            Consecutive lanes; over all ranks every lane once.

        Raises:
            ValueError: If there are more ranks than lanes, or no such rank.
        """
        if not 1 <= world <= self.lanes:
            raise ValueError(f"lanes: at least the number of workers ({world}), got {self.lanes}; raise it")
        if not 0 <= rank < world:
            raise ValueError(f"rank: from 0 to {world - 1}, got {rank}")
        return range(rank * self.lanes // world, (rank + 1) * self.lanes // world)

    def global_batch_rows(self, step: int) -> Rows:
        """Rows of global batch `step`, lane by lane; each field int64 [B]."""
        return self.rank_rows(step, 0, 1)

    def rank_rows(self, step: int, rank: int, world: int) -> Rows:
        """The part of global batch `step` that one rank reads; each field int64 [b * lanes of the rank].

        The cost does not depend on `step`.

        Raises:
            ValueError: If the step is negative or there is no such rank.
        """
        if step < 0:
            raise ValueError(f"step: at least 0, got {step}")
        lanes = self.rank_lanes(rank, world)
        per_step = self.lane_rows_per_step
        windows = [w for lane in lanes for w in self._lane_windows(lane, step * per_step, (step + 1) * per_step)]
        return self.window_rows(*windows)

    def windows(self, lanes: range, start_step: int, stop_step: int) -> Iterator[Window]:
        """Windows that hold the rows of some lanes for steps [start_step, stop_step), in the order of their need.

        A consumer that cuts batches step by step, and within a step lane by lane, needs the windows in just this order.

        Args:
            lanes: Lanes to read, as `rank_lanes` gives them.
            start_step: First global step.
            stop_step: One past the last.

        Yields:
            Windows, cut to the rows that these steps use; computed as they are asked for.
        """
        per_step = self.lane_rows_per_step
        stop = stop_step * per_step
        upcoming = [(start_step, lane, start_step * per_step) for lane in lanes if start_step < stop_step]
        while upcoming:
            _, lane, begin = upcoming[0]
            window = self._window_at(lane, begin, stop)
            yield window
            begin += window.num_rows
            if begin < stop:
                heapq.heapreplace(upcoming, (begin // per_step, lane, begin))
            else:
                heapq.heappop(upcoming)

    def window_rows(self, *windows: Window) -> Rows:
        """Rows of the windows, one window after the other; each field int64 [sum of num_rows]."""
        counts = [window.num_rows for window in windows]
        ids = [self._permuted_ids(window)[window.begin : window.end] for window in windows]
        sample_id = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        shard = np.searchsorted(self._first_ids, sample_id, side="right") - 1
        return Rows(
            lane=np.repeat(np.asarray([window.lane for window in windows], np.int64), counts),
            epoch=np.repeat(np.asarray([window.epoch for window in windows], np.int64), counts),
            shard=shard,
            row=sample_id - self._first_ids[shard],
            sample_id=sample_id,
        )

    def pieces(self, window: Window) -> Pieces:
        """The whole window that `window` is a part of, in the order of the epoch's shards."""
        span, order = self._span(window.lane, window.epoch, window.index), self._epoch(window.epoch)
        starts, shard = order.starts[span.first : span.last], order.shards[span.first : span.last]
        bounds = np.clip(order.starts[span.first : span.last + 1], span.begin, span.end)
        first_row = bounds[:-1] - starts
        return Pieces(
            shard=shard,
            first_row=first_row,
            num_rows=bounds[1:] - bounds[:-1],
            first_id=self._first_ids[shard] + first_row,
        )

    def _lane_windows(self, lane: int, begin: int, end: int) -> Iterator[Window]:
        """Windows of rows [begin, end) of an endless lane."""
        while begin < end:
            window = self._window_at(lane, begin, end)
            yield window
            begin += window.num_rows

    def _window_at(self, lane: int, begin: int, stop: int) -> Window:
        """The window of a lane's row `begin`, from that row to the window's end or to the lane's row `stop`."""
        epoch, offset = divmod(begin, self.lane_rows_per_epoch)
        position = lane * self.lane_rows_per_epoch + offset
        span = self._recent[lane][0] if lane in self._recent else None
        if span is None or span.epoch != epoch or not span.begin <= position < span.end:
            order = self._epoch(epoch)
            lane_first = _shard_at(order, lane * self.lane_rows_per_epoch)
            span = self._span(lane, epoch, (_shard_at(order, position) - lane_first) // self.window_shards)
        first = position - span.begin
        last = min(span.end - span.begin, first + stop - begin)
        return Window(lane=lane, epoch=epoch, index=span.index, begin=first, end=last)

    def _span(self, lane: int, epoch: int, index: int) -> _Span:
        order = self._epoch(epoch)
        lane_begin = lane * self.lane_rows_per_epoch
        lane_end = lane_begin + self.lane_rows_per_epoch
        first = _shard_at(order, lane_begin) + index * self.window_shards
        last = min(first + self.window_shards, _shard_at(order, lane_end - 1) + 1)
        begin = max(lane_begin, int(order.starts[first]))
        end = min(lane_end, int(order.starts[last]))
        return _Span(epoch, index, first, last, begin, end)

    def _permuted_ids(self, window: Window) -> Int64Array:
        """Sample ids of the whole window that `window` is a part of, permuted."""
        recent = self._recent.get(window.lane)
        if recent is not None and (recent[0].epoch, recent[0].index) == (window.epoch, window.index):
            return recent[1]
        ids = self.pieces(window).sample_ids()
        ids = ids[permutation(ids, self.seed, window.epoch)]
        self._recent[window.lane] = (self._span(window.lane, window.epoch, window.index), ids)
        return ids

    def _epoch(self, epoch: int) -> _Epoch:
        order = self._epochs.get(epoch)
        if order is None:
            shards = np.arange(self._sizes.size, dtype=np.int64)
            shards = shards[np.lexsort((shards, _keys(self.seed, Stream.ORDER_SHARDS, shards, epoch)))]
            starts = np.concatenate([[0], np.cumsum(self._sizes[shards])]).astype(np.int64)
            order = _Epoch(shards, starts)
            if len(self._epochs) >= _MAX_EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order
        return order


def permutation(sample_ids: Int64Array, seed: int, epoch: int) -> Int64Array:
    """Places of a whole window's samples in the order in which they are used; int64 [n], as the ids are."""
    return np.lexsort((sample_ids, _keys(seed, Stream.ORDER_ROWS, sample_ids, epoch)))


def _shard_at(order: _Epoch, position: int) -> int:
    """Place in the epoch's order of the shard that holds a position of the sequence."""
    return int(np.searchsorted(order.starts, position, side="right")) - 1


def _keys(seed: int, stream: Stream, ids: Int64Array, epoch: int) -> npt.NDArray[np.uint64]:
    """64-bit sorting keys of ids in an epoch."""
    keys = np.empty(len(ids), np.uint64)
    for begin in range(0, len(ids), _IDS_AT_A_TIME):
        some = torch.from_numpy(ids[begin : begin + _IDS_AT_A_TIME])
        words = random_words(seed, stream, some, epoch, 2).numpy().astype(np.uint64)
        keys[begin : begin + len(some)] = (words[:, 0] << np.uint64(32)) | words[:, 1]
    return keys
