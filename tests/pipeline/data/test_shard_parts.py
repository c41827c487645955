"""Parts of a manifest: read back as they were written, and nothing else is read."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord, read_part, write_part
from pipeline.data.shard_table import KeyRule, ShardRecord, ShardTable
from pipeline.errors import ShardCorruptError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def table_of(number: int, rule: KeyRule, first: int = 0) -> ShardTable:
    digests = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(first, first + number))
    return ShardTable(
        sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32),
        size_bytes=10**10 + np.arange(number),
        num_samples=1 + np.arange(number),
        keys=rule,
        first_number=first,
    )


RULES = {
    None: KeyRule(prefix="", num_digits=64, suffix="parquet"),
    "train": KeyRule(prefix="train/", num_digits=16, suffix="tar"),
}


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("range_index", [0, 3])
def test_a_part_gives_back_its_shards(store: ObjectStore, split: str | None, range_index: int) -> None:
    table = table_of(5, RULES[split], range_index * SHARDS_PER_PART)
    part = write_part(store, table, split=split)
    assert (part.range_index, part.num_shards) == (range_index, 5)
    assert part.key.startswith(f"_manifest/{split}/0000" if split else "_manifest/0000")
    assert read_part(store, part, remedy="x") == table
    assert write_part(store, table, split=split) == part, "equal shards, equal bytes"


def test_keys_of_no_rule_are_a_column(store: ObjectStore) -> None:
    records = [ShardRecord(key=f"any/where {n}.tar", size_bytes=9, sha256=f"{n:064x}", num_samples=2) for n in range(3)]
    part = write_part(store, ShardTable.of(records), split="train")
    assert list(read_part(store, part, remedy="x")) == records


def test_parts_of_generation_runs_are_written_as_ever(store: ObjectStore) -> None:
    """`repair` makes parts of runs that exist again, and compares their bytes."""
    part = write_part(store, table_of(3, RULES[None]))
    file = pyarrow.parquet.ParquetFile(Path(store.uri, part.key))
    metadata = file.schema_arrow.metadata
    assert {name: metadata[name] for name in metadata if name != b"ARROW:schema"} == {b"suffix": b"parquet"}
    column = file.metadata.row_group(0).column(0)
    assert (column.compression, column.has_dictionary_page, file.num_row_groups) == ("UNCOMPRESSED", False, 1)


def rewrite(store: ObjectStore, table: pyarrow.Table) -> PartRecord:
    """A part that somebody else wrote, under the digest that it has."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    part = PartRecord(key=f"_manifest/train/00000-00003-{hashlib.sha256(data).hexdigest()}.parquet")
    store.write(part.key, data)
    return part


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop_columns(["size_bytes"]), "size_bytes does not exist in schema"),
        (lambda t: t.set_column(2, "num_samples", pyarrow.array([1, 2, 3])), "column 'num_samples' must be int32"),
        (
            lambda t: t.set_column(2, "num_samples", pyarrow.array([1, None, 3], pyarrow.int32())),
            "column 'num_samples' must be int32 without nulls",
        ),
        (
            lambda t: t.set_column(2, "num_samples", pyarrow.array([1, -1, 3], pyarrow.int32())),
            "num_samples: must be at least 0, and size_bytes 1, got -1",
        ),
        (lambda t: t.slice(1), "2 shards in it, 3 in its name"),
        (lambda t: t.replace_schema_metadata({"prefix": "train/", "digits": "16"}), "suffix"),
    ],
)
def test_a_part_of_other_columns_is_refused_by_name(store: ObjectStore, change: object, reason: str) -> None:
    part = write_part(store, table_of(3, RULES["train"]), split="train")
    table = pyarrow.parquet.read_table(Path(store.uri, part.key))
    assert read_part(store, rewrite(store, table), remedy="x") == table_of(3, RULES["train"])
    changed = rewrite(store, change(table))  # type: ignore[operator]
    with pytest.raises(
        ShardCorruptError, match=r"_manifest/train/00000-00003-\w+\.parquet: malformed: .*; do this"
    ) as e:
        read_part(store, changed, remedy="do this")
    assert reason in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "key",
    ["", "manifest.json", f"_manifest/{'0' * 64}.parquet", f"_manifest/../00000-00001-{'0' * 64}.parquet"],
)
def test_other_keys_are_no_parts(key: str) -> None:
    with pytest.raises(ValueError, match=r"^key: must be _manifest/RRRRR-NNNNN-<sha256>\.parquet, got "):
        PartRecord(key=key)
