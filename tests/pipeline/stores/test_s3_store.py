"""What only S3 can do wrong: credentials, buckets, answers cut short or lost. The contract: test_object_store.py."""

import os
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipeline.errors import StorageAccessError, StorageError
from pipeline.redact import redact
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.faulty_proxy import Answer, Cut, FaultyProxy, LoseAnswer, s3_error
from tests.fixtures_s3 import faulty_endpoint
from tests.pipeline.storage_checks import check_one_line, keys_of


def test_listing_skips_markers_and_reads_what_others_wrote(s3: str) -> None:
    prefix = uuid.uuid4().hex
    client = boto3.session.Session().client("s3")  # the default session keeps the credentials of the first server
    bucket = s3.removeprefix("s3://")
    for key in (
        f"{prefix}/",
        f"{prefix}/folder/",
        f"{prefix}/folder//double",
        f"{prefix}/folder/key",
        f"{prefix}-other",
    ):
        client.put_object(Bucket=bucket, Key=key, Body=b"" if key.endswith("/") else b"x")
    client.close()
    store = open_store(f"{s3}/{prefix}")
    assert keys_of(store) == ["folder//double", "folder/key"]
    assert store.read("folder//double") == b"x"


def test_wrong_secret_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_SECRET_ACCESS_KEY")


def test_unknown_access_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_ACCESS_KEY_ID")


def test_missing_bucket(s3: str) -> None:
    refused_everywhere(open_store("s3://no-such-bucket-here/x"), "NoSuchBucket", "check the bucket")


def test_impossible_bucket_name(s3: str) -> None:
    refused_everywhere(open_store("s3://Not_A_Bucket!/x"), "Not_A_Bucket!")


def test_credentials_from_a_shared_file(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What README shows for clusters: the job's environment, which others can read, names a file of the nodes."""
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    lines = [f"{name.lower()} = {os.environ[name]}" for name in names]
    (tmp_path / "aws").write_text("\n".join(["[default]", *lines, ""]))
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    store.write("key", b"data")
    assert store.read("key") == b"data"
    (tmp_path / "aws").write_text("[default]\naws_access_key_id = AKIAUNKNOWN\naws_secret_access_key = wrong\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/./aws")  # clients are kept by their environment
    refused_everywhere(store, "AWS_ACCESS_KEY_ID")


def test_the_password_of_an_endpoint_is_not_told(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for endpoint in ("http://me:secret-word@127.0.0.1:9", "http://me:secret/word@127.0.0.1:9", "me:secret-word@h"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match="AWS_ENDPOINT_URL") as caught:
            open_store(f"{s3}/x").read("key")
        assert "secret" not in str(caught.value)
        own_chain = "".join(traceback.format_exception(caught.value))
        assert "secret" not in redact(own_chain), "what --traceback prints"


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    refused_everywhere(open_store(f"{s3}/x"), "set AWS_ACCESS_KEY_ID")


def refused_everywhere(store: ObjectStore, *parts: str) -> None:
    for attempt in (
        lambda: store.read("key"),
        lambda: store.write("key", b"x"),
        lambda: store.create("key", b"x"),
        lambda: store.stat("key"),
        lambda: store.delete("key"),
        lambda: keys_of(store),
    ):
        with pytest.raises(StorageAccessError) as caught:
            attempt()
        check_one_line(caught.value, store.uri, *parts)


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the server, in use."""
    with faulty_endpoint() as proxy:
        yield proxy


@pytest.mark.parametrize("reset", [False, True])
def test_answers_cut_short_are_read_again(s3: str, proxy: FaultyProxy, reset: bool) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    data = os.urandom(1 << 20)
    store.write("key", data)
    proxy.add(Cut(5000, reset=reset), method="GET", times=2)
    assert store.read("key") == data
    assert proxy.count(Cut) == 2


def test_an_answer_that_never_completes_is_one_clear_line(
    s3: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    store.write("key", bytes(1 << 20))
    proxy.add(Cut(5000), method="GET")
    with pytest.raises(StorageError) as caught:
        store.read("key")
    check_one_line(caught.value, f"{store.uri}/key", "no complete answer after all retries")
    assert proxy.count(Cut) == 6


def test_busy_answers_are_retried(s3: str, proxy: FaultyProxy) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    proxy.add(s3_error("SlowDown", 503), times=2)
    assert store.create("key", b"data") is True
    assert store.read("key") == b"data" and proxy.count(Answer) == 2


def test_a_lost_answer_to_create_leaves_our_bytes(s3: str, proxy: FaultyProxy) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    proxy.add(LoseAnswer(), method="PUT", times=1)
    assert store.create("key", b"ours") is False  # it cannot know who was first
    assert proxy.count(LoseAnswer) == 1 and store.read("key") == b"ours"
