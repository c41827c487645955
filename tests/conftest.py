"""Fixtures that all tests share: one Ray session, a quiet environment; what runs beside what, and from which seeds."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.seeds import COMMIT, COMMIT_SEED

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's client asks as often as it would, without the pauses of 2 to 3 s: its servers are away on purpose.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The same examples in every run, and no time limit on one: machines that run tests are often busy.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")

pytest_plugins = ["tests.fixtures_s3", "tests.fixtures_services"]

# xdist hands groups out in the order of collection (--no-loadscope-reorder): those of many minutes begin first, and the
# single tests are what both processes end with.
LONG_GROUPS = ("nodes", "submit", "ray", "mlflow")

SLOW_TESTS = pytest.StashKey[frozenset[str]]()
COLLECTED_FILES = pytest.StashKey[frozenset[str]]()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray with two logical CPUs for the whole test session: starting it takes about eight seconds."""
    from pipeline.cluster import ClusterConfig
    from pipeline.cluster import ray_session as session

    with session(ClusterConfig(num_cpus=2)):
        yield


@pytest.fixture
def ray_address(ray_session: None) -> str:
    """Where other processes join the session's Ray, with the variable RAY_ADDRESS; a Ray of their own costs more."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.hookimpl(tryfirst=True)  # before -m takes its choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what shares the Ray or the MLflow server of the session: `--dist loadgroup` runs it in one process.

    And have the long groups begin first.
    """
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif "served" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("mlflow"))
    items.sort(key=_turn)  # which keeps the order inside a group, and of the others
    config.stash[SLOW_TESTS] = frozenset(item.nodeid for item in items if item.get_closest_marker("slow"))
    config.stash[COLLECTED_FILES] = frozenset(item.nodeid.partition("::")[0] for item in items)


def _turn(item: pytest.Item) -> int:
    mark = item.get_closest_marker("xdist_group")
    return LONG_GROUPS.index(mark.args[0]) if mark and mark.args[0] in LONG_GROUPS else len(LONG_GROUPS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Not in the header, which -q leaves out."""
    terminalreporter.write_line(f"seeds: 0 and {COMMIT_SEED}, of commit {COMMIT}")
