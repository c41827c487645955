"""Fixtures that the tests of rank 0 share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.pipeline.training.rank_zero_runs import Run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")


@pytest.fixture
def make(database: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    runs, lines = list[Run](), list[str]()
    monkeypatch.setattr(progress, "_send", lines.append)

    def make(
        *, tracking: TrackingRun | None = None, lease_token: str = "ours", goes_on: bool = False, **changes: Any
    ) -> Run:
        tracking = tracking or TrackingRun.open(database, new_run_key(), "test")
        runs.append(Run(tmp_path, tracking, lines, lease_token, goes_on=goes_on, **changes))
        return runs[-1]

    yield make
    for run in runs:
        run.store.open.set()
        run.rank_zero.close()
