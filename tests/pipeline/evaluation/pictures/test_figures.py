"""The pictures of a model: drawn from real measurements, in the folder and in the run."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm import LikelihoodConfig
from pipeline.data.manifest import load_manifest, write_manifest
from pipeline.data.shards import decode_png
from pipeline.errors import ConfigError
from pipeline.evaluation.pictures.figures import (
    FiguresConfig,
    describe_plan,
    draw_bits_by_t,
    draw_figures,
    draw_trajectory,
)
from pipeline.evaluation.studies.sampler_comparison import compare_samplers
from pipeline.generation.sample_config import ImagesConfig
from pipeline.measuring.bound import BoundMeter
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.models.model_files import load_model
from pipeline.models.registration import register_model
from pipeline.models.registry import resolve_model
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, check_server, new_run_key
from tests.pipeline.evaluation.studies.test_sampler_comparison import digits  # noqa: F401
from tests.pipeline.registered_models import download_artifacts
from tests.pipeline.tiny_models import write_model

CPU = torch.device("cpu")


@pytest.mark.usefixtures("ray_session")
def test_every_picture_is_in_the_folder_and_in_the_run(digits: str, tmp_path: Path) -> None:  # noqa: F811
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    check_server(tracking)
    run = TrackingRun.open(tracking, new_run_key())
    folder = write_model(tmp_path / "model", num_classes=10, num_timesteps=30)
    version = register_model(run, resolve_model(folder, tracking).files, "pictured")
    images = ImagesConfig(
        model=version.uri, output=str(tmp_path / "samples"), images_per_class=2, shard_size=20, batch_size=20
    )
    config = FiguresConfig(
        dataset=digits,
        sample=images,
        samplers=("ddim, eta 0",),
        evaluations=(3,),
        output=str(tmp_path / "figures"),
        max_bound_images=20,
        tracking=tracking,
    )
    assert dict(describe_plan(config))["pictures"] == config.output
    uris = draw_figures(config)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert sorted(drawn) == sorted(Path(uri).name for uri in uris)
    assert set(drawn) == {
        "schedules.png",
        "posterior_variance.png",
        "loss_weights.png",
        "bits_by_t.png",
        "trajectory.png",
        "samplers.png",
    }
    logged = download_artifacts(run, "figures", tmp_path / "logged")
    assert {path.name: path.read_bytes() for path in logged.iterdir()} == drawn


def test_images_too_large_for_pixel_statistics_are_refused_before_anything_is_measured(
    digits: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = dataclasses.replace(load_manifest(open_store(digits)), image_size=(72, 64))
    write_manifest(open_store(str(tmp_path)), manifest)
    model = write_model(tmp_path / "model", num_classes=10, image_size=(72, 64))
    images = ImagesConfig(model=model, output=str(tmp_path / "samples"))
    config = FiguresConfig(dataset=str(tmp_path), sample=images, output=str(tmp_path / "figures"))
    for act in (draw_figures, compare_samplers, describe_plan):
        with pytest.raises(ConfigError, match=r"^dataset: .*4,608 values are too large for pixel statistics"):
            act(config)  # type: ignore[operator]
    assert "measuring" not in capsys.readouterr().out


def test_its_own_rules_hold_and_those_of_the_comparison() -> None:
    images = ImagesConfig(model="m", output="o")
    rules: list[tuple[dict[str, Any], str]] = [
        ({"max_bound_images": 0}, r"^max_bound_images: must be at least 1, got 0"),
        ({"batch_size": 0}, r"^batch_size: must be at least 1, got 0"),
        ({"seed": -1}, r"^seed: must be in "),
        ({"samplers": ("dimm",)}, r"^samplers: .* got 'dimm'"),
        ({"evaluations": ()}, r"^evaluations: "),
    ]
    for change, words in rules:
        with pytest.raises(ValueError, match=words):
            FiguresConfig(**{"dataset": "d", "sample": images, "output": "f", **change})


def test_a_trajectory_goes_from_noise_to_the_prediction(tmp_path: Path) -> None:
    files = resolve_model(write_model(tmp_path / "model", num_classes=10, num_timesteps=30), TrackingConfig()).files
    model = load_model(files)[1]
    picture = decode_png(draw_trajectory(model, seed=1, device=CPU))
    assert np.array_equal(picture, decode_png(draw_trajectory(model, seed=1, device=CPU)))
    assert not np.array_equal(picture, decode_png(draw_trajectory(model, seed=2, device=CPU)))
    side = 4 * 9  # images of 8 pixels, enlarged four times, with a gap
    assert picture.shape[:2] == (8 * side - 4, 10 * side - 4)
    # The last x_t holds almost no noise: it is close to the x_0_hat below it, which the first is not.
    first, last = (
        np.abs(picture[:32, x : x + 32].astype(float) - picture[side : side + 32, x : x + 32]).mean()
        for x in (0, 9 * side)
    )
    assert last < first / 4


def test_where_the_bits_are_is_drawn_from_the_bound(digits: str, tmp_path: Path) -> None:  # noqa: F811
    files = resolve_model(write_model(tmp_path / "model", num_classes=10, num_timesteps=30), TrackingConfig()).files
    model = load_model(files)[1]
    pictures = set()
    for seed in (0, 1):
        meter = BoundMeter(model=model, seed=seed, batch_size=20, device=CPU)
        bound = meter.bound(EvaluationDataset(digits).stream("held_out", 20), LikelihoodConfig())
        pictures |= {draw_bits_by_t(bound)}
    assert len(pictures) == 2
