"""What only S3 can do wrong: credentials, buckets, lost answers. The contract: test_object_store.py."""

import os
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from pipeline.errors import StorageAccessError, StorageError
from pipeline.redact import redact
from pipeline.stores.object_store import ObjectStore, Versioned
from pipeline.stores.s3_store import S3Store
from pipeline.stores.storage import open_store
from tests.faulty_proxy import Answer, Fault, FaultyProxy, LoseAnswer, LoseRequest, Stall, s3_error
from tests.pipeline.storage_checks import OUR_SIDE, check_one_line, keys_of, wait_for_pauses


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


def test_a_browser_is_told_what_it_may_show(s3: str) -> None:
    """Else it saves a page instead of showing it, and refuses its style."""
    media_types = {
        "index.html": "text/html; charset=utf-8",
        "gallery/view.js": "text/javascript",
        "gallery/gallery.css": "text/css",
        "gallery/icon.svg": "image/svg+xml",
        "gallery/00.webp": "image/webp",
        "contact_sheet.png": "image/png",
        "a.html/shard.tar": "binary/octet-stream",
    }
    prefix, client = uuid.uuid4().hex, boto3.session.Session().client("s3")
    for key in media_types:
        open_store(f"{s3}/{prefix}").write(key, b"x")
    told = {
        key: client.head_object(Bucket=s3.removeprefix("s3://"), Key=f"{prefix}/{key}")["ContentType"]
        for key in media_types
    }
    client.close()
    assert told == media_types


def test_wrong_secret_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_SECRET_ACCESS_KEY")


def test_unknown_access_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_ACCESS_KEY_ID")


def test_missing_bucket(s3: str) -> None:
    refused_everywhere(open_store("s3://no-such-bucket-here/x"), "cannot", "NoSuchBucket", "check the bucket")


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
    monkeypatch.setenv("DDPM_PATIENCE_MINUTES", "0")
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


@pytest.mark.parametrize("fault", [LoseAnswer(), Stall(0.05, reaches_server=True)])
def test_a_lost_answer_to_create_is_no_conflict(s3_store: S3Store, proxy: FaultyProxy, fault: Fault) -> None:
    proxy.add(fault, method="PUT", times=1)
    assert s3_store.create("key", b"ours") is True
    assert proxy.count(type(fault)) == 1 and s3_store.read("key") == b"ours"
    assert [request.method for request in proxy.requests[:3]] == ["PUT", "PUT", "GET"]


