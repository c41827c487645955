"""Shards as columns: the same records as before, whatever their keys are."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.shard_table import KeyRule, ShardRecord, ShardTable

RULE = KeyRule(prefix="train/", num_digits=16, suffix="tar")


def record(number: int, *, key: str | None = None) -> ShardRecord:
    sha256 = f"{number * 2654435761 % 2**256:064x}"
    return ShardRecord(
        key=RULE.key(number, sha256) if key is None else key,
        size_bytes=100 + number,
        sha256=sha256,
        num_samples=1 + number,
    )


def test_a_table_is_the_sequence_of_its_records() -> None:
    records = [record(number) for number in range(5)]
    table = ShardTable.of(records)
    assert table.keys == RULE and len(table) == 5
    assert list(table) == records and table[-1] == records[-1] and table[1:4:2] == (records[1], records[3])
    assert table[::-1] == tuple(records[::-1]) and records[2] in table and table.index(records[2]) == 2
    with pytest.raises(IndexError):
        table[5]
    assert ShardTable.of(table) is table and copy.deepcopy(table) == table, "as pickling does"


@given(st.lists(st.tuples(st.integers(0, 2**256 - 1), st.integers(1, 2**40), st.integers(1, 10**6)), max_size=8))
def test_any_records_come_back(values: list[tuple[int, int, int]]) -> None:
    records = [
        ShardRecord(key=f"any/{n}", size_bytes=size, sha256=f"{sha:064x}", num_samples=samples)
        for n, (sha, size, samples) in enumerate(values)
    ]
    assert list(ShardTable.of(records)) == records
    assert [type(value) for one in ShardTable.of(records) for value in (one.size_bytes, one.num_samples)] == [int] * (
        2 * len(records)
    )


@pytest.mark.parametrize(
    "keys",
    [
        {2: "train/000000002.tar"},
        {2: record(3).key},  # another digest
        {1: RULE.key(2, record(1).sha256), 2: RULE.key(1, record(2).sha256)},  # out of order
        {0: "held_out/000000000-" + record(0).sha256[:16] + ".tar"},
        {0: "train/000000000-" + record(0).sha256[:15] + ".tar"},
        {0: "train/0-" + record(0).sha256[:16] + ".tar"},
    ],
)
def test_keys_that_follow_no_rule_are_kept(keys: dict[int, str]) -> None:
    records = [record(number, key=keys.get(number)) for number in range(4)]
    table = ShardTable.of(records)
    assert isinstance(table.keys, tuple) and list(table) == records and list(table.rows(1, 3)) == records[1:3]


def test_rows_of_a_table_keep_their_numbers_and_join_again() -> None:
    table = ShardTable.of([record(number) for number in range(7)])
    parts = [table.rows(0, 3), table.rows(3, 6), table.rows(6, 7)]
    assert [part.first_number for part in parts] == [0, 3, 6] and list(parts[1]) == [table[3], table[4], table[5]]
    assert np.shares_memory(parts[1].sha256, table.sha256)
    assert ShardTable.joined(parts) == table
    mixed = ShardTable.joined([table.rows(0, 3), ShardTable.of([record(3, key="elsewhere")], 3)])
    assert [shard.key for shard in mixed] == [*(record(number).key for number in range(3)), "elsewhere"]
    assert list(ShardTable.joined([])) == []


def test_equality_is_of_contents_and_keys() -> None:
    table = ShardTable.of([record(0), record(1)])
    assert table == ShardTable.of((record(0), record(1))) and table != (record(0), record(1))
    assert table != ShardTable.of([record(0), record(1, key="other")]) and table != ShardTable.of([record(0)])
    assert ShardTable.of([record(0), record(1, key="other")]).digest == table.digest, "a key is no content"
    assert len({table.digest, ShardTable.of([record(0)]).digest, ShardTable.of([record(1), record(0)]).digest}) == 3


def test_impossible_numbers_are_refused() -> None:
    columns = {"sha256": np.zeros((2, 32), np.uint8), "size_bytes": np.array([5, 7]), "keys": RULE}
    with pytest.raises(ValueError, match=r"^num_samples: must be at least 0, .* got -1 and 7 in 'train/000000001-"):
        ShardTable(**columns, num_samples=np.array([3, -1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^num_samples: .* got 1 and -7 in .*; the manifest is damaged"):
        ShardTable(**columns | {"size_bytes": np.array([5, -7])}, num_samples=np.array([3, 1]))  # type: ignore[arg-type]
