"""One output shard in this process: reproducible bytes, what is in them, and what is said when it cannot be made."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import webdataset

from ddpm import DDIM, Ancestral, Heun, Sampler, generate, x_0_to_images
from pipeline.data.image_formats import AnyImageFormat, Jpeg, Png, WebP
from pipeline.data.image_stream import read_images
from pipeline.data.shards import decode_png, read_shard
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.making.shard_maker import ImageMaker, Ingredients, ShardMaker
from pipeline.generation.output.commits import read_record
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec
from pipeline.models.model_files import ModelFiles, load_model, read_card, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.tiny_models import write_model, write_own_model

SHARD = OutputShard(index=1, first_id=10, num_samples=10)


def spec_of(files: ModelFiles, **changes: Any) -> SamplingSpec:
    config = read_card(files).config
    sampler = changes.get("sampler", DDIM(num_steps=4))
    values = {
        "model_digest": files.digest,
        "guide_digest": None,
        "calibration_digest": None,
        "request": None,
        "sampler": sampler,
        "sampler_revision": sampler.revision,
        "seed": 7,
        "num_classes": config.num_classes,
        "shard_size": 10,
        "batch_size": 4,
        "image_size": config.image_size,
        "channels": config.channels,
        "num_levels": config.num_levels,
    }
    return SamplingSpec(**(values | changes))


def maker(model: str, output: Path, **changes: Any) -> ShardMaker:
    files = dataclasses.replace(read_model_files(open_store(model)), trusted=True)
    return ShardMaker(
        Ingredients(model=files), spec_of(files, **changes), open_store(str(output)), num_threads=1, device="cpu"
    )


def images(output: Path, commit: Any) -> list[np.ndarray]:
    return [decode_png(sample.image) for sample in read_shard(open_store(str(output)), commit.record.tar)]


@pytest.mark.parametrize("sampler", [DDIM(num_steps=4), Ancestral(num_steps=4), Heun(num_steps=3)])
def test_images_are_those_of_the_library(tmp_path: Path, sampler: Sampler) -> None:
    files = read_model_files(open_store(write_model(tmp_path / "model", answers=True)))
    spec = spec_of(files, sampler=sampler)
    make = ImageMaker(Ingredients(model=files), spec, torch.device("cpu"))
    made, labels = make(spec, range(5, 9))
    ids = torch.arange(5, 9)
    model = load_model(files)[1]
    assert labels == [2, 0, 1, 2]
    assert torch.equal(made, generate(model, sampler, seed=7, sample_ids=ids, label=ids % 3))
    shard = OutputShard(index=1, first_id=10, num_samples=2)
    tar = maker(str(tmp_path / "model"), tmp_path / "out", sampler=sampler)(shard)
    ids = torch.arange(10, 14)  # a batch is always filled
    x_0 = generate(model, sampler, seed=7, sample_ids=ids, label=ids % 3)
    assert (np.stack(images(tmp_path / "out", tar)) == x_0_to_images(x_0[:2]).numpy()).all()


def test_the_same_shard_has_the_same_bytes_in_every_attempt(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    first = maker(model, tmp_path / "a")(SHARD).record
    torch.rand(5)  # global random state does not matter
    second = maker(model, tmp_path / "b")(SHARD).record
    assert first.sha256 == second.sha256
    assert maker(model, tmp_path / "c", seed=8)(SHARD).record.sha256 != first.sha256


def test_a_shard_cut_short_holds_the_first_images_of_the_full_one(tmp_path: Path) -> None:
    """So an image never changes when a run grows; 7 is no multiple of the batch size, as 10 is none."""
    model = write_model(tmp_path / "model", channels=3)
    full = images(tmp_path / "full", maker(model, tmp_path / "full")(SHARD))
    cut = OutputShard(index=1, first_id=10, num_samples=7)
    short = images(tmp_path / "short", maker(model, tmp_path / "short")(cut))
    assert len(full) == 10 and len(short) == 7
    assert all((a == b).all() for a, b in zip(full, short, strict=False))
    assert not (full[0] == full[3]).all(), "ids 10 and 13 have one label and different noise"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file to the collector
@pytest.mark.parametrize("num_classes", [3, None])
def test_the_webdataset_library_reads_every_sample_with_its_provenance(tmp_path: Path, num_classes: int | None) -> None:
    model = write_model(tmp_path / "model", num_classes=num_classes)
    record = maker(model, tmp_path / "out")(SHARD).record
    tar = str(tmp_path / "out" / record.key)
    samples = list(webdataset.WebDataset(tar, shardshuffle=False, handler=webdataset.reraise_exception))
    assert [int(sample["__key__"]) for sample in samples] == list(range(10, 20))
    for sample_id, sample in enumerate(samples, start=10):
        label = None if num_classes is None else sample_id % 3
        assert sample.get("cls") == (None if label is None else str(label).encode())
        assert PIL.Image.open(io.BytesIO(sample["png"])).size == (8, 8)
        assert json.loads(sample["json"]) == {
            "sample_id": sample_id,
            "seed": 7,
            "label": label,
            "sampler": "ddim",
            "num_steps": 4,
            "guidance_scale": 1.0,
            "sampler_options": {
                "eta": 1.0,
                "spacing": "linspace",
                "clip_x_0": True,
                "dynamic_threshold": None,
                "guidance_interval": None,
                "guidance_rescale": 0.0,
            },
            "model_digest": record.model_digest,
            "spec_digest": record.spec_digest,
            **({} if label is None else {"class_name": str(label)}),
        }


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
@pytest.mark.parametrize("image_format", [Png(), WebP(), Jpeg(quality=90)], ids=lambda one: one.name)
def test_a_shard_of_any_format_holds_the_same_images(
    tmp_path: Path, image_format: AnyImageFormat, container: str
) -> None:
    model = write_model(tmp_path / "model", answers=True)
    plain = np.stack(images(tmp_path / "png", maker(model, tmp_path / "png")(SHARD)))
    record = maker(model, tmp_path / "out", image_format=image_format, container=container)(SHARD).record
    assert record.key == f"000000001-{record.sha256}.{'tar' if container == 'webdataset' else 'parquet'}"
    read = read_images(open_store(str(tmp_path / "out")), [record.tar])
    assert read.labels is not None and read.labels.tolist() == [i % 3 for i in range(10, 20)]
    if image_format.name == "jpeg":
        error = np.abs(read.images.astype(int) - plain)
        assert 0 < error.mean() < 10
    else:
        assert (read.images == plain).all()
    again = maker(model, tmp_path / "again", image_format=image_format, container=container)(SHARD).record
    assert again.sha256 == record.sha256


def test_provenance_stands_in_the_record_and_not_in_the_tar(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    record = maker(model, tmp_path / "out")(SHARD).record
    assert record == read_record(open_store(str(tmp_path / "out")), 1)
    assert record.made.device == "cpu" and f"torch {torch.__version__}" in record.made.software
    assert record.made.host.encode() not in (tmp_path / "out" / record.key).read_bytes()


def test_out_of_memory_names_the_batch_size_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network allocates 2^55 floats for more than four images: torch's own error, from a real allocation."""
    model = write_own_model(tmp_path / "own", monkeypatch, "hungry")
    with pytest.raises(
        PipelineError, match=r"out of memory on cpu at output shard 1 with batch_size=10: .*batch_size=2,"
    ):
        maker(model, tmp_path / "out", batch_size=10)(SHARD)
    assert not (tmp_path / "out").exists()
    assert maker(model, tmp_path / "out", batch_size=4)(SHARD).outcome == "first"


def test_images_that_are_not_numbers_are_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_own_model(tmp_path / "own", monkeypatch, "diverged")
    with pytest.raises(PipelineError, match=r"output shard 1 \(ids from 10\): .*NaN"):
        maker(model, tmp_path / "out")(SHARD)
    assert not (tmp_path / "out").exists()


def test_a_network_that_cannot_be_built_is_a_mistake_of_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_own_model(tmp_path / "own", monkeypatch, "fine")
    card = Path(model) / "model.json"
    card.write_bytes(card.read_bytes().replace(b":make", b":mako"))
    with pytest.raises(ConfigError, match="mako"):
        maker(model, tmp_path / "out")
