"""What is checked before Ray starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private.utils import validate_socket_filepath

from pipeline import cluster
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.errors import ConfigError, PipelineError


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which no Ray runs yet, though the tests' may; `ray.init` is not reached, or fails."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("letter", ["x", "ä"], ids=["ascii", "two bytes"])
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_one_line(
    name: str, letter: str, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "/" + letter * 90
    monkeypatch.setenv(name, folder)
    with pytest.raises(ConfigError) as caught, ray_session(ClusterConfig()):
        pass
    line, length = str(caught.value), len(os.fsencode(folder))
    assert line.startswith(f"{name}: must have at most ") and f"got {length} in {folder!r}; set RAY_TMPDIR to" in line
    assert "\n" not in line and caught.value.exit_code == 2
    # the number in it is where Ray's own limit is
    allowed = int(line.split()[5])
    session = f"/ray/session_2026-01-02_03-04-05_123456_{os.getpid()}/sockets/plasma_store"
    validate_socket_filepath("/" + "x" * (allowed - 1) + session)
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath("/" + "x" * allowed + session)


def test_a_cluster_elsewhere_needs_no_folder_here(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * 90)

    def unreachable(**options: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(PipelineError, match=r"^cluster\.address: "), ray_session(ClusterConfig(address="10.0.0.1:1")):
        pass


def test_a_temporary_folder_that_is_none_is_one_line() -> None:
    """The real Ray, in a process of its own."""
    code = "from pipeline.cluster import *\nwith ray_session(ClusterConfig()): pass"
    without = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=without | {"RAY_TMPDIR": "/dev/null"}, cwd=Path(cluster.__file__).parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("pipeline.errors.PipelineError: RAY_TMPDIR: Ray cannot keep its files in "), finished.stderr
    assert "Not a directory: " in last and last.endswith("set RAY_TMPDIR to a folder that can be written and has space")
