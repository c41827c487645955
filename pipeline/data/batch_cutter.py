"""Cutting global batches out of a stream of windows: one queue per lane, and a check of every batch.

The stream brings the windows of several lanes one after the other, in blocks of any size. Nothing here imports Ray.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.data_order import DataOrder, Window
from pipeline.data.shard_table import Int64Array, UInt8Array
from pipeline.data.window_reader import Block, ReadPlan
from pipeline.errors import DatasetError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBatch:
    """One rank's part of a global batch, lane by lane; the arrays belong to the receiver."""

    images: UInt8Array
    """Images [b, H, W, C]."""
    labels: Int64Array | None
    """Classes [b]; None if the dataset has none."""
    sample_ids: Int64Array
    """Permanent ids [b]."""
    epochs: Int64Array
    """Epoch of each sample [b]: the draw of its noise."""


class BatchCutter:
    """Deals a stream's rows to the queues of their lanes and cuts batches from the queues."""

    def __init__(self, plan: ReadPlan, order: DataOrder, windows: Iterator[Window], blocks: Iterator[Block]) -> None:
        self._plan, self._order, self._windows, self._blocks = plan, order, windows, blocks
        self._queues: dict[int, _LaneQueue] = {}
        self._lane, self._missing = -1, 0  # lane of the window that is arriving, and its rows yet to come

    def cut(self, step: int, rank: int, world: int) -> RankBatch:
        """The rank's part of one global batch; steps must be asked for one after the other."""
        order = self._order
        expected = order.rank_rows(step, rank, world)
        num_rows, per_lane = len(expected.sample_id), order.lane_rows_per_step
        batch = _Columns.empty(num_rows, self._plan.image_shape)
        for place, lane in enumerate(order.rank_lanes(rank, world)):
            queue = self._queues.setdefault(lane, _LaneQueue())
            while queue.num_rows < per_lane:
                self._receive(step)
            queue.take(batch, place * per_lane, per_lane)
        if not np.array_equal(batch.sample_ids, expected.sample_id):
            wrong = int(np.flatnonzero(batch.sample_ids != expected.sample_id)[0])
            raise DatasetError(
                f"{self._plan.store_uri}: step {step} should hold sample {expected.sample_id[wrong]} at row {wrong} of "
                f"rank {rank} and the read stream gave {batch.sample_ids[wrong]}; this is a defect, please report it"
            )
        labels = batch.labels if self._plan.num_classes is not None else None
        return RankBatch(images=batch.images, labels=labels, sample_ids=batch.sample_ids, epochs=expected.epoch)

    def _receive(self, step: int) -> None:
        """Take one block from the stream."""
        block = next(self._blocks, None)
        if block is None:
            raise DatasetError(
                f"{self._plan.store_uri}: the read stream ended before step {step}; resume from the last checkpoint"
            )
        # Copied, because what lies in the object store counts against the stream's limit until it is let go.
        ids = np.array(block["sample_id"])
        columns = _Columns(np.array(block["image"]), np.array(block["label"]) if "label" in block else ids, ids)
        begin = 0
        while begin < len(ids):
            if self._missing == 0:
                window = next(self._windows)
                self._lane, self._missing = window.lane, window.num_rows
            end = min(begin + self._missing, len(ids))
            self._queues.setdefault(self._lane, _LaneQueue()).put(columns.rows(begin, end))
            self._missing -= end - begin
            begin = end


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rows side by side."""

    images: UInt8Array
    labels: Int64Array
    sample_ids: Int64Array

    @classmethod
    def empty(cls, num_rows: int, image_shape: tuple[int, int, int]) -> "_Columns":
        return cls(
            np.empty((num_rows, *image_shape), np.uint8), np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
        )

    def rows(self, begin: int, end: int) -> "_Columns":
        return _Columns(self.images[begin:end], self.labels[begin:end], self.sample_ids[begin:end])

    def put(self, begin: int, rows: "_Columns") -> None:
        end = begin + len(rows.sample_ids)
        self.images[begin:end], self.labels[begin:end] = rows.images, rows.labels
        self.sample_ids[begin:end] = rows.sample_ids


class _LaneQueue:
    """Rows of one lane that wait for their step."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._parts: deque[_Columns] = deque()

    def put(self, rows: _Columns) -> None:
        self._parts.append(rows)
        self.num_rows += len(rows.sample_ids)

    def take(self, batch: _Columns, begin: int, num_rows: int) -> None:
        """Move the next rows to the batch's rows from `begin` on."""
        self.num_rows -= num_rows
        while num_rows > 0:
            part = self._parts.popleft()
            size = len(part.sample_ids)
            if size > num_rows:
                self._parts.appendleft(part.rows(num_rows, size))
                part, size = part.rows(0, num_rows), num_rows
            batch.put(begin, part)
            begin += size
            num_rows -= size
