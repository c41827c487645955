"""What the presets say about themselves: sizes, costs, and that jobs take them by name."""

import re
from pathlib import Path

import pytest

from ddpm import flops_per_image
from ddpm.networks.cost import num_parameters
from jobs.cli import run_job
from jobs.train import JOB
from pipeline.data.manifest import DatasetManifest, Split
from pipeline.data.shard_table import ShardRecord
from pipeline.presets import PRESETS, Preset
from pipeline.training.train_config import data_order, model_config

SHARD = ShardRecord(key="train/000000000-0123456789abcdef.tar", size_bytes=1, sha256="0" * 64, num_samples=100_000)
NUM_CLASSES = {"digits": 10, "imagenet64": 1000, "celebahq256": 0, "cifar10": 0}


def manifest(preset: Preset) -> DatasetManifest:
    """What `prepare` would have written: the shape of the images, and the classes that the name stands for."""
    name = preset.prepare.dataset.split("/")[1]
    return DatasetManifest(
        name=name,
        source=preset.prepare.source,
        image_size=preset.prepare.image_shape[:2],
        channels=preset.prepare.image_shape[2],
        class_names=tuple(f"class {index}" for index in range(NUM_CLASSES[name])),
        splits={"train": Split(shards=(SHARD,))},
        num_quarantined=0,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_its_networks_size_and_cost(name: str) -> None:
    preset, text = PRESETS[name](), PRESETS[name].__doc__ or ""
    config = model_config(preset.train, manifest(preset))
    stated = re.search(r"([\d,]+) parameters, ([\d.]+) GFLOP per image", text)
    assert stated is not None, text
    parameters, gflop = num_parameters(config), flops_per_image(config) / 1e9
    print(f"{name}: {parameters:,} parameters, {gflop:.4f} GFLOP per image")
    assert stated[1] == f"{parameters:,}"
    decimals = len(stated[2].partition(".")[2])
    assert decimals >= 2 and stated[2] == f"{gflop:.{decimals}f}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name: str) -> None:
    preset = PRESETS[name]()
    train, sampler = preset.train, preset.sample.sampler
    assert data_order(train, manifest(preset)).lane_rows_per_step * train.data.lanes == train.global_batch
    assert train.network.learned_variance == sampler.needs_learned_variance
    assert sampler.guidance_scale == 1.0 or train.label_drop > 0
    assert train.run_name == name and train.output == f"artifacts/{name}/train"


@pytest.mark.parametrize("name", PRESETS)
def test_a_job_takes_a_preset_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as its dataset, which is not there."""
    nothing = str(tmp_path / "nothing")
    code = run_job(JOB, ["--preset", name, "--dataset", nothing, "--dry-run"])
    said = capsys.readouterr().err
    assert code != 0 and nothing in said and "prepare_data" in said
