"""Outages of every kind, shorter and longer than the patience, and answers that break off."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from pipeline.errors import StorageAccessError, StorageError
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE_VARIABLE, num_waits
from pipeline.stores.s3_store import S3Store
from tests.faulty_proxy import (
    Answer,
    Cut,
    FaultyProxy,
    LoseAnswer,
    LoseRequest,
    RandomFaults,
    Stall,
    s3_error,
)
from tests.fixtures_s3 import S3Server
from tests.pipeline.storage_checks import OUR_SIDE, check_one_line, keys_of, tried_again_for_s, wait_for_pauses

REQUESTS: dict[str, Callable[[ObjectStore], object]] = {
    "read": lambda store: store.read("key"),
    "read_versioned": lambda store: store.read_versioned("key"),
    "write": lambda store: store.write("written", b"x"),
    "chunks": lambda store: store.write("large", [bytes(4 << 20)] * 3),
    "create": lambda store: store.create("created", b"x") or pytest.fail("it is ours"),
    "replace": lambda store: (
        store.replace("key", b"key", store.read_versioned("key").etag) or pytest.fail("it is ours")
    ),
    "list": keys_of,
    "stat": lambda store: store.stat("key") or pytest.fail("it is there"),
    "delete": lambda store: store.delete("key"),
    "delete_all": lambda store: store.delete_all(["key", "other"]),
}


@OUR_SIDE
@pytest.mark.parametrize("name", REQUESTS)
def test_an_outage_shorter_than_patience(s3_store: S3Store, proxy: FaultyProxy, name: str) -> None:
    """The server is down for more than one retry, and it is a lone request that finds it so."""
    s3_store.write("key", b"key")
    with ThreadPoolExecutor(1) as pool, proxy.down():
        asked = pool.submit(REQUESTS[name], s3_store)
        wait_for_pauses(4)
        assert not asked.done()
        proxy.up()
        asked.result()


@OUR_SIDE
def test_an_outage_longer_than_patience(s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each request, all of them beside each other."""
    s3_store.write("key", b"key")
    monkeypatch.setenv(PATIENCE_VARIABLE, str(2 / 60))  # a first attempt may take a second on a busy machine
    with proxy.down(), ThreadPoolExecutor(len(REQUESTS)) as pool:
        started_s = time.monotonic()
        errors = [future.exception() for future in [pool.submit(one, s3_store) for one in REQUESTS.values()]]
        assert 2 <= time.monotonic() - started_s < 100
    for name, error in zip(REQUESTS, errors):
        assert type(error) is StorageError, (name, error)
        check_one_line(error, s3_store.uri, "cannot", proxy.endpoint, "AWS_ENDPOINT_URL")
        assert tried_again_for_s(error) >= 2 and "AWS_ACCESS_KEY_ID" not in str(error)


OUTAGES = {
    "503": s3_error("SlowDown", 503),
    "500": s3_error("InternalError", 500),
    "502": Answer(502, b"<html>Bad Gateway</html>"),
    "504": Answer(504),
    "429": Answer(429),
    "lost request": LoseRequest(),
    "lost answer": LoseAnswer(),
    "stall": Stall(0.05),
}


@pytest.mark.parametrize(
    ("s3", "name"),
    [*(("moto", name) for name in OUTAGES), pytest.param("ceph", "lost answer", marks=pytest.mark.services)],
    indirect=["s3"],
)
def test_each_kind_of_outage_passes(s3_store: S3Store, proxy: FaultyProxy, name: str) -> None:
    fault = OUTAGES[name]
    s3_store.write("key", b"key")
    for request in REQUESTS.values():
        proxy.clear()
        proxy.add(fault, times=3)
        request(s3_store)
    assert proxy.count(type(fault)) == 3 * len(REQUESTS)


