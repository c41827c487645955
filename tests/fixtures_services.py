"""Real servers for the tests marked `services`: Postgres, MLflow on it, a Ray cluster of two nodes.

Everything listens on 127.0.0.1 and is stopped by the process that was started. What Debian packages lack is installed
as root (Postgres). The Ray nodes run from an environment that holds the dependencies and not this project, as a
cluster's image does: the project reaches them only as the working directory of a job.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running cluster's addresses and the environment that its callers need."""

    job_address: str
    python: Path
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], *, environment: dict[str, str], log: Path, ready: Callable[[], bool], timeout_s: float = 120
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process in a process group of its own, ready to answer; the group is ended afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert process.poll() is None, f"{command[0]} ended:\n{log.read_text(errors='replace')[-3000:]}"
            assert time.monotonic() < deadline, f"{command[0]} not ready:\n{log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def connects(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _postgres_programs() -> Path:
    def newest() -> Path | None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        return found[-1].parent if found else None

    if newest() is None:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql"]
        subprocess.run(install, check=True, env=environment)
    programs = newest()
    assert programs is not None
    return programs


@pytest.fixture(scope="session")
def postgres_uri() -> Iterator[str]:
    """An empty database of a Postgres server, with a password."""
    programs = _postgres_programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other users
    data, password, port = folder / "data", secrets.token_hex(12), free_port()
    data.mkdir()
    password_file = folder / "password"
    password_file.write_text(password)
    as_owner: list[str] = []
    if os.geteuid() == 0:  # Postgres refuses to run as root
        for path in (folder, data, password_file):
            shutil.chown(path, "postgres", "postgres")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    initdb = [
        str(programs / "initdb"),
        "-D",
        str(data),
        "-U",
        "ddpm",
        "-A",
        "scram-sha-256",
        f"--pwfile={password_file}",
    ]
    subprocess.run([*as_owner, *initdb], check=True, capture_output=True, cwd="/")
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
    with running([*as_owner, *command], environment=dict(os.environ), log=folder / "log", ready=lambda: connects(port)):
        yield f"postgresql+psycopg2://ddpm:{password}@127.0.0.1:{port}/postgres"


@contextlib.contextmanager
def mlflow_server(
    backend_uri: str,
    artifacts: str,
    folder: Path,
    *,
    port: int | None = None,
    environment: dict[str, str] | None = None,
    app: str | None = None,
) -> Iterator[str]:
    """An MLflow server that proxies its artifacts; yields its URI."""
    port = port or free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend_uri,
        "--artifacts-destination", artifacts, "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        *(["--app-name", app] if app else []),
    ]  # fmt: skip
    full = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | (environment or {})
    with running(command, environment=full, log=folder / f"mlflow-{port}.log", ready=lambda: answers(f"{uri}/health")):
        yield uri


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an MLflow server for all tests that leave it as it is, each with names of its own."""
    folder = tmp_path_factory.mktemp("served")
    with mlflow_server(f"sqlite:///{folder}/server.db", str(folder / "artifacts"), folder) as uri:
        yield uri


def dependencies_only_python(folder: Path) -> Path:
    """A Python with this environment's packages but without the editable install of this project."""
    environment = folder / "dependencies"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    place = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # A path that a .pth file adds does not have its own .pth files read: the editable install stays out.
    (Path(place) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = subprocess.run([str(python), "-c", "import ray, pipeline"], capture_output=True, text=True, cwd="/")
    assert "No module named 'pipeline'" in found.stderr, found.stderr
    return python


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head and one more node, two logical CPUs each, that demand a token."""
    folder = tmp_path_factory.mktemp("cluster")
    python, port, dashboard = dependencies_only_python(folder), free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",  # as long as a checkpoint may take
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # the `python` of a job's entry point
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    start = [
        str(python),
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--num-cpus=2",
        "--object-store-memory=400000000",
    ]
    # A node's agent, which starts jobs, listens on a fixed port unless told: another Ray on this machine has it.
    head = [
        *start, "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-port={dashboard}",
        f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}",  # short: sockets lie in it
    ]  # fmt: skip
    node = [
        *start, f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip

    def nodes_alive() -> bool:
        code = (
            "from ray.util.state import list_nodes; import sys;"
            f"sys.exit(sum(n.state == 'ALIVE' for n in list_nodes('http://127.0.0.1:{dashboard}')) != 2)"
        )
        return subprocess.run([str(python), "-c", code], env=environment, capture_output=True).returncode == 0

    job_address = f"http://127.0.0.1:{dashboard}"
    with (
        running(head, environment=environment, log=folder / "head.log", ready=lambda: connects(dashboard)),
        running(node, environment=environment, log=folder / "node.log", ready=nodes_alive),
    ):
        yield RayCluster(job_address=job_address, python=python, environment=environment)
