"""What integration tests share: a dataset, nodes, and runs that nothing happens to."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from tests.faulty_proxy import FaultyProxy
from tests.fixtures_s3 import S3Server
from tests.integration.nodes import Nodes, ending, start
from tests.integration.training_runs import CHECKPOINTS, HYBRID, NUM_STEPS, flags


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits") / "dataset"))
    prepare_source(config, open_source(config), map)
    return config.dataset


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


@pytest.fixture(scope="session")
def undisturbed(all_nodes: Nodes, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run of so many steps, of two workers that nothing happens to."""
    made = dict[int, Path]()

    def folder_of(steps: int) -> Path:
        if steps not in made:
            all_nodes.keep(1)
            folder = tmp_path_factory.mktemp("undisturbed")
            job, log = start(all_nodes, folder, *flags(folder, dataset, steps=steps), *HYBRID, *CHECKPOINTS)
            with ending(job):
                assert job.wait(300) == 0, log.text
            made[steps] = folder
        return made[steps]

    return folder_of


@pytest.fixture(scope="session")
def unbroken(undisturbed: Callable[[int], Path]) -> Path:
    """The one of `NUM_STEPS`; its first steps are those of any shorter run."""
    return undisturbed(NUM_STEPS)
