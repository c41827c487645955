"""Runs of every format and container end to end: read, grown, edited, measured, and what decides their bytes."""

import dataclasses
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ddpm import DDIM
from pipeline.data.image_formats import AnyImageFormat, Jpeg, Png, WebP
from pipeline.errors import FormatVersionError, ShardCorruptError
from pipeline.generation.output.commits import tar_index
from pipeline.generation.output.manifest import load_generation_manifest, publish, read_shards
from pipeline.generation.requests.requests import Partial
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.stores.storage import open_store
from tests.pipeline.runs_in_process import digests, make_in_process, run, snapshot
from tests.pipeline.tiny_models import write_model

FORMATS: list[AnyImageFormat] = [Png(), WebP(), Jpeg(quality=90)]
every_format = pytest.mark.parametrize("image_format", FORMATS, ids=lambda one: one.name)
every_container = pytest.mark.parametrize("container", ["webdataset", "parquet"])


def config_of(model: str, output: Path, **changes: Any) -> SampleConfig:
    """Three classes: 21 images in three shards."""
    values: dict[str, Any] = {"sampler": DDIM(num_steps=4), "images_per_class": 7, "shard_size": 9, "batch_size": 4}
    return SampleConfig(model=model, output=str(output), **(values | changes))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model", answers=True)


@every_format
@every_container
def test_a_run_is_read_grown_and_edited(
    model: str, tmp_path: Path, image_format: AnyImageFormat, container: str
) -> None:
    config = config_of(model, tmp_path / "out", format=image_format, container=container, images_per_class=6)
    _, plain = run(config_of(model, tmp_path / "png"))
    result, few = run(config)
    suffix = "tar" if container == "webdataset" else "parquet"
    assert all(shard.key.endswith(f".{suffix}") for shard in read_shards(result.store, result.manifest.parts))
    before = snapshot(tmp_path / "out")
    assert sample(config).num_made == 0 and snapshot(tmp_path / "out") == before

    grown, made = run(dataclasses.replace(config, images_per_class=7))
    assert grown.store.uri == result.store.uri and (made.images[:18] == few.images).all() and len(made) == 21
    assert made.labels is not None and made.labels.tolist() == [i % 3 for i in range(21)]
    is_lossy = isinstance(image_format, Jpeg)
    assert (made.images == plain.images).all() != is_lossy
    with PIL.Image.open(Path(grown.store.uri, "contact_sheet.png")) as sheet:
        assert sheet.width > 7 * 8

    request = Partial(inputs=grown.store.uri, strength=0.0)  # the inputs as they are
    _, edited = run(config_of(model, tmp_path / "edit", request=request))
    assert (edited.images == made.images).all() and edited.labels is not None
    assert edited.labels.tolist() == made.labels.tolist()


@every_container
def test_a_damaged_shard_is_found_before_an_image_of_it_is_used(model: str, tmp_path: Path, container: str) -> None:
    result, _ = run(config_of(model, tmp_path / "out", container=container))
    shard = Path(result.store.uri, next(islice(read_shards(result.store, result.manifest.parts), 1, None)).key)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(ShardCorruptError, match=f"{shard.name}: sha256"):
        list(result.images())
    shard.write_bytes(data[:-9])
    with pytest.raises(ShardCorruptError, match=f"{shard.name}: size in bytes"):
        list(result.images())


def test_orphans_of_either_container_are_collected(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", container="parquet", orphan_age_s=0.0)
    make_in_process(config)
    orphan = Path(resolve_job(config).store.uri, f"000000002-{'0' * 64}.parquet")
    orphan.write_bytes(b"bytes of other software")
    assert tar_index(orphan.name) == 2
    os.utime(orphan, (0, 0))
    assert len(list(sample(config).images())) == 3 and not orphan.exists()


@every_container
def test_a_model_under_another_name_makes_the_same_bytes(model: str, tmp_path: Path, container: str) -> None:
    """Its digest is in the images; its name is a hint in the manifest, which nobody compares."""
    shutil.copytree(model, tmp_path / "copy")
    config = config_of(model, tmp_path / "a", container=container)
    renamed = dataclasses.replace(config, model=str(tmp_path / "copy"), output=str(tmp_path / "b"))
    first, second = run(config)[0], run(renamed)[0]
    assert digests(first) == digests(second) and first.manifest.spec == second.manifest.spec
    assert first.manifest == dataclasses.replace(second.manifest, model_uri=first.manifest.model_uri)
    assert first.manifest.model_uri.endswith("/model") and second.manifest.model_uri.endswith("/copy")
    before = snapshot(tmp_path / "a")
    again = sample(dataclasses.replace(renamed, output=config.output))
    assert again.manifest == first.manifest, "a hint is no reason to write"
    assert publish(again.store, dataclasses.replace(again.manifest, model_uri="other")) == first.manifest
    assert snapshot(tmp_path / "a") == before


def test_what_is_said_of_a_run(model: str, tmp_path: Path) -> None:
    plan = dict(describe_plan(config_of(model, tmp_path / "out", format=Jpeg(quality=80), container="parquet")))
    assert plan["stored as"] == "JPEG of quality 80, which loses detail, in Parquet"
    assert dict(describe_plan(config_of(model, tmp_path / "out")))["stored as"] == "PNG, in WebDataset tars"


def test_formats_have_prefixes_of_their_own(model: str, tmp_path: Path) -> None:
    formats: list[AnyImageFormat] = [*FORMATS, Jpeg(quality=91)]
    plans = [
        dict(describe_plan(config_of(model, tmp_path / "out", format=one, container=container)))
        for one in formats
        for container in ("webdataset", "parquet")
    ]
    assert len({plan["output"] for plan in plans}) == 8


def test_a_manifest_of_the_version_before_is_refused_with_what_to_do(model: str, tmp_path: Path) -> None:
    result, _ = run(config_of(model, tmp_path / "out"))
    path = Path(result.store.uri, "manifest.json")
    old = path.read_bytes().replace(b'"format_version":3', b'"format_version":2')
    path.chmod(0o644)
    path.write_bytes(old)
    with pytest.raises(FormatVersionError, match=r"has format_version 2, .*make the images again into another output"):
        load_generation_manifest(open_store(result.store.uri))
    with pytest.raises(FormatVersionError, match="format_version 2"):
        run(config_of(model, tmp_path / "edit", request=Partial(inputs=result.store.uri, strength=0.0)))


def test_grey_and_coloured_models_of_every_format(tmp_path: Path) -> None:
    for channels in (1, 3):
        model = write_model(tmp_path / f"model{channels}", channels=channels, num_classes=None, answers=True)
        made = [run(config_of(model, tmp_path / "out", format=one, container="parquet"))[1].images for one in FORMATS]
        assert {images.shape for images in made} == {(7, 8, 8, channels)}
        assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
