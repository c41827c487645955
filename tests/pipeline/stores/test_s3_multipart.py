"""Objects of several parts: seen whole or not at all, whatever happens to a part, to the end, or to the source."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest

from pipeline.errors import StorageAccessError, StorageError
from pipeline.stores import s3_multipart
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.s3_multipart import SMALLEST_PART_BYTES
from pipeline.stores.s3_store import S3Store
from tests.faulty_proxy import Answer, Delay, FaultyProxy, LoseAnswer, LoseRequest, s3_error
from tests.fixtures_s3 import S3Server
from tests.pipeline.storage_checks import OUR_SIDE, check_one_line, keys_of

MIB = 1 << 20


def unfinished(store: S3Store) -> list[str]:
    """Ids of the uploads that were begun and neither completed nor aborted."""
    bucket, prefix = store.uri.removeprefix("s3://").split("/")
    client = boto3.session.Session().client("s3")  # the default session keeps the first credentials
    uploads: list[dict[str, Any]] = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    client.close()
    return [upload["UploadId"] for upload in uploads if upload["Key"].startswith(f"{prefix}/")]


@pytest.fixture(autouse=True)
def no_upload_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    store = request.getfixturevalue("s3_store") if "s3_store" in request.fixturenames else None
    yield
    assert store is None or unfinished(store) == []


@pytest.mark.parametrize("num_bytes", [0, 1, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 10 * MIB, 23 * MIB])
@pytest.mark.parametrize(
    ("s3", "chunk_bytes"),
    # How the bytes come to us does not reach the server.
    [("moto", None), ("moto", 1_000_003), ("moto", 11 * MIB), pytest.param("ceph", None, marks=pytest.mark.services)],
    indirect=["s3"],
)
def test_what_fits_into_one_part_is_one_put(
    s3_store: S3Store, proxy: FaultyProxy, num_bytes: int, chunk_bytes: int | None
) -> None:
    data = os.urandom(num_bytes)
    if chunk_bytes is None:
        s3_store.write("key", data)
    else:
        s3_store.write("key", (data[start : start + chunk_bytes] for start in range(0, num_bytes, chunk_bytes)))
    num_parts = -(-num_bytes // SMALLEST_PART_BYTES)
    methods = [request.method for request in proxy.requests]
    if num_parts <= 1:
        assert methods == ["PUT"]
    else:
        assert methods == ["POST", *["PUT"] * num_parts, "POST"]
    assert s3_store.read("key") == data
    version = s3_store.read_versioned("key")
    assert version.data == data and s3_store.replace("key", b"small", version.etag) is not None


@OUR_SIDE
def test_parts_are_sent_beside_each_other_and_few_are_in_memory(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """With senders held up, the source is asked for four parts, and no more before one is through."""
    asked = 0
    proxy.add(Delay(0.3), method="PUT", query="partNumber")

    def source() -> Iterator[bytes]:
        nonlocal asked
        for _ in range(8):
            asked += 1
            assert asked - sum(request.status == 200 for request in proxy.requests[1:]) <= 5, (
                "one more is being asked for"
            )
            yield os.urandom(SMALLEST_PART_BYTES)

    s3_store.write("key", source())
    stat = s3_store.stat("key")
    assert asked == 8 and stat is not None and stat.size_bytes == 8 * SMALLEST_PART_BYTES
    assert proxy.count(Delay) == 8


def test_parts_grow_so_that_ten_thousand_hold_five_tebibytes() -> None:
    sizes = [
        min(s3_multipart.PART_BYTES << number // s3_multipart._PARTS_OF_ONE_SIZE, s3_multipart.LARGEST_PART_BYTES)
        for number in range(10_000)
    ]
    assert sum(sizes) > 9.6 * 2**40 and max(sizes) <= 5 << 30


def test_growing_parts_are_the_whole_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_multipart, "_PARTS_OF_ONE_SIZE", 2)
    data = os.urandom(1000)
    parts = list(s3_multipart._parts_of([data[:3], b"", data[3:500], data[500:]], 10))
    assert [len(part) for part, _ in parts[:7]] == [10, 10, 20, 20, 40, 40, 80]
    assert b"".join(part for part, _ in parts) == data
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize(
    ("s3", "fault"),
    [
        ("moto", LoseAnswer()),
        pytest.param("ceph", LoseAnswer(), marks=pytest.mark.services),
        ("moto", LoseRequest()),
        ("moto", s3_error("InternalError", 500)),
    ],
    ids=["moto-a", "ceph-a", "moto-r", "moto-500"],
    indirect=["s3"],
)
def test_each_part_is_sent_again_by_itself(
    s3_store: S3Store, proxy: FaultyProxy, fault: LoseAnswer | LoseRequest | Answer
) -> None:
    data = os.urandom(16 * MIB)
    proxy.add(fault, query="partNumber=2", times=3)
    proxy.add(fault, query="partNumber=4", times=1)
    s3_store.write("key", data)
    assert s3_store.read("key") == data
    for number, times in ((1, 1), (2, 4), (3, 1), (4, 2)):
        assert sum(f"partNumber={number}" in request.query for request in proxy.requests) == times


def test_a_lost_answer_to_the_end_of_an_upload(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """Ceph remembers what it completed, moto forgets: its NoSuchUpload is compared with what is there."""
    data = os.urandom(11 * MIB)
    proxy.add(LoseAnswer(), method="POST", query="uploadId", times=1)
    s3_store.write("key", data)
    assert proxy.count(LoseAnswer) == 1 and s3_store.read("key") == data
    proxy.clear()
    proxy.add(LoseAnswer(), method="POST", query="uploadId", times=1)
    proxy.add(s3_error("NoSuchUpload", 404), method="POST", query="uploadId", times=1)
    s3_store.write("key", data[1:])
    assert proxy.requests[-1].method == "HEAD" and s3_store.read("key") == data[1:]


@OUR_SIDE
@pytest.mark.parametrize("present", ["nothing", "another of this size", "another size"])
def test_an_upload_that_somebody_removed_is_told(s3_store: S3Store, proxy: FaultyProxy, present: str) -> None:
    """The request to end it was lost, not its answer; then the upload is gone."""
    data = os.urandom(11 * MIB)
    if present != "nothing":
        s3_store.write("key", bytes(11 * MIB if present == "another of this size" else 12 * MIB))
    proxy.add(LoseAnswer(), method="POST", query="uploadId", times=0)
    proxy.add(LoseRequest(), method="POST", query="uploadId", times=1)
    proxy.add(s3_error("NoSuchUpload", 404), method="POST", query="uploadId", times=1)
    with pytest.raises(StorageAccessError) as caught:
        s3_store.write("key", data)
    check_one_line(caught.value, f"{s3_store.uri}/key", "NoSuchUpload", "unfinished uploads")


@OUR_SIDE
def test_an_error_under_a_good_status_is_no_success(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """S3 says 200 before it knows how the end of an upload goes."""
    data = os.urandom(11 * MIB)
    body = b"<Error><Code>InternalError</Code><Message>in the middle</Message></Error>"
    proxy.add(Answer(200, body), method="POST", query="uploadId", times=2)
    s3_store.write("key", data)
    assert proxy.count(Answer) == 2 and s3_store.read("key") == data


def test_nothing_is_seen_before_the_end(s3_store: S3Store, proxy: FaultyProxy) -> None:
    s3_store.write("key", b"old")
    seen: list[bytes] = []
    proxy.add(Delay(1.0), method="POST", query="uploadId")
    writer = threading.Thread(target=s3_store.write, args=("key", os.urandom(11 * MIB)))
    writer.start()
    while writer.is_alive():
        seen.append(s3_store.read("key"))
    assert len(seen) > 3 and {len(data) for data in seen} <= {3, 11 * MIB} and seen[0] == b"old"


def test_a_source_that_breaks_leaves_nothing(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """Nor does it wait for parts that an outage holds up."""

    def breaks() -> Iterator[bytes]:
        yield os.urandom(11 * MIB)
        raise RuntimeError("the source broke")

    proxy.add(s3_error("SlowDown", 503), query="partNumber")
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the source broke"):
        s3_store.write("key", breaks())
    assert proxy.requests[-1].method == "DELETE" and time.monotonic() - started_s < 100
    assert keys_of(s3_store) == []


@pytest.mark.parametrize(
    ("s3", "when"),
    [
        ("moto", "between parts"),
        pytest.param("ceph", "between parts", marks=pytest.mark.services),
        ("moto", "while parts are tried again"),
        ("moto", "while the end is tried again"),
    ],
    indirect=["s3"],
)
def test_an_upload_that_is_cancelled_leaves_nothing(s3_store: S3Store, proxy: FaultyProxy, when: str) -> None:
    cancellation = Cancellation()
    store = s3_store.with_cancellation(cancellation)

    def source() -> Iterator[bytes]:
        for number in range(6):
            if number == 3 and when == "between parts":
                cancellation.cancel()
            yield os.urandom(SMALLEST_PART_BYTES)

    if when == "while parts are tried again":
        proxy.add(s3_error("SlowDown", 503), query="partNumber")
    elif when == "while the end is tried again":
        proxy.add(s3_error("SlowDown", 503), method="POST", query="uploadId")
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(store.write, "key", source())
        if when != "between parts":
            while proxy.count(Answer) < 3:  # pytest's own limit ends a wait for nothing
                time.sleep(0.01)
            cancellation.cancel()
        with pytest.raises(CancelledWriteError):
            written.result()
    assert proxy.requests[-1].method == "DELETE" and keys_of(s3_store) == []
    num_parts = sum("partNumber" in request.query for request in proxy.requests)
    assert when != "between parts" or num_parts <= 3


@OUR_SIDE
def test_a_part_that_is_refused_leaves_nothing(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(s3_error("AccessDenied", 403), query="partNumber=2")
    with pytest.raises(StorageAccessError) as caught:
        s3_store.write("key", (os.urandom(MIB) for _ in range(40)))
    check_one_line(caught.value, f"{s3_store.uri}/key", "cannot write", "AccessDenied", "s3:PutObject")
    assert keys_of(s3_store) == []
    assert sum("partNumber" in request.query for request in proxy.requests) <= 5, "the others are not sent"


@OUR_SIDE
def test_an_upload_that_cannot_be_removed_says_why_it_failed(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, str(1 / 60))
    proxy.add(s3_error("AccessDenied", 403), method="DELETE")
    proxy.add(s3_error("SlowDown", 503), query="partNumber=2")
    with pytest.raises(StorageError, match="SlowDown"):
        s3_store.write("key", os.urandom(11 * MIB))
    assert proxy.requests[-1].method == "DELETE" and keys_of(s3_store) == []
    proxy.clear()
    (upload,) = unfinished(s3_store)
    bucket, prefix = s3_store.uri.removeprefix("s3://").split("/")
    client = boto3.session.Session().client("s3")
    client.abort_multipart_upload(Bucket=bucket, Key=f"{prefix}/key", UploadId=upload)
    client.close()


@pytest.mark.services
@pytest.mark.slow
def test_an_object_beyond_the_limit_of_one_put(ceph_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.1 GiB of which no two parts are equal, in parts of 64 MiB."""
    for name, value in ceph_server.environment.items():
        monkeypatch.setenv(name, value)
    store, written, num_chunks = S3Store(ceph_server.bucket, "large"), hashlib.sha256(), 653
    block = os.urandom(8 * MIB)

    def chunks() -> Iterator[bytes]:
        for number in range(num_chunks):
            chunk = number.to_bytes(8, "little") + block[8:]
            written.update(chunk)
            yield chunk

    store.write("key", chunks())
    stat = store.stat("key")
    assert stat is not None and stat.size_bytes == num_chunks * 8 * MIB > 5.1 * 2**30
    client = boto3.session.Session().client("s3")
    read = hashlib.sha256()
    for piece in client.get_object(Bucket=ceph_server.bucket, Key="large/key")["Body"].iter_chunks(MIB):
        read.update(piece)
    client.close()
    assert read.digest() == written.digest()
    store.delete("key")
