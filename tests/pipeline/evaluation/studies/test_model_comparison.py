"""Several models on the same noise: their own runs, and one picture in which a column is an id."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ddpm import DDIM
from jobs.compare import JOBS
from pipeline.data.image_stream import read_images
from pipeline.errors import ConfigError
from pipeline.evaluation.studies.model_comparison import ModelComparisonConfig, compare_models
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig
from tests.jobs.every_job import resolve
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.runs_in_process import make_in_process, run, snapshot

SCALE = 4  # of 8-pixel images


def config_of(folder: Path, **changes: Any) -> ModelComparisonConfig:
    images = ImagesConfig(
        model=str(folder / "a"), output=str(folder / "out"), num_images=10, sampler=DDIM(num_steps=3),
        shard_size=5, batch_size=5,
    )  # fmt: skip
    sample = dataclasses.replace(images, **changes.pop("sample", {}))
    return ModelComparisonConfig(**{"models": (str(folder / "b"),), "sample": sample, "columns": 7, **changes})


def make(config: ModelComparisonConfig) -> None:
    """Without Ray."""
    for uri in (config.sample.model, *config.models):
        images = dataclasses.replace(config.sample, model=uri)
        make_in_process(SampleConfig.of(images, config.tracking, config.cluster))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_editing_model(tmp_path / name, seed=seed + 1)
    return tmp_path


@pytest.mark.parametrize("request_", [Generate(), Generate(classes=("c", "a")), "plan"])
def test_rows_are_models_and_columns_are_ids(folder: Path, request_: Generate | str) -> None:
    if isinstance(request_, str):
        (folder / "plan.csv").write_text("label,noise_id\n" + "".join(f"{i % 4},{i + 3}\n" for i in range(10)))
        config = config_of(
            folder, sample={"request": Generate(label_plan=str(folder / "plan.csv")), "num_images": None}
        )
    else:
        config = config_of(folder, sample={"request": request_})
    make(config)
    found = compare_models(config)
    assert [model for model, _ in found.rows] == [str(folder / "a"), str(folder / "b")]
    assert len({prefix for _, prefix in found.rows}) == 2, "a spec of its own for each"
    picture = np.asarray(PIL.Image.open(io.BytesIO((folder / "out/models.png").read_bytes())))
    for row, (_, prefix) in enumerate(found.rows):
        store = open_store(prefix)
        manifest = load_generation_manifest(store)
        assert manifest is not None and manifest.num_images == 10 and manifest.spec.seed == config.sample.seed
        images = read_images(store, read_shards(store, manifest.parts)).images
        for column in range(7):
            top, left = 9 * SCALE * row, 9 * SCALE * column
            cell = picture[top : top + 8 * SCALE : SCALE, left : left + 8 * SCALE : SCALE]
            assert (cell.reshape(8, 8) == images[column, :, :, 0]).all()
    assert picture.shape[:2] == ((9 * 2 - 1) * SCALE, (9 * 7 - 1) * SCALE)
    before = snapshot(folder / "out")
    compare_models(config)
    assert snapshot(folder / "out") == before, "what exists is not made again"


def test_models_of_the_same_answers_make_the_same_of_the_same_noise(folder: Path) -> None:
    """Equal weights under another card: the prefix differs, the images do not, so that all noise is shared."""
    write_editing_model(folder / "c", seed=1, dataset_digest="cd" * 32)
    of_a, of_b, of_c = (
        run(SampleConfig(model=str(folder / name), output=str(folder / "out"), num_images=10, shard_size=5,
                         batch_size=5, sampler=DDIM(num_steps=3, eta=1.0)))
        for name in "abc"
    )  # fmt: skip
    assert of_a[0].store.uri != of_c[0].store.uri
    assert (of_a[1].images == of_c[1].images).all() and not (of_a[1].images == of_b[1].images).all()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_classes": 3, "class_names": "abc"}, "has the num_classes 3, .* 7; compare models of the same"),
        ({"class_names": "gfedcba"}, "has other classes than .*/a"),
        ({"image_size": (8, 16)}, r"has the image_size \(8, 16\)"),
        ({}, "is the same model as .*/a; name another"),
    ],
)
def test_models_that_cannot_stand_side_by_side_are_refused(folder: Path, other: dict[str, Any], words: str) -> None:
    write_editing_model(folder / "c", **other)
    with pytest.raises(ConfigError, match=rf"^models: .*/c {words}"):
        compare_models(config_of(folder, models=(str(folder / "b"), str(folder / "c"))))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ()}, "^models: must name at least one more model, got none"),
        ({"models": ("b", "")}, "^models: must not be empty"),
        ({"columns": 0}, "^columns: must be at least 1, got 0"),
        ({"sample": {"calibration": "c.json"}}, "^sample.calibration: is one model's, got c.json"),
    ],
)
def test_mistakes_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(tmp_path, **changes)


def test_the_job_makes_a_whole_shard_of_each(tmp_path: Path) -> None:
    """A run of whole shards grows; of fewer images it would end raggedly, and `sample` would be refused later."""
    file = tmp_path / "x.toml"
    file.write_text('[sample]\nshard_size = 60\nimages_per_class = 7\ncalibration = "c.json"\n')
    config = resolve(JOBS["models"], "--config", str(file), "--models", "models:/x/1", "models:/x/2")
    assert config.models == ("models:/x/1", "models:/x/2") and config.tracking == TrackingConfig()
    assert (config.sample.num_images, config.sample.images_per_class, config.sample.calibration) == (60, None, None)
    fewer = resolve(JOBS["models"], "--config", str(file), "--sample.images-per-class", "3")
    assert (fewer.sample.num_images, fewer.sample.images_per_class) == (None, 3)
    planned = resolve(JOBS["models"], "--config", str(file), "--sample.request.label-plan", "p.csv")
    assert (planned.sample.num_images, planned.sample.images_per_class) == (None, None)
