"""Calibration files: measured on the training split, read back, refused for another model; images follow from them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm import DDIM, Ancestral, generate, images_to_x_0, x_0_error_table, x_0_errors, x_0_to_images
from pipeline.config_io import from_json, to_json
from pipeline.data.manifest import load_manifest
from pipeline.errors import ConfigError, FormatVersionError
from pipeline.evaluation.studies.calibration import CalibrateConfig, calibrate, describe_plan
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.models.calibration import Calibration, read_calibration
from pipeline.models.model_files import load_model, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.runs_in_process import run
from tests.pipeline.small_datasets import make_dataset


@pytest.fixture
def config(tmp_path: Path) -> CalibrateConfig:
    return CalibrateConfig(
        model=write_editing_model(tmp_path / "model"),
        dataset=make_dataset(tmp_path / "data", [7, 5, 9]).uri,
        output=str(tmp_path / "out" / "calibration.json"),
        terms_per_image=50,
        batch_size=4,
    )


def sample_config(config: CalibrateConfig, output: Path, **changes: Any) -> SampleConfig:
    plain = SampleConfig(
        model=config.model,
        output=str(output),
        images_per_class=1,
        sampler=Ancestral(num_steps=5, variance="analytic"),
        calibration=config.output,
        shard_size=7,
        batch_size=7,
    )
    return dataclasses.replace(plain, **changes)


def test_the_file_holds_what_the_library_measures_on_the_training_images(config: CalibrateConfig) -> None:
    made = calibrate(config)
    data = make_dataset(Path(config.dataset).parent / "copy", [7, 5, 9])
    errors = x_0_errors(
        load_model(read_model_files(open_store(config.model)))[1],
        seed=0,
        sample_ids=torch.arange(21),
        x_0=images_to_x_0(torch.from_numpy(data.images)),
        label=torch.arange(21) % 7,
        terms_per_image=50,
    )
    np.testing.assert_allclose(made.x_0_error, x_0_error_table(errors).numpy(), rtol=1e-5)
    assert (made.num_images, made.dataset_digest) == (21, data.manifest.digest)
    stored = Path(config.output).read_bytes()
    assert from_json(Calibration, stored, config.output) == made and stored == to_json(made)
    assert read_calibration(config.output, made.model_digest, 50, clip_x_0=True) == made
    calibrate(config)
    assert Path(config.output).read_bytes() == stored, "a function of model, dataset and seed"
    rows = dict(describe_plan(config))
    assert rows["network evaluations"] == "about 1,050 images" and rows["output"] == config.output


def test_the_analytic_variance_makes_images_with_it(config: CalibrateConfig, tmp_path: Path) -> None:
    calibration = calibrate(config)
    analytic = sample_config(config, tmp_path / "images")
    result, made = run(analytic)
    assert result.manifest.spec.calibration_digest == calibration.digest
    by_hand = generate(
        load_model(read_model_files(open_store(config.model)))[1],
        analytic.sampler,
        seed=0,
        sample_ids=torch.arange(7),
        label=torch.arange(7),
        x_0_error=torch.tensor(calibration.x_0_error, dtype=torch.float64),
    )
    assert (x_0_to_images(by_hand).numpy() == made.images).all()


def test_what_does_not_belong_together_is_refused(config: CalibrateConfig, tmp_path: Path) -> None:
    made = calibrate(config)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"calibration": None}, r"calibration: goes with .*analytic, got None with ancestral; make it with"),
        ({"sampler": DDIM(num_steps=5)}, r"calibration: goes with .*with ddim"),
        (
            {"sampler": Ancestral(num_steps=5, variance="analytic", clip_x_0=False)},
            r"measured with clip_x_0 True, sampler.clip_x_0 is False",
        ),
        ({"calibration": str(tmp_path / "x.json")}, r"calibration: no file .*x.json; make it with jobs/calibrate.py"),
        (
            {"model": write_editing_model(tmp_path / "other", seed=2)},
            rf"of the model {made.model_digest[:16]}, this",
        ),
    ]
    for changes, words in cases:
        with pytest.raises(ConfigError, match=words):
            sample(sample_config(config, tmp_path / "images", **changes))
    with pytest.raises(ConfigError, match="has 50 steps, the model 1000"):
        read_calibration(config.output, made.model_digest, 1000, clip_x_0=True)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terms_per_image": 51}, r"^terms_per_image: must be at most 50.*got 51"),
        ({"output": "folder/"}, r"^output: names no file"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    config: CalibrateConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        calibrate(dataclasses.replace(config, **changes))


def test_other_classes_are_refused(config: CalibrateConfig, tmp_path: Path) -> None:
    reordered = write_editing_model(tmp_path / "reordered", class_names="gbcdefa")
    with pytest.raises(ConfigError, match=r"^dataset: .*the same classes in another order .*label 0 is 'a' here, 'g' "):
        calibrate(dataclasses.replace(config, model=reordered))
    assert not Path(config.output).exists()


def test_of_another_dataset_than_the_training_s_the_file_and_who_samples_with_it_say_so(
    config: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_manifest(open_store(config.dataset)).digest
    trained = write_editing_model(tmp_path / "trained", dataset_digest=own)
    assert calibrate(dataclasses.replace(config, model=trained)).warnings == ()
    assert "warning" not in capsys.readouterr().out
    elsewhere = write_editing_model(tmp_path / "elsewhere", dataset_digest="a" * 64)
    config = dataclasses.replace(config, model=elsewhere)
    (warning,) = calibrate(config).warnings
    assert "another split" in warning and own[:16] in warning and "a" * 16 in warning
    assert f"warning: {warning}" in capsys.readouterr().out
    run(sample_config(config, tmp_path / "images"))
    assert f"warning: calibration {config.output}: {warning}" in capsys.readouterr().out


def test_another_dataset_is_refused(config: CalibrateConfig, tmp_path: Path) -> None:
    wide = make_dataset(tmp_path / "wide", [3], image_size=(16, 16))
    with pytest.raises(ConfigError, match=r"^dataset: .* holds images of 16 x 16 pixels .*; .* makes images of 8 x 8"):
        calibrate(dataclasses.replace(config, dataset=wide.uri))


@pytest.mark.parametrize(
    ("field", "value"), [("max_images", 0), ("terms_per_image", 0), ("batch_size", 0), ("seed", -1)]
)
def test_impossible_configs_are_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*got {value}"):
        CalibrateConfig(model="m", dataset="d", output="o", **{field: value})  # type: ignore[arg-type]


RECORD = {
    "format_version": 2,
    "model_digest": "a",
    "dataset_digest": "b",
    "num_images": 1,
    "clip_x_0": True,
    "x_0_error": (0.5,),
}


@pytest.mark.parametrize(
    "change", [{"num_images": "all"}, {"x_0_error": ()}, {"x_0_error": (None,)}, {"x_0_error": (-0.1,)}]
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "c.json").write_bytes(to_json(RECORD | change))
    with pytest.raises(ConfigError, match=rf"c.json: {next(iter(change))}[.0]*: "):
        read_calibration(str(tmp_path / "c.json"), "a", 1, clip_x_0=True)


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(to_json(RECORD | {"format_version": 1}))
    with pytest.raises(FormatVersionError, match=r"c\.json: has format_version 1, .* calibrate the model again"):
        read_calibration(str(tmp_path / "c.json"), "a", 1, clip_x_0=True)
