"""From pixels to a shard's bytes: what is said of each image, in it and beside it, in every format and container."""

import dataclasses
import io
import tarfile
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.image_formats import AnyImageFormat, Jpeg, Png, WebP, decode_image
from pipeline.data.parquet_shards import unpack_parquet
from pipeline.data.shards import unpack_shard
from pipeline.generation.making.packing import encode_samples, pack_samples
from pipeline.generation.spec.edits import PartialSpec
from pipeline.generation.spec.sampling_plan import SamplingSpec
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

NAMES = ("cat", "dog", "bird")
IDS = range(500, 510)
PIXELS = np.random.default_rng(2).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
EDIT = PartialSpec(revision=1, inputs_digest="ef" * 32, num_inputs=7, label=None, strength=0.5)
FORMATS: list[AnyImageFormat] = [Png(), WebP(), Jpeg(quality=90)]


def spec_of(**changes: Any) -> SamplingSpec:
    return make_spec(**({"num_classes": 3, "channels": 3, "seed": 2**64 - 1} | changes))


def labels_of(spec: SamplingSpec) -> list[int | None]:
    return [None if spec.num_classes is None else sample_id % spec.num_classes for sample_id in IDS]


def metas_of(spec: SamplingSpec) -> list[dict[str, Any]]:
    return [{} if spec.request is None else {"input_rows": list(spec.request.rows(sample_id))} for sample_id in IDS]


def packed(spec: SamplingSpec, names: tuple[str, ...] = NAMES) -> bytes:
    return pack_samples(spec, names, encode_samples(spec, names, IDS, labels_of(spec), PIXELS, metas_of(spec)))


@pytest.mark.parametrize("changes", [{}, {"num_classes": None}, {"request": EDIT, "guide_digest": "cd" * 32}])
@pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
def test_both_containers_hold_the_same_samples(image_format: AnyImageFormat, changes: dict[str, Any]) -> None:
    """But for the spec's digest, which covers the container."""
    spec = spec_of(image_format=image_format, **changes)
    of_parquet = dataclasses.replace(spec, container="parquet")
    names = NAMES if spec.num_classes else ()
    tar = unpack_shard(packed(spec, names))
    samples = encode_samples(spec, names, IDS, labels_of(spec), PIXELS, metas_of(spec))
    assert tar == samples
    assert unpack_parquet(pack_samples(of_parquet, names, samples)) == samples
    assert [sample.meta["sample_id"] for sample in samples] == list(IDS)
    assert [sample.key for sample in samples] == [f"{i:012d}" for i in IDS]
    if spec.request is not None:
        assert samples[3].meta["input_rows"] == [503 % 7] and samples[0].meta["request"]["strength"] == 0.5
        assert samples[0].meta["guide_digest"] == "cd" * 32
    else:
        assert not {"input_rows", "request", "guide_digest"} & samples[0].meta.keys()


def test_the_row_of_a_label_plan_is_in_both_containers() -> None:
    """Its columns are there for every row, also for those without an id of the caller's."""
    spec = spec_of()
    metas = [{"noise_id": 2**48 - 1 - i, "id": "" if i % 2 else f"mine-{i}"} for i in range(len(IDS))]
    samples = encode_samples(spec, NAMES, IDS, labels_of(spec), PIXELS, metas)
    for container, unpack in (("webdataset", unpack_shard), ("parquet", unpack_parquet)):
        of = dataclasses.replace(spec, container=container)  # type: ignore[arg-type]
        assert unpack(pack_samples(of, NAMES, samples)) == samples
    assert [{key: sample.meta[key] for key in ("noise_id", "id")} for sample in samples] == metas


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
def test_how_images_are_handed_over_does_not_matter(image_format: AnyImageFormat) -> None:
    spec = spec_of(image_format=image_format)
    labels, metas = labels_of(spec), metas_of(spec)
    whole = encode_samples(spec, NAMES, IDS, labels, PIXELS, metas)
    parts = [
        encode_samples(spec, NAMES, IDS[a:b], labels[a:b], PIXELS[a:b], metas[a:b])
        for a, b in ((0, 1), (1, 7), (7, 10))
    ]
    assert [sample for part in parts for sample in part] == whole
    with pytest.raises(ValueError, match="zip"):
        encode_samples(spec, NAMES, IDS, labels[:-1], PIXELS, metas)


def test_an_image_carries_its_id_and_the_digests() -> None:
    spec = spec_of()
    texts = {"ddpm:sample_id": "507", "ddpm:model_digest": spec.model_digest, "ddpm:spec_digest": spec.digest}
    for image_format in FORMATS:
        spec = spec_of(image_format=image_format)
        texts["ddpm:spec_digest"] = spec.digest
        with tarfile.open(fileobj=io.BytesIO(packed(spec))) as archive:
            file = archive.extractfile(f"000000000507.{image_format.extension}")
            assert file is not None
            with PIL.Image.open(io.BytesIO(file.read())) as opened:
                if image_format.name == "png":
                    assert {key: opened.info[key] for key in texts} == texts
                else:
                    described = " ".join(f"{key}={text}" for key, text in texts.items())
                    assert opened.getexif()[0x010E] == described


def test_pixels_are_those_that_were_handed_over() -> None:
    for image_format in (Png(), WebP()):
        samples = unpack_shard(packed(spec_of(image_format=image_format)))
        assert (np.stack([decode_image(one.image, one.extension) for one in samples]) == PIXELS).all()


def test_classes_without_names_are_numbers_in_a_parquet_file() -> None:
    spec = spec_of(container="parquet")
    table = pq.read_table(pa.BufferReader(packed(spec, ())))
    assert b'"names": ["0", "1", "2"]' in table.schema.metadata[b"huggingface"]
    assert "class_name" not in table.column_names and table["label"].to_pylist() == [i % 3 for i in IDS]


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_everything_that_decides_the_bytes_is_in_the_spec(container: str) -> None:
    """Equal specs, equal bytes; another spec, other bytes, though the pixels are the same."""
    spec = spec_of(container=container)
    assert packed(spec) == packed(dataclasses.replace(spec))
    assert packed(spec) != packed(dataclasses.replace(spec, seed=1))
    assert packed(spec) != packed(dataclasses.replace(spec, model_digest="cd" * 32))
