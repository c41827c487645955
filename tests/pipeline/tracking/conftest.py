"""What the tests of MLflow's runs share: a database with its tables, and the lines that are said."""

import shutil
from pathlib import Path

import pytest

from pipeline.tracking import tracking
from pipeline.tracking.tracking import TrackingConfig, check_server


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once."""
    file = tmp_path_factory.mktemp("mlflow") / "template.db"
    check_server(TrackingConfig(uri=f"sqlite:///{file}"))
    return file


@pytest.fixture
def config(migrated_database: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(tracking, "say", said.append)
    return said
