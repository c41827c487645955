"""Fixtures that all tests share: one Ray session, a quiet environment."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The same examples in every run, and no time limit on one: machines that run tests are often busy.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")

pytest_plugins = ["tests.fixtures_s3", "tests.fixtures_services"]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray with two logical CPUs for the whole test session: starting it takes about eight seconds."""
    from pipeline.cluster import ClusterConfig
    from pipeline.cluster import ray_session as session

    with session(ClusterConfig(num_cpus=2)):
        yield
