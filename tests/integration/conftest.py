"""The dataset and the undisturbed run that integration tests share."""

from pathlib import Path

import pytest

from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from tests.integration.jobs import run_job
from tests.integration.training_runs import CHECKPOINTS, HYBRID, NUM_STEPS, flags


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits") / "dataset"))
    prepare_source(config, open_source(config), map)
    return config.dataset


@pytest.fixture(scope="session")
def unbroken(dataset: str, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Two workers that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_job("train", *flags(folder, dataset, steps=NUM_STEPS), *HYBRID, *CHECKPOINTS)
    return folder
