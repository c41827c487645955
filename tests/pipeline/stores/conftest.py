"""Stores of every kind, empty, and the S3 servers behind them."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.s3_multipart import SMALLEST_PART_BYTES
from pipeline.stores.s3_store import S3Store
from pipeline.stores.storage import ObjectStore, open_store
from tests.faulty_proxy import FaultyProxy
from tests.fixtures_s3 import S3Server, faulty_endpoint
from tests.pipeline.storage_checks import CEPH

SERVERS = ["moto", CEPH]


@pytest.fixture(params=["local", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty store of every kind; S3 takes no smaller parts than these."""
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    bucket = s3_uri(request, monkeypatch).removeprefix("s3://")
    return S3Store(bucket, uuid.uuid4().hex, part_bytes=SMALLEST_PART_BYTES)


def s3_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "moto" else "ceph_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.uri


@pytest.fixture(params=SERVERS)
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an S3 bucket."""
    return s3_uri(request, monkeypatch)


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the server, in use; a patience of 20 s, with pauses below half a second."""
    monkeypatch.setattr("pipeline.stores.patience._FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("pipeline.stores.patience._LONGEST_PAUSE_S", 0.4)
    monkeypatch.setenv(PATIENCE_VARIABLE, str(20 / 60))
    with faulty_endpoint() as proxy:
        yield proxy


@pytest.fixture
def s3_store(s3: str, proxy: FaultyProxy) -> S3Store:
    """An empty store behind the proxy, with the smallest parts."""
    return S3Store(s3.removeprefix("s3://"), uuid.uuid4().hex, part_bytes=SMALLEST_PART_BYTES)
