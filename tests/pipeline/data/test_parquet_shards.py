"""Parquet shards: others read them as images and classes, equal samples have equal bytes, and damage is found."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.image_formats import Jpeg, encode_png
from pipeline.data.parquet_shards import pack_parquet, unpack_parquet
from pipeline.data.samples import Sample
from pipeline.errors import ShardCorruptError

NAMES = ("cat", "dog", "bird")
EDIT = {"request": {"name": "partial", "strength": 0.5}, "input_rows": [3, 4], "guide_digest": "cd" * 32}


def make_samples(num: int, *, labelled: bool = True, **more: Any) -> list[Sample]:
    pixels = np.random.default_rng(3).integers(0, 256, (num, 8, 6, 3), dtype=np.uint8)
    samples = []
    for index, image in enumerate(pixels):
        label = index % 3 if labelled else None
        meta = {
            "sample_id": index,
            "label": label,
            "seed": 2**64 - 1,
            "sampler": "ddim",
            "num_steps": 50,
            "guidance_scale": 1.5,
            "sampler_options": {"eta": 1.0, "spacing": "linspace", "guidance_interval": None},
            "model_digest": "ab" * 32,
            "spec_digest": "ef" * 32,
            **({"class_name": NAMES[label]} if label is not None else {}),
            **more,
        }
        samples.append(Sample(key=f"{index:012d}", image=encode_png(image), cls=label, meta=meta))
    return samples


def read(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))


def written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("num", [1, 100, 101, 250])
@pytest.mark.parametrize(("labelled", "more"), [(True, {}), (False, {}), (True, EDIT)])
def test_what_is_packed_is_read(num: int, labelled: bool, more: dict[str, Any]) -> None:
    samples = make_samples(num, labelled=labelled, **more)
    data = pack_parquet(samples, NAMES if labelled else ())
    assert unpack_parquet(data) == samples
    assert pack_parquet([*samples], [*NAMES] if labelled else []) == data
    reordered = [
        Sample(key=one.key, image=one.image, cls=one.cls, meta=dict(reversed(one.meta.items()))) for one in samples
    ]
    assert pack_parquet(reordered, NAMES if labelled else ()) == data, "the order of entries is no part of them"
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert sizes == [100] * (num // 100) + [num % 100] * (num % 100 > 0)


def test_pyarrow_reads_images_and_labels_in_the_layout_of_hugging_face() -> None:
    samples = make_samples(5, **EDIT)
    table = read(pack_parquet(samples, NAMES))
    assert table.schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for row, sample in zip(table.to_pylist(), samples, strict=True):
        assert row["image"] == {"bytes": sample.image, "path": f"{sample.key}.png"}
        with PIL.Image.open(io.BytesIO(row["image"]["bytes"])) as opened:
            assert opened.size == (6, 8)
        assert (row["label"], row["class_name"], row["sample_id"]) == (
            sample.cls,
            NAMES[sample.cls or 0],
            int(sample.key),
        )
        assert (row["seed"], row["sampler"], row["num_steps"], row["guidance_scale"]) == (2**64 - 1, "ddim", 50, 1.5)
        assert json.loads(row["sampler_options"]) == sample.meta["sampler_options"]
        assert json.loads(row["request"]) == EDIT["request"] and row["input_rows"] == [3, 4]
    # https://huggingface.co/docs/datasets/about_dataset_features: what `datasets` writes into a schema and reads there.
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": ["cat", "dog", "bird"]}
    assert features["seed"] == {"_type": "Value", "dtype": "uint64"}
    assert features["guidance_scale"] == {"_type": "Value", "dtype": "float64"}
    # Features whose field is not as they would make it are dropped there: all may be null, and lists are not named.
    assert set(features) == set(table.column_names) - {"input_rows"}
    assert all(field.nullable for field in table.schema)


def test_the_library_of_hugging_face_reads_them() -> None:
    """No part of the tests' installation; `pip install datasets` has this run."""
    features = pytest.importorskip("datasets").Features.from_arrow_schema(
        read(pack_parquet(make_samples(2), NAMES)).schema
    )
    assert type(features["image"]).__name__ == "Image" and features["label"].names == list(NAMES)


def test_images_without_classes_have_no_column_for_them() -> None:
    table = read(pack_parquet(make_samples(2, labelled=False), ()))
    assert not {"label", "class_name", "request", "input_rows", "guide_digest"} & set(table.column_names)


def test_the_extension_is_that_of_the_path() -> None:
    (sample,) = make_samples(1)
    jpeg = Sample(
        key=sample.key, image=Jpeg().encode(np.zeros((4, 4, 3), np.uint8)), extension="jpg", cls=0, meta=sample.meta
    )
    assert unpack_parquet(pack_parquet([jpeg], NAMES)) == [jpeg]


def test_nothing_in_a_file_is_compressed_and_images_are_in_no_statistics() -> None:
    data = pack_parquet(make_samples(3), NAMES)
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"UNCOMPRESSED"}
    assert not columns["image.bytes"].is_stats_set and columns["sample_id"].statistics.max == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_file_cut_short_is_refused(share: float) -> None:
    data = pack_parquet(make_samples(5), NAMES)
    with pytest.raises(ShardCorruptError, match=r"^s3://b/1\.parquet: malformed Parquet: .*; restore the file"):
        unpack_parquet(data[: int(len(data) * share)], "s3://b/1.parquet")
    with pytest.raises(ShardCorruptError):
        unpack_parquet(data[:-1])


def with_column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = pa.array(values, kind)
        if name in table.column_names:
            return table.set_column(table.column_names.index(name), name, column)
        return table.append_column(name, column)

    return change


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop_columns(["model_digest"]), "must have the columns .*model_digest"),
        (with_column("caption", ["a", "b"], pa.string()), "must have the columns .* got .*caption"),
        (with_column("label", ["0", "1"], pa.string()), "column 'label' has the type string, not int64"),
        (with_column("label", [0, None], pa.int64()), "every row must have a value"),
        (with_column("image", [{"bytes": b"", "path": "a.png"}, None], IMAGE), "every row must have a value"),
        (with_column("image", [{"bytes": b"", "path": "a.png"}, {"path": "b.png"}], IMAGE), "every row must have"),
        (with_column("image", [{"bytes": b"", "path": "a.png"}] * 2, IMAGE), "key: must be unique"),
        (with_column("image", [{"bytes": b"", "path": p} for p in ("a.png", "b.gif")], IMAGE), "'b.gif' is none of"),
        (with_column("image", [{"bytes": b"", "path": p} for p in ("a.png", "x/b.png")], IMAGE), "key: must be"),
        (with_column("sampler_options", ["{}", "{"], pa.string()), "Expecting"),
    ],
)
def test_what_is_not_as_it_is_written_is_refused(change: Callable[[pa.Table], pa.Table], words: str) -> None:
    table = read(pack_parquet(make_samples(2), NAMES))
    assert len(unpack_parquet(written(table))) == 2, "another writer of the same columns"
    with pytest.raises(ShardCorruptError, match=words):
        unpack_parquet(written(change(table)))


def test_samples_that_are_not_alike_are_refused() -> None:
    first, second = make_samples(2)
    del second.meta["class_name"]
    with pytest.raises(ValueError, match=r"^meta: must have the same entries in every sample"):
        pack_parquet([first, second], NAMES)
    del first.meta["seed"]
    with pytest.raises(ValueError, match=r"must have the columns .*seed"):
        pack_parquet([first], NAMES)
    with pytest.raises(ValueError, match=r"^key: must be unique"):
        pack_parquet([second, second], NAMES)
