"""Real S3 servers, as processes: moto for every run, Ceph for the tests marked `services`. Both check credentials."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests.faulty_proxy import FaultyProxy

SCRIPT = Path(__file__).with_name("s3server.sh")
BUCKET = "ddpm-tests"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server with one bucket."""

    uri: str
    """s3:// and the bucket."""
    endpoint: str
    """http://127.0.0.1:port."""
    environment: dict[str, str]
    """What a client needs: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ..."""

    @property
    def bucket(self) -> str:
        return self.uri.removeprefix("s3://")


@contextlib.contextmanager
def running_s3(kind: str, folder: Path) -> Iterator[S3Server]:
    """Start a server on a free loopback port with the programs of this interpreter's environment; stop it by pid."""
    script = ["bash", str(SCRIPT)]
    environment = os.environ | {"S3_VENV": sys.prefix}
    with (folder / "start.log").open("w+") as log:  # not a pipe: the servers would keep it open
        started = subprocess.run(
            [*script, "start", str(folder), "--kind", kind],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.seek(0)
        assert started.returncode == 0, f"{kind} does not start:\n{log.read()}"
    try:
        words = [shlex.split(line)[1] for line in started.stdout.splitlines()]
        variables = dict(word.split("=", 1) for word in words)
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
            region_name=variables["AWS_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield S3Server(uri=f"s3://{BUCKET}", endpoint=variables["AWS_ENDPOINT_URL"], environment=variables)
    finally:
        subprocess.run([*script, "stop", str(folder)], check=True, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto, with its environment exported for the rest of the session."""
    with running_s3("moto", tmp_path_factory.mktemp("moto")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A Ceph of one node (installed from Debian when missing); its environment is not exported."""
    with running_s3("ceph", tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture
def s3_bucket_environment(ceph_server: S3Server) -> dict[str, str]:
    """What a job needs to use the Ceph server, and "bucket": an existing bucket's name."""
    return ceph_server.environment | {"bucket": ceph_server.bucket}


@contextlib.contextmanager
def faulty_endpoint() -> Iterator[FaultyProxy]:
    """A proxy in front of the server that the environment names, named there in its place.

    S3Store keeps a client per AWS_* environment: one made before keeps talking to the server itself.
    """
    names = ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, proxy.endpoint)
        yield proxy


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy in front of moto, in use; its faults are asked for with `add`."""
    with faulty_endpoint() as proxy:
        yield proxy
