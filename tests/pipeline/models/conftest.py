"""A registry in an SQLite file, and a run in it."""

import pytest

from pipeline.tracking.tracking import TrackingConfig, TrackingRun, check_server, new_run_key


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for a module; each test has its own model name."""
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")
    check_server(config)
    return config


@pytest.fixture
def run(registry: TrackingConfig) -> TrackingRun:
    return TrackingRun.open(registry, new_run_key())