def test_a_lost_answer_before_anothers_create_is_a_conflict(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """Which comes to the server while our second attempt is on its way there."""
    direct = boto3.session.Session().client("s3", endpoint_url=proxy.upstream, region_name=os.environ["AWS_REGION"])
    _, _, bucket, prefix = s3_store.uri.split("/")

    class Overtaken(Fault):
        def suits(self, request: object) -> bool:
            direct.put_object(Bucket=bucket, Key=f"{prefix}/key", Body=b"another's")
            return False

    proxy.add(LoseRequest(), method="PUT", times=1)
    proxy.add(Overtaken(), method="PUT")
    assert s3_store.create("key", b"ours") is False and s3_store.read("key") == b"another's"
    assert [request.method for request in proxy.requests[:2]] == ["PUT"] * 2 and proxy.count(LoseRequest) == 1
    direct.close()


@OUR_SIDE
def test_an_object_that_is_gone_after_a_lost_answer_is_not_ours(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(LoseAnswer(), method="PUT", times=1)
    proxy.add(s3_error("PreconditionFailed", 412), method="PUT", times=1)
    proxy.add(s3_error("NoSuchKey", 404), method="GET", times=1)
    assert s3_store.create("key", b"ours") is False


def test_a_conflict_without_a_lost_answer_is_one_request(s3_store: S3Store, proxy: FaultyProxy) -> None:
    assert s3_store.create("key", b"equal") is True
    assert s3_store.create("key", b"equal") is False
    assert s3_store.replace("key", b"equal", '"0123456789abcdef0123456789abcdef"') is None
    assert [request.method for request in proxy.requests] == ["PUT"] * 3


def test_a_server_that_was_never_reached_did_nothing(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """So a 412 after that is another's, though the bytes are equal."""
    s3_store.create("key", b"equal")
    with proxy.down(), ThreadPoolExecutor(1) as pool:
        again = pool.submit(s3_store.create, "key", b"equal")
        wait_for_pauses(1)
        assert not again.done()
        proxy.up()
        assert again.result() is False
    assert [request.method for request in proxy.requests] == ["PUT"] * 2


@OUR_SIDE
@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_of_the_moment_is_tried_again(s3_store: S3Store, proxy: FaultyProxy, code: str) -> None:
    proxy.add(s3_error(code, 409), method="PUT", times=2)
    assert s3_store.create("key", b"ours") is True
    proxy.clear()
    proxy.add(s3_error(code, 409), method="PUT", times=2)
    assert s3_store.replace("key", b"new", s3_store.read_versioned("key").etag) is not None
    proxy.clear()
    proxy.add(s3_error(code, 409), method="PUT", times=1)
    assert s3_store.create("key", b"new") is False
    assert [request.method for request in proxy.requests[-2:]] == ["PUT"] * 2, "409 says that it was not done"


@pytest.mark.parametrize("fault", [LoseAnswer(), Stall(0.05, reaches_server=True)])
def test_a_lost_answer_to_replace_is_no_conflict(s3_store: S3Store, proxy: FaultyProxy, fault: Fault) -> None:
    s3_store.create("key", b"first")
    before = s3_store.read_versioned("key")
    proxy.add(fault, method="PUT", times=1)
    etag = s3_store.replace("key", b"second", before.etag)
    assert etag is not None and s3_store.read_versioned("key") == Versioned(data=b"second", etag=etag)
    assert proxy.count(type(fault)) == 1
    assert s3_store.replace("key", b"third", etag) is not None


def test_a_lost_answer_before_anothers_replace_is_a_conflict(s3_store: S3Store, proxy: FaultyProxy) -> None:
    s3_store.create("key", b"first")
    before = s3_store.read_versioned("key")
    s3_store.write("key", b"another's")
    proxy.add(LoseRequest(), method="PUT", times=1)
    assert s3_store.replace("key", b"ours", before.etag) is None
    s3_store.delete("key")
    proxy.add(LoseRequest(), method="PUT", times=1)
    assert s3_store.replace("key", b"ours", before.etag) is None
    assert proxy.count(LoseRequest) == 2 and s3_store.stat("key") is None


@OUR_SIDE
def test_a_server_without_conditions_is_refused_at_once(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(s3_error("NotImplemented", 501), method="PUT")
    for attempt in (lambda: s3_store.create("key", b"x"), lambda: s3_store.replace("key", b"x", "etag")):
        with pytest.raises(StorageAccessError) as caught:
            attempt()
        check_one_line(caught.value, "NotImplemented", "If-None-Match", "use another store")
    assert len(proxy.requests) == 2


@OUR_SIDE
def test_the_reason_of_a_head_is_asked_for(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """Its answer has no body that could tell; with a listing allowed, the object alone is closed."""
    s3_store.write("key", b"x")
    proxy.add(Answer(403), method="HEAD")
    with pytest.raises(StorageAccessError) as caught:
        s3_store.stat("key")
    check_one_line(caught.value, "403", "s3:GetObject")
    proxy.clear()
    proxy.add(Answer(400), method="HEAD")
    proxy.add(s3_error("ExpiredToken", 400), method="GET")
    with pytest.raises(StorageAccessError, match="ExpiredToken"):
        s3_store.stat("key")


@OUR_SIDE
def test_a_listing_asks_for_each_page_again(s3_store: S3Store, proxy: FaultyProxy) -> None:
    keys = [f"{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: s3_store.write(key, b""), keys))
    num_before = len(proxy.requests)
    proxy.add(LoseAnswer(), method="GET", times=1)
    proxy.add(s3_error("SlowDown", 503), method="GET", query="continuation-token", times=2)
    assert keys_of(s3_store) == keys
    assert len(proxy.requests) - num_before == 5, "two pages, three faults"


def write_some(store: S3Store, number: int) -> list[str]:
    keys = [f"{index:04d}" for index in range(number)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    return keys


def test_a_thousand_keys_are_deleted_with_one_request(s3_store: S3Store, proxy: FaultyProxy) -> None:
    keys = write_some(s3_store, 12)
    before = len(proxy.requests)
    s3_store.delete_all(key for key in [*keys, *(f"never/{index}" for index in range(1988))])
    assert [(one.method, "delete" in one.query) for one in proxy.requests[before:]] == [("POST", True)] * 2
    assert keys_of(s3_store) == []


@pytest.mark.parametrize("fault", [s3_error("NotImplemented", 501), s3_error("InvalidRequest", 400)])
def test_a_server_that_knows_no_such_request_is_asked_for_each(
    s3_store: S3Store, proxy: FaultyProxy, fault: Fault
) -> None:
    keys = write_some(s3_store, 5)
    proxy.add(fault, method="POST", query="delete")
    s3_store.delete_all(keys)
    assert keys_of(s3_store) == []


def test_what_is_refused_among_many_is_told_by_its_name(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """The answer leaves two keys out, as it does with those that may not be deleted."""
    keys = write_some(s3_store, 5)
    body = "".join(f"<Deleted><Key>{s3_store.uri.rpartition('/')[2]}/{key}</Key></Deleted>" for key in keys[:3])
    left = "".join(
        f"<Error><Key>{s3_store.uri.rpartition('/')[2]}/{key}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        for key in keys[3:]
    )
    answer = Answer(200, f"<DeleteResult>{body}{left}</DeleteResult>".encode(), (("Content-Type", "application/xml"),))
    proxy.add(answer, method="POST", query="delete")
    proxy.add(s3_error("AccessDenied", 403), method="DELETE", path=keys[4])
    with pytest.raises(StorageAccessError, match=r"0004: cannot delete: AccessDenied.*s3:DeleteObject"):
        s3_store.delete_all(keys)
    assert keys_of(s3_store) == [*keys[:3], keys[4]], "the fourth went by itself; the proxy kept the first three"


def test_an_outage_while_many_are_deleted_is_waited_for(s3_store: S3Store, proxy: FaultyProxy) -> None:
    keys = write_some(s3_store, 5)
    proxy.add(s3_error("SlowDown", 503), method="POST", query="delete", times=2)
    proxy.add(LoseAnswer(), method="POST", query="delete", times=1)
    s3_store.delete_all(keys)
    assert keys_of(s3_store) == []
    assert [one.method for one in proxy.requests if "delete" in one.query] == ["POST"] * 4
