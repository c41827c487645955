"""What travels to a read task: its windows, and of the dataset the records of their shards alone.

A task is given no order and no table of shards: both grow with the dataset, and a task that unpickled them and sorted
an epoch's shards for itself would spend its time on that. Nothing here imports Ray.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.data_order import DataOrder, Pieces, Window, permutation
from pipeline.data.shard_table import Int64Array, ShardRecord

_WINDOW_NUMBERS, _PIECE_NUMBERS = 4, 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadWindow:
    """Rows [begin, end) of a permuted window, and all that must be known to read them."""

    epoch: int
    """Epoch of the lane, from 0."""
    begin: int
    """First row wanted, counted within the permuted window."""
    end: int
    """One past the last row wanted."""
    pieces: Pieces
    """The whole window before it is permuted."""
    records: tuple[ShardRecord, ...]
    """The shard of each piece."""

    @classmethod
    def of(cls, window: Window, order: DataOrder, shards: Sequence[ShardRecord]) -> "ReadWindow":
        """A window of an order, with the records of its shards out of the split's."""
        pieces = order.pieces(window)
        records = tuple(shards[shard] for shard in pieces.shard.tolist())
        return cls(epoch=window.epoch, begin=window.begin, end=window.end, pieces=pieces, records=records)

    def rows(self, seed: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """The rows wanted, in their order: shard's position in the manifest, row within the shard, and sample id.

        Args:
            seed: Of the order.
        """
        pieces, ids = self.pieces, self.pieces.sample_ids()
        wanted = permutation(ids, seed, self.epoch)[self.begin : self.end]
        piece = np.repeat(np.arange(len(pieces.shard)), pieces.num_rows)[wanted]
        row = ids[wanted] - pieces.first_id[piece] + pieces.first_row[piece]
        return pieces.shard[piece], row, ids[wanted]


def to_columns(windows: Iterable[ReadWindow]) -> dict[str, list[Any]]:
    """Windows as lists of numbers and words, which a row of a Ray dataset can hold."""
    numbers: list[int] = []
    pieces: list[int] = []
    keys: list[str] = []
    digests: list[str] = []
    for window in windows:
        numbers += [window.epoch, window.begin, window.end, len(window.records)]
        sizes = [(record.size_bytes, record.num_samples) for record in window.records]
        columns = (window.pieces.shard, window.pieces.first_row, window.pieces.num_rows, window.pieces.first_id)
        pieces += np.column_stack([*columns, np.asarray(sizes, np.int64)]).ravel().tolist()
        keys += [record.key for record in window.records]
        digests += [record.sha256 for record in window.records]
    return {"windows": numbers, "pieces": pieces, "keys": keys, "sha256": digests}


def from_columns(columns: dict[str, Any]) -> list[ReadWindow]:
    """What `to_columns` was given."""
    pieces = np.asarray(columns["pieces"], np.int64).reshape(-1, _PIECE_NUMBERS)
    records = [
        ShardRecord(key=str(key), size_bytes=size, sha256=str(sha256), num_samples=number)
        for key, sha256, (size, number) in zip(columns["keys"], columns["sha256"], pieces[:, 4:].tolist(), strict=True)
    ]
    windows: list[ReadWindow] = []
    first = 0
    for epoch, begin, end, count in np.asarray(columns["windows"], np.int64).reshape(-1, _WINDOW_NUMBERS).tolist():
        shard, first_row, num_rows, first_id = pieces[first : first + count, :4].T
        windows.append(
            ReadWindow(
                epoch=epoch,
                begin=begin,
                end=end,
                pieces=Pieces(shard=shard, first_row=first_row, num_rows=num_rows, first_id=first_id),
                records=tuple(records[first : first + count]),
            )
        )
        first += count
    return windows
