"""What is recorded about a version lies with the version, its model and its run."""

from pathlib import Path

import pytest

from pipeline.models.registration import register_model
from pipeline.models.registry import RegisteredVersion
from pipeline.models.version_records import log_version_files, log_version_metrics
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, check_server, new_run_key
from tests.pipeline.registered_models import download_artifacts, model_files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrackingRun:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('records')}/mlflow.db")
    check_server(config)
    return TrackingRun.open(config, new_run_key())


@pytest.fixture(scope="module")
def version(run: TrackingRun) -> RegisteredVersion:
    return register_model(run, model_files(5), "figures")


def test_figures_of_a_version(run: TrackingRun, version: RegisteredVersion) -> None:
    log_version_metrics(version, {"eval/frechet_distance": 0.25, "eval/agreement": 0.99}, {"ddpm.report": "s3://b/r"})
    client = connect(run.uri)
    stored = client.get_model_version("figures", "1")
    model = client.get_logged_model(stored.tags["ddpm.model_id"])
    figures = {metric.key: (metric.value, metric.step) for metric in model.metrics or []}
    assert figures == {"eval/frechet_distance": (0.25, 50), "eval/agreement": (0.99, 50)}
    assert client.get_run(run.run_id).data.metrics["eval/frechet_distance"] == 0.25
    assert stored.tags["ddpm.report"] == "s3://b/r"


def test_files_of_a_version_replace_those_of_the_same_name(
    run: TrackingRun, version: RegisteredVersion, tmp_path: Path
) -> None:
    log_version_files(version, {"a.png": b"first", "b.json": b"{}"}, "figures")
    log_version_files(version, {"a.png": b"second"}, "figures")
    folder = download_artifacts(run, "figures", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.png": b"second", "b.json": b"{}"}
