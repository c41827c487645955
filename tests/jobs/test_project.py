"""One TOML file drives a whole project of rectangular colour images: from the folder to the report."""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jobs import evaluate, prepare_data, sample, train
from jobs.cli import run_job
from pipeline.data.manifest import load_manifest
from pipeline.data.shards import decode_png, read_shard
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.stores.storage import open_store

PROJECT = """
dataset = "{folder}/dataset"

[tracking]
uri = "sqlite:///{folder}/mlflow.db"

[prepare]
source = "{folder}/photos"
image_size = "24x40"
channels = 3
shard_size = 16
held_out_fraction = 0.25

[train]
output = "{folder}/train"
register_as = "rectangles"
steps = 3
global_batch = 8
log_interval_steps = 1
checkpoint_interval_steps = 3
grid_interval_steps = 3

[train.grid_sampler]
num_steps = 2

[train.network]
base_channels = 8
channel_multipliers = [1, 2]
attention_resolutions = [12]
num_groups = 4

[train.schedule]
num_timesteps = 50

[train.workers]
num_workers = 1

[train.validation]
num_images = 0

[sample]
model = "models:/rectangles@candidate"
output = "{folder}/samples"
images_per_class = 3
shard_size = 4
batch_size = 4
num_actors = 1

[sample.sampler]
name = "heun"
num_steps = 2
churn = 5.0

[evaluate]
eps_images_per_t = 2
max_classifier_images = 20

[evaluate.bound]
terms_per_image = 5
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, and a folder of photos of two classes: their own shape, wider, higher, and grey."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, (height, width) in enumerate([(24, 40), (30, 50), (24, 80), (64, 40)] * 6):
            pixels = (level + random.integers(-50, 50, (height, width, 3))).astype(np.uint8)
            image = PIL.Image.fromarray(pixels[..., 0] if i % 8 == 7 else pixels)
            image.save(tmp_path / "photos" / name / f"{i:02d}.png")
    file = tmp_path / "project.toml"
    file.write_text(PROJECT.format(folder=tmp_path))
    return file


def test_a_project_of_rectangles(
    project: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project.parent
    flags = ["--config", str(project)]
    for job in (prepare_data.JOB, train.JOB, sample.JOB, evaluate.JOB):
        assert run_job(job, flags) == 0, (job.section, capsys.readouterr().err)

    dataset = load_manifest(open_store(str(folder / "dataset")))
    assert (dataset.image_size, dataset.channels, dataset.class_names) == ((24, 40), 3, ("dark", "light"))
    (prefix,) = [path.parent for path in (folder / "samples").glob("*/manifest.json")]
    store = open_store(str(prefix))
    made = load_generation_manifest(store)
    assert made is not None and made.spec.image_size == (24, 40)
    assert (made.spec.sampler.name, made.num_images) == ("heun", 6)
    shapes = {
        decode_png(one.image).shape for shard in read_shards(store, made.parts) for one in read_shard(store, shard)
    }
    assert shapes == {(24, 40, 3)}
    with PIL.Image.open(prefix / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height, "three wide images beside each other, two classes"

    figures = json.loads((prefix / "evaluation.json").read_text())["figures"]
    bound, *terms = (figures[f"bits_per_dim{term}"]["model"] for term in ("", "_prior", "_denoising", "_decoder"))
    assert bound == pytest.approx(sum(terms), rel=1e-4) and 0 < bound < 100
    assert set(figures) > {"frechet_pixels", "label_agreement", "eps_mse"}
    assert "held-out bits per dimension" in capsys.readouterr().out

    # What was written beside the images is such a file too, and does the same: nothing is made again.
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.name
    }
    assert run_job(sample.JOB, ["--config", str(prefix / "config.toml")]) == 0
    assert "nothing written" in capsys.readouterr().out
    after = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.name
    }
    assert before == after


def times_of_files(folder: Path) -> dict[Path, int]:
    """When each file but the database was written last."""
    files = [path for path in folder.rglob("*") if path.is_file() and "mlflow" not in path.name]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_mistake_names_the_file_and_the_section(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project.write_text(project.read_text().replace("churn = 5.0", "eta = 0.5"))
    assert run_job(sample.JOB, ["--config", str(project), "--dry-run"]) == 2
    assert f"{project}: sample.sampler.eta: unknown key of 'heun'" in capsys.readouterr().err
