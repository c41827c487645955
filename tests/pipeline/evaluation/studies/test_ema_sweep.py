"""The sweep on real images of a run made in a second: every average measured, drawn and recorded."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from ddpm import DDIM
from pipeline.config_io import from_json
from pipeline.config_sections import write_section
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.evaluation.evaluate import MeasuresConfig
from pipeline.evaluation.studies.ema_sweep import (
    EmaSweep,
    EmaSweepConfig,
    EmaSweepRow,
    describe_plan,
    draw_sweep,
    sweep_ema,
)
from pipeline.generation.requests.requests import Partial
from pipeline.generation.sample_config import ImagesConfig
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun
from tests.pipeline.registered_models import download_artifacts
from tests.pipeline.training.small_runs import make_run

IMAGES = ImagesConfig(model="m", output="o")


@pytest.fixture
def config(tmp_path: Path, ray_session: None) -> EmaSweepConfig:
    prepare(PrepareConfig(source="digits", dataset=str(tmp_path / "dataset"), shard_size=500))
    make_run(tmp_path / "train", steps=64)
    return EmaSweepConfig(
        run=str(tmp_path / "train"),
        output=str(tmp_path / "ema"),
        dataset=str(tmp_path / "dataset"),
        sample=ImagesConfig(
            model="is not used",
            output="is not used",
            images_per_class=10,
            sampler=DDIM(num_steps=3),
            shard_size=100,
            batch_size=50,
        ),
        evaluate=MeasuresConfig(eps_images_per_t=2, max_bound_images=2),
        sigma_rels=(0.15, 0.05),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )


def test_a_sweep(config: EmaSweepConfig, tmp_path: Path) -> None:
    assert dict(describe_plan(config))["snapshots"].startswith("16, the newest behind 1,024 images")
    sweep = sweep_ema(config)
    assert [row.sigma_rel for row in sweep.rows] == [None, 0.0, 0.05, 0.15]
    assert (sweep.num_snapshots, sweep.num_images) == (16, 100)
    assert len({row.model_digest for row in sweep.rows}) == 4
    assert len({row.figures["eps_mse"] for row in sweep.rows}) == 4
    assert set(sweep.real) == set(sweep.real_standard_errors) == {"frechet_pixels", "label_agreement"}
    assert 0.3 < sweep.real["frechet_pixels"] < 0.7, "of 100 real images each, where 1,500 have 0.14"
    lines = sweep.table().splitlines()
    assert lines[5].split()[:2] == ["real", "images"]
    assert all(row.standard_errors["frechet_pixels"] > 0 for row in sweep.rows)
    assert lines[6:] == [f"warning: {warning}" for warning in sweep.warnings] and len(sweep.warnings) == 4
    assert sweep.rows[2].residual == pytest.approx(0, abs=1e-6), "0.05 was tracked"

    output = Path(config.output)
    assert from_json(EmaSweep, (output / "ema_sweep.json").read_bytes(), "") == sweep
    client = connect(str(config.tracking.uri))
    (run,) = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "frechet_pixels")
    assert [(entry.step, entry.value) for entry in history] == [
        (round(row.sigma_rel * 10_000), row.figures["frechet_pixels"])
        for row in sweep.rows
        if row.sigma_rel is not None
    ]
    assert {"ema_sweep.json", "ema_sweep.png"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    joined = TrackingRun.join(config.tracking, run.info.run_id)
    stored = download_artifacts(joined, "config.toml", tmp_path / "logged").read_text()
    assert stored == write_section(config, "ema_sweep")

    # Images are made once: a longer sweep makes those of the new length only.
    made = {path: path.stat().st_mtime_ns for path in (output / "samples").rglob("*.tar")}
    longer = sweep_ema(dataclasses.replace(config, sigma_rels=(0.05, 0.10, 0.15)))
    after = {path: path.stat().st_mtime_ns for path in (output / "samples").rglob("*.tar")}
    assert len(after) == len(made) + 1 and made.items() <= after.items()
    assert [row for row in longer.rows if row.sigma_rel != 0.10] == list(sweep.rows)


def row(sigma_rel: float | None, value: float) -> EmaSweepRow:
    figures = {"frechet_pixels": value, "eps_mse": value / 10}
    return EmaSweepRow(sigma_rel=sigma_rel, residual=None, model_digest="", figures=figures)


def sweep_of(*rows: EmaSweepRow) -> EmaSweep:
    return EmaSweep(train="t", checkpoint="c", num_snapshots=1, num_images=1, rows=rows)


def test_the_picture_and_the_table_show_what_was_measured() -> None:
    sweep = sweep_of(row(None, 0.5), row(0.0, 0.9), row(0.05, 0.4))
    first, second = sweep.table().splitlines()[0], sweep.table().splitlines()[1]
    assert first.split() == ["sigma_rel", "frechet_pixels", "eps_mse", "residual"]
    assert second.split() == ["registered", "0.5000", "0.0500", "-"]
    picture = draw_sweep(sweep)
    assert picture == draw_sweep(sweep)
    assert picture != draw_sweep(sweep_of(row(None, 0.5), row(0.0, 0.9), row(0.05, 0.3)))
    two_panels = Image.open(io.BytesIO(picture))
    assert two_panels.width > 2 * two_panels.height


@pytest.mark.parametrize("sigma_rels", [(), (0.1, 0.1), (0.0,), (0.5,)])
def test_impossible_lengths_are_refused(sigma_rels: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sigma_rels: "):
        EmaSweepConfig(run="t", output="o", dataset="d", sample=IMAGES, sigma_rels=sigma_rels)


@pytest.mark.parametrize("field", ["run", "output", "run_name"])
def test_empty_texts_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must not be empty"):
        EmaSweepConfig(**{"run": "t", "output": "o", "dataset": "d", "sample": IMAGES, field: ""})


def test_averages_are_not_measured_on_edits() -> None:
    edited = dataclasses.replace(IMAGES, request=Partial(inputs="x"))
    with pytest.raises(ValueError, match=r"^sample\.request\.name: .*got partial"):
        EmaSweepConfig(run="t", output="o", dataset="d", sample=edited)
