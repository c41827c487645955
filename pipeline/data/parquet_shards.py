"""Shards of generated images as Parquet, in the layout that Hugging Face's `datasets` reads as images and classes.

    image            struct<bytes: binary, path: string>; the path is the sample's key and the extension of its format
    label            int64, with the names of the classes in the schema (ClassLabel); not there without classes
    class_name       string; not there where the model has no names for its classes
    sample_id, seed, sampler, num_steps, guidance_scale, model_digest, spec_digest
    sampler_options  JSON: the sampler's other options
    guide_digest     string; there if a weaker model guided
    noise_id, id     int64 and string: of a label plan the id of the noise, and what the caller calls the image
    request, input_rows    JSON and list<int64>: of an edit what was asked for, and of which rows it was made

The columns are what a tar has in .json. The schema's metadata says under "huggingface" which features the columns are.
Rows stand in the order of the samples, in groups of 100, as `datasets` writes images. A file without rows, of a shard
whose images were all taken down, has the same columns.

Equal samples give equal bytes with equal versions of pyarrow: every option that decides them is fixed here, nothing is
compressed (images are already), and no time is written. Reading is strict, as that of tars: columns of another name or
type, and rows that lack a value, are refused.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.image_formats import EXTENSIONS
from pipeline.data.samples import Sample, check_key
from pipeline.errors import ShardCorruptError

_ROWS_PER_GROUP = 100
_TYPES = {
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "label": pa.int64(),
    "class_name": pa.string(),
    "sample_id": pa.int64(),
    "seed": pa.uint64(),
    "sampler": pa.string(),
    "num_steps": pa.int64(),
    "guidance_scale": pa.float64(),
    "sampler_options": pa.string(),
    "model_digest": pa.string(),
    "spec_digest": pa.string(),
    "guide_digest": pa.string(),
    "noise_id": pa.int64(),
    "id": pa.string(),
    "request": pa.string(),
    "input_rows": pa.list_(pa.int64()),
}
_OPTIONAL = {"label", "class_name", "guide_digest", "noise_id", "id", "request", "input_rows"}
_JSON = {"sampler_options", "request"}
_NEVER_NONE = "every row must have a value in every column"


def pack_parquet(samples: Sequence[Sample], label_names: Sequence[str], without: Collection[str] = ()) -> bytes:
    """Pack the samples of a generation run into a Parquet file; equal samples give equal bytes.

    Args:
        samples: At least one, all with the same entries in `meta`, which are those of the columns above.
        label_names: Names of the classes 0, 1, ...; empty if there are none.
        without: Keys of samples that are left out, all of them perhaps: what is left says nothing of the columns then.

    Raises:
        ValueError: If a key breaks the rules of `pack_shard`, or the entries are not those of the columns.
    """
    seen = set[str]()
    for sample in samples:
        check_key(sample.key, seen)
    columns = _row(samples[0]).keys()
    _check_columns(columns)
    schema = pa.schema(
        [(name, kind) for name, kind in _TYPES.items() if name in columns],
        metadata={"huggingface": json.dumps({"info": {"features": _features(columns, label_names)}}, sort_keys=True)},
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="none",
        version="2.6",
        data_page_version="1.0",
        use_dictionary=[name for name, kind in _TYPES.items() if kind == pa.string()],
        write_statistics=["sample_id", "label"],  # of other columns nobody asks; of images they would hold images
    ) as writer:
        left = [sample for sample in samples if sample.key not in without]
        for start in range(0, len(left), _ROWS_PER_GROUP):
            rows = [_row(sample) for sample in left[start : start + _ROWS_PER_GROUP]]
            if any(row.keys() != columns for row in rows):
                raise ValueError(f"meta: must have the same entries in every sample, {', '.join(columns)}")
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _row(sample: Sample) -> dict[str, Any]:
    """The sample as values of columns; what is None has no column."""
    values = {
        "image": {"bytes": sample.image, "path": f"{sample.key}.{sample.extension}"},
        **{name: json.dumps(value, sort_keys=True) if name in _JSON else value for name, value in sample.meta.items()},
        "label": sample.cls,
    }
    return {name: value for name, value in values.items() if value is not None}


def _features(columns: Mapping[str, Any] | Any, label_names: Sequence[str]) -> dict[str, Any]:
    """What `datasets` calls the columns. Lists are left out: it takes them from the type, their name has changed."""
    features: dict[str, Any] = {}
    for name, kind in _TYPES.items():
        if name == "image":
            features[name] = {"_type": "Image"}
        elif name == "label":
            features[name] = {"_type": "ClassLabel", "names": list(label_names)}
        elif not pa.types.is_list(kind):
            features[name] = {"_type": "Value", "dtype": "float64" if kind == pa.float64() else str(kind)}
    return {name: feature for name, feature in features.items() if name in columns}


def unpack_parquet(data: bytes, where: str = "shard") -> list[Sample]:
    """Parse a file written by `pack_parquet`.

    Args:
        data: The whole file.
        where: Its URI, for messages.

    Raises:
        ShardCorruptError: If anything in it is not as `pack_parquet` writes it.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        _check_columns(schema.names)
        for field in schema:
            if field.type != _TYPES[field.name]:
                raise ValueError(f"column {field.name!r} has the type {field.type}, not {_TYPES[field.name]}")
        samples, seen = [], set[str]()
        for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, use_threads=False):
            samples += [_sample(row, seen) for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardCorruptError(f"{where}: malformed Parquet: {reason}; restore the file or make it again") from None
    return samples


def _check_columns(names: Any) -> None:
    found, needed = list(names), _TYPES.keys() - _OPTIONAL
    if len(set(found)) < len(found) or not needed <= set(found) <= _TYPES.keys():
        raise ValueError(f"must have the columns {', '.join(sorted(needed))}, each once, got {', '.join(found)}")


def _sample(row: dict[str, Any], seen: set[str]) -> Sample:
    image = row.pop("image")
    if None in row.values() or image is None or None in image.values():
        raise ValueError(_NEVER_NONE)
    key, _, extension = image["path"].partition(".")
    if extension not in EXTENSIONS:
        raise ValueError(f"image {image['path']!r} is none of {', '.join(EXTENSIONS)}")
    check_key(key, seen)
    meta = {name: json.loads(value) if name in _JSON else value for name, value in row.items()}
    cls = meta.setdefault("label", None)
    return Sample(key=key, image=image["bytes"], extension=extension, cls=cls, meta=meta)