@OUR_SIDE
def test_a_server_that_says_nothing_is_left_after_a_minute(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this test's minutes, which have one second."""
    monkeypatch.setattr("pipeline.stores.s3_requests.READ_TIMEOUT_S", 1)
    monkeypatch.setenv("AWS_DEFAULT_OUTPUT", "json")  # clients are kept by their environment
    proxy.add(Stall(), times=2)
    assert s3_store.create("key", b"x") is True
    assert proxy.count(Stall) == 2


@OUR_SIDE
def test_a_storm_of_threads_waits_as_long_as_one(
    s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 threads against a server that is busy: each has its own patience, one of them says that it waits."""
    monkeypatch.setattr("pipeline.stores.patience._said_at_s", {})
    monkeypatch.setattr("pipeline.stores.patience._SILENT_S", 0.1)
    proxy.add(s3_error("SlowDown", 503), times=5 * 64)
    with ThreadPoolExecutor(64) as pool:
        done = list(pool.map(lambda number: s3_store.create(f"{number:02d}", b"%d" % number), range(64)))
    assert done == [True] * 64 and len(keys_of(s3_store)) == 64
    assert proxy.count(Answer) == 5 * 64
    said = [line for line in capsys.readouterr().out.splitlines() if "gives no answer" in line]
    assert len(said) == 1 and "SlowDown" in said[0] and "0.333 minutes" in said[0]


@OUR_SIDE
def test_the_number_of_attempts_is_not_botocores(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    proxy.add(s3_error("SlowDown", 503))
    with pytest.raises(StorageError, match="SlowDown") as caught:
        s3_store.write("key", b"x")
    assert len(proxy.requests) == 1 and "tried again" not in str(caught.value)


@OUR_SIDE
def test_less_patience_for_somebody_who_waits(s3_store: S3Store, proxy: FaultyProxy) -> None:
    hasty = s3_store.with_patience(0.5)
    started_s = time.monotonic()
    with proxy.down(), pytest.raises(StorageError):
        hasty.write("key", b"x")
    assert 0.5 <= time.monotonic() - started_s < 100
    hasty.write("key", b"x")
    assert s3_store.read("key") == b"x" and hasty.uri == s3_store.uri


@OUR_SIDE
@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_cancelled_is_waited_for_no_longer(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("pipeline.stores.patience._FIRST_PAUSE_S", 1000.0)  # up to the end of patience, 20 s
    monkeypatch.setattr("pipeline.stores.patience._LONGEST_PAUSE_S", 1000.0)
    proxy.add(s3_error("SlowDown", 503))
    cancellation = Cancellation()
    store = s3_store.with_cancellation(cancellation)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(REQUESTS[name], store)
        while proxy.count(Answer) == 0:  # pytest's own limit ends a wait for nothing
            time.sleep(0.01)
        cancellation.cancel()
        with pytest.raises(CancelledWriteError):
            asked.result()
    proxy.clear()
    num_before = len(proxy.requests)
    with pytest.raises(CancelledWriteError):
        REQUESTS[name](store)
    assert len(proxy.requests) == num_before, "nothing more is asked"
    s3_store.write("key", b"of somebody else")
    assert s3_store.read("key") == b"of somebody else"


@OUR_SIDE
def test_a_refusal_is_told_whether_or_not_it_is_cancelled(s3_store: S3Store, proxy: FaultyProxy) -> None:
    cancellation = Cancellation()

    class Cancelling(Answer):
        def suits(self, request: object) -> bool:
            cancellation.cancel()  # while the request is under way
            return True

    proxy.add(Cancelling(403, s3_error("AccessDenied", 403).body, s3_error("AccessDenied", 403).headers))
    with pytest.raises(StorageAccessError, match="AccessDenied"):
        s3_store.with_cancellation(cancellation).write("key", b"x")


@pytest.mark.parametrize("reset", [False, True])
def test_a_body_that_breaks_off_is_gone_on_with(s3_store: S3Store, proxy: FaultyProxy, reset: bool) -> None:
    """A server that cuts every answer after 100,000 bytes gives a megabyte in eleven of them, without a pause."""
    data = os.urandom(1 << 20)
    s3_store.write("key", data)
    proxy.add(Cut(after_bytes=100_000, reset=False), method="GET")
    if reset:  # what was on its way is lost with the connection
        proxy.clear()
        proxy.add(Cut(after_bytes=100_000, reset=True), method="GET", times=3)
    num_before = len(proxy.requests)
    assert s3_store.read("key") == data
    assert len(proxy.requests) - num_before <= 11 if not reset else proxy.count(Cut) == 3


def test_another_version_in_the_middle_is_read_from_its_start(s3_store: S3Store, proxy: FaultyProxy) -> None:
    old, new = os.urandom(300_000), os.urandom(300_000)
    s3_store.write("key", old)
    direct = boto3.session.Session().client("s3", endpoint_url=proxy.upstream, region_name=os.environ["AWS_REGION"])
    _, _, bucket, prefix = s3_store.uri.split("/")

    class Overtaken(Answer):
        def suits(self, request: object) -> bool:
            # Between the first part and the request for the rest.
            direct.put_object(Bucket=bucket, Key=f"{prefix}/key", Body=new)
            return True

    proxy.add(Cut(after_bytes=100_000), method="GET", times=1)
    proxy.add(Overtaken(503, s3_error("SlowDown", 503).body), method="GET", times=1)
    found = s3_store.read_versioned("key")
    assert found == s3_store.read_versioned("key") and found.data == new
    assert proxy.count(Cut) == 1 and proxy.count(Answer) == 1


@OUR_SIDE
def test_a_server_that_cannot_send_ranges(s3_store: S3Store, proxy: FaultyProxy) -> None:
    """Answers 200 with the whole object; one that says another version under 206 is no better."""
    data = os.urandom(300_000)
    s3_store.write("key", data)
    headers = [("ETag", s3_store.read_versioned("key").etag)]
    proxy.add(Cut(after_bytes=100_000), method="GET", times=1)
    proxy.add(Answer(200, data, headers), method="GET", times=1)
    assert s3_store.read("key") == data
    proxy.clear()
    other = [("ETag", '"another"'), ("Content-Range", "bytes 100000-299999/300000")]
    proxy.add(Cut(after_bytes=100_000), method="GET", times=1)
    proxy.add(Answer(206, bytes(200_000), other), method="GET", times=1)
    assert s3_store.read("key") == data
    assert proxy.count(Cut) == 2 and proxy.count(Answer) == 2


@OUR_SIDE
def test_a_server_that_never_gets_farther_is_given_up(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.write("key", bytes(1 << 20))
    monkeypatch.setenv(PATIENCE_VARIABLE, str(1 / 60))
    proxy.add(Cut(after_bytes=5000), method="GET", times=1)
    proxy.add(Cut(after_bytes=0), method="GET")
    with pytest.raises(StorageError) as caught:
        s3_store.read("key")
    check_one_line(caught.value, f"{s3_store.uri}/key", "broke off, 1043576 bytes", "network")
    assert tried_again_for_s(caught.value) >= 1


def test_a_fifth_of_all_requests_fails(s3_store: S3Store, proxy: FaultyProxy) -> None:
    data = os.urandom(12 << 20)
    kinds = [LoseAnswer(), LoseRequest(), s3_error("InternalError", 500), s3_error("SlowDown", 503), Cut(1000)]
    proxy.add(RandomFaults(seed=0, share=0.2, kinds=kinds))

    def work(number: int) -> bool:
        created = s3_store.create(f"{number}/record", b"%d" % number)
        s3_store.write(f"{number}/large", data[number:])
        etag = s3_store.replace(f"{number}/record", b"new", s3_store.read_versioned(f"{number}/record").etag)
        return created and etag is not None and s3_store.read(f"{number}/large") == data[number:]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))
    proxy.clear()
    assert len(keys_of(s3_store)) == 24 and all(s3_store.read(f"{number}/record") == b"new" for number in range(12))
    faults = [request.fault for request in proxy.requests if request.fault is not None]
    assert len(faults) > 10 and {type(fault) for fault in faults} >= {LoseAnswer, LoseRequest, Answer}


class MetadataService(ThreadingHTTPServer):
    """Of a machine with a role; may be away at first."""

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), MetadataRequest)
        self.is_away, self.variables = True, variables
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class MetadataRequest(BaseHTTPRequestHandler):
    server: MetadataService

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_PUT(self) -> None:
        self.answer(b"token")

    def do_GET(self) -> None:
        role = {
            "Code": "Success",
            "AccessKeyId": self.server.variables["AWS_ACCESS_KEY_ID"],
            "SecretAccessKey": self.server.variables["AWS_SECRET_ACCESS_KEY"],
            "Token": "",
            "Expiration": "2100-01-01T00:00:00Z",
        }
        self.answer(b"role" if self.path.endswith("/") else json.dumps(role).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(503 if self.server.is_away else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def metadata(
    s3_server: S3Server, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[MetadataService]:
    """A metadata service, away, and no other source of credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with MetadataService(s3_server.environment) as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{service.server_port}")
        yield service
        service.shutdown()


@OUR_SIDE
def test_a_metadata_service_that_is_away_is_waited_for(metadata: MetadataService, s3_store: S3Store) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(s3_store.write, "key", b"x")
        wait_for_pauses(2)
        assert not asked.done()
        metadata.is_away = False
        asked.result()


@OUR_SIDE
def test_credentials_that_come_late_are_found(
    metadata: MetadataService, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stores.s3_requests._METADATA_PATIENCE_S", 0.3)
    started_s = time.monotonic()
    with pytest.raises(StorageAccessError) as caught:
        s3_store.write("key", b"x")
    assert 0.3 <= time.monotonic() - started_s < 100
    check_one_line(caught.value, s3_store.uri, "credentials", "AWS_ACCESS_KEY_ID", "metadata service")
    metadata.is_away = False
    s3_store.write("key", b"x")


@OUR_SIDE
def test_nobody_without_keys_waits(
    metadata: MetadataService, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    before = num_waits()
    with pytest.raises(StorageAccessError, match="AWS_ACCESS_KEY_ID"):
        s3_store.write("key", b"x")
    assert num_waits() == before
