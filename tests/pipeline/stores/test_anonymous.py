"""Reading without credentials, as from a public bucket: none are looked for, none are sent."""

import os
import pickle
import uuid
from pathlib import Path

import boto3
import pytest

from jobs import prepare_data
from jobs.cli import run_job
from pipeline.errors import StorageAccessError, StorageError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.storage import open_store
from tests.faulty_proxy import FaultyProxy, s3_error
from tests.fixtures_s3 import S3Server
from tests.pipeline.storage_checks import check_one_line, keys_of


def forget_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(folder / "none"))


def ask_everything(store: ObjectStore) -> None:
    for attempt in (lambda: store.read("key"), lambda: keys_of(store), lambda: store.stat("key")):
        with pytest.raises(StorageError):
            attempt()


def test_no_credentials_are_looked_for_and_none_are_sent(
    faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    faulty_s3.add(s3_error("AccessDenied", 403))
    uri = "s3://ddpm-tests/anonymous"
    anonymous = open_store(uri, is_anonymous=True)
    ask_everything(open_store(uri))
    assert faulty_s3.requests and all(request.is_signed for request in faulty_s3.requests), "there are credentials"
    num_before = len(faulty_s3.requests)
    # as it travels to a task, and as it is handed to whoever waits
    for store in (anonymous, pickle.loads(pickle.dumps(anonymous)), anonymous.with_patience(5.0)):  # noqa: S301
        ask_everything(store)
    forget_credentials(monkeypatch, tmp_path)
    ask_everything(anonymous)
    later = faulty_s3.requests[num_before:]
    assert len(later) >= 12 and not any(request.is_signed for request in later)
    with pytest.raises(StorageAccessError) as caught:
        open_store(uri).read("key")
    check_one_line(caught.value, "set AWS_ACCESS_KEY_ID", "--anonymous-source")


@pytest.mark.services
def test_a_public_bucket_is_read_by_everybody_and_written_by_none(
    ceph_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in ceph_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"public-{uuid.uuid4().hex}"
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=bucket, ACL="public-read")
    client.put_object(Bucket=bucket, Key="a/1.png", Body=b"data", ACL="public-read")
    client.put_object(Bucket=bucket, Key="a/private.png", Body=b"data")
    client.close()
    open_store(f"{ceph_server.uri}/anonymous").write("key", b"data")
    forget_credentials(monkeypatch, tmp_path)
    assert "AWS_ACCESS_KEY_ID" not in os.environ
    store = open_store(f"s3://{bucket}/a", is_anonymous=True)
    assert keys_of(store) == ["1.png", "private.png"] and store.read("1.png") == b"data"
    stat = store.stat("1.png")
    assert stat is not None and stat.size_bytes == 4
    for attempt in (
        lambda: store.read("private.png"),
        lambda: store.write("new", b"x"),
        lambda: store.create("new", b"x"),
    ):
        with pytest.raises(StorageAccessError) as caught:
            attempt()
        check_one_line(caught.value, store.uri, "leave out --anonymous-source")
    with pytest.raises(StorageAccessError):
        open_store(f"{ceph_server.uri}/anonymous", is_anonymous=True).read("key")
    flags = ["--source", store.uri, "--dataset", str(tmp_path), "--image-size", "8", "--held-out-fraction", "0"]
    assert run_job(prepare_data.JOB, [*flags, "--anonymous-source", "--dry-run"]) == 0
    assert run_job(prepare_data.JOB, [*flags, "--dry-run"]) == 1, "no credentials"
