"""The dataset and the undisturbed run that integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from tests.faulty_proxy import FaultyProxy
from tests.fixtures_s3 import S3Server
from tests.integration.jobs import run_job
from tests.integration.nodes import Nodes
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


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def storage(s3_server: S3Server, proxy: FaultyProxy) -> dict[str, str]:
    """What reaches the S3 server, by way of the proxy."""
    return s3_server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}


@pytest.fixture(scope="session")
def all_nodes(storage: dict[str, str]) -> Iterator[Nodes]:
    nodes = Nodes(storage)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def nodes(all_nodes: Nodes) -> Nodes:
    """Two nodes with room for one worker each."""
    all_nodes.keep(1)
    return all_nodes
