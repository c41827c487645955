"""Every row of the table of causes, by really provoking it: the server's own words, the advice, the class."""

import dataclasses
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.errors import ObjectMissingError, StorageAccessError, StorageError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.s3_causes import S3_CAUSES
from pipeline.stores.s3_store import S3Store
from pipeline.stores.storage import open_store
from tests.faulty_proxy import Answer, Cut, Fault, FaultyProxy, LoseAnswer, s3_error
from tests.fixtures_s3 import S3Server, faulty_endpoint
from tests.pipeline.storage_checks import check_one_line, keys_of

HTML = b"<html><head><title>It works!</title></head><body><h1>It works!</h1></body></html>"


@dataclasses.dataclass
class Place:
    """What a case may change."""

    patch: pytest.MonkeyPatch
    proxy: FaultyProxy
    folder: Path
    stack: ExitStack
    server: str
    """The server behind the proxy."""

    def fault(self, fault: Fault) -> None:
        self.proxy.add(fault)

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)

    def no_keys(self) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            self.patch.delenv(name)
        self.set(AWS_CONFIG_FILE=self.file("config", ""), AWS_SHARED_CREDENTIALS_FILE=self.file("credentials", ""))

    def file(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)


def read(store: ObjectStore) -> object:
    return store.read("key")


def write(store: ObjectStore) -> None:
    store.write("key", b"x")


def create(store: ObjectStore) -> bool:
    return store.create("key", b"x")


@dataclasses.dataclass(frozen=True)
class Case:
    cause: str
    """The row."""
    provoke: Callable[[Place], object]
    words: tuple[str, ...]
    """The server's, or the network's, own."""
    ask: Callable[[ObjectStore], object] = read
    bucket: str | None = None
    is_anonymous: bool = False


def answers(
    code: str, status: int, cause: str, ask: Callable[[ObjectStore], object] = read, *, is_anonymous: bool = False
) -> Case:
    fault = s3_error(code, status, f"{code} in the server's words")
    words = (code, "in the server's words")
    return Case(cause, lambda place: place.fault(fault), words, ask, is_anonymous=is_anonymous)


@contextmanager
def tls_server(folder: Path) -> Iterator[str]:
    """A server whose certificate nobody knows."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"https://localhost:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def untrusted(place: Place) -> None:
    place.set(AWS_ENDPOINT_URL=place.stack.enter_context(tls_server(place.folder)))


def without_scheme(place: Place) -> None:
    place.set(AWS_ENDPOINT_URL=place.proxy.endpoint.removeprefix("http://"))


def behind_a_proxy(place: Place) -> None:
    """One that is away; clients are kept by their AWS_ variables."""
    place.set(http_proxy="http://127.0.0.1:1", no_proxy="", NO_PROXY="", AWS_DEFAULT_OUTPUT="text")


def profile(place: Place, text: str) -> None:
    place.no_keys()
    place.set(AWS_CONFIG_FILE=place.file("config", text))


WITHOUT_LENGTH = Answer(200, b"x", (("ETag", '"x"'), ("Transfer-Encoding", "chunked")))

CASES = [
    Case("endpoint without scheme", without_scheme, ("AWS_ENDPOINT_URL is no URL",)),
    Case("endpoint without scheme", lambda place: place.set(AWS_ENDPOINT_URL="localhost:9000"), ("is no URL",)),
    Case("endpoint without scheme", lambda place: place.set(AWS_ENDPOINT_URL="ftp://h:1"), ("ftp",)),
    Case("certificate not trusted", untrusted, ("certificate verify failed", "https://localhost")),
    Case(
        "no TLS there",
        lambda place: place.set(AWS_ENDPOINT_URL=place.server.replace("http:", "https:")),
        ("SSL", "https://127.0.0.1"),
    ),
    Case(
        "no certificate file",
        lambda place: (untrusted(place), place.set(AWS_CA_BUNDLE="/nowhere/ca.pem")),
        ("No such file",),
    ),
    Case("cannot be reached", lambda place: place.stack.enter_context(place.proxy.down()), ("http://127.0.0.1:",)),
    Case(
        "cannot be reached",
        lambda place: place.set(AWS_ENDPOINT_URL="http://no-such-host.invalid:9000"),
        ("no-such-host.invalid",),
    ),
    Case("cannot be reached", behind_a_proxy, ("proxy",)),
    Case("no complete answer", lambda place: place.fault(LoseAnswer()), ("closed",)),
    Case("no complete answer", lambda place: place.fault(Cut(after_bytes=0)), ("broke off", "bytes are missing")),
    Case("no credentials", Place.no_keys, ("Unable to locate credentials",)),
    Case("no credentials", lambda place: place.patch.delenv("AWS_SECRET_ACCESS_KEY"), ("Partial credentials",)),
    Case(
        "credentials not handed out",
        lambda place: (place.no_keys(), place.set(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://127.0.0.1:1")),
        ("credentials", "container-role"),
    ),
    Case(
        "credential_process fails",
        lambda place: profile(place, "[default]\ncredential_process = false\n"),
        ("credentials", "custom-process"),
    ),
    Case("unknown profile", lambda place: place.set(AWS_PROFILE="nobody"), ("nobody", "could not be found")),
    Case("configuration file", lambda place: profile(place, "no configuration\n"), ("Unable to parse config file",)),
    Case("bucket name impossible", lambda place: None, ("Not_A_Bucket!",), bucket="Not_A_Bucket!"),
    answers("InvalidBucketName", 400, "bucket name impossible"),
    Case("another library error", lambda place: place.set(AWS_STS_REGIONAL_ENDPOINTS="x"), ("STS regional",)),
    answers("XMinioStorageFull", 507, "server full", write),
    answers("QuotaExceeded", 403, "server full", write),
    answers("InsufficientStorage", 507, "server full", write),
    answers("NotImplemented", 501, "not implemented", create),
    answers("ConditionalRequestConflict", 409, "conflict at this moment", create),
    answers("OperationAborted", 409, "conflict at this moment", write),
    answers("SlowDown", 503, "busy"),
    answers("InternalError", 500, "busy"),
    answers("TooManyRequests", 429, "busy"),
    answers("RequestTimeout", 400, "busy", write),
    Case("busy, not in S3's words", lambda place: place.fault(Answer(502, HTML)), ("502", "Bad Gateway")),
    # botocore takes what is no XML for an answer that was cut
    Case("busy, not in S3's words", lambda place: place.fault(Answer(200, b"It works!")), ("500",), keys_of),
    Case("access key unknown", lambda place: place.set(AWS_ACCESS_KEY_ID="AKIANOBODY"), ("InvalidAccessKeyId",)),
    Case("secret key wrong", lambda place: place.set(AWS_SECRET_ACCESS_KEY="wrong"), ("SignatureDoesNotMatch",)),
    answers("ExpiredToken", 400, "token expired"),
    answers("InvalidToken", 400, "token expired"),
    answers("RequestTimeTooSkewed", 403, "clocks differ"),
    answers("AccessDenied", 403, "not public", is_anonymous=True),
    answers("AccessDenied", 403, "not public", keys_of, is_anonymous=True),
    answers("AccessDenied", 403, "may not read"),
    answers("AccessDenied", 403, "may not read", keys_of),
    answers("AccessDenied", 403, "may not write", write),
    answers("AccessDenied", 403, "may not write", lambda store: store.delete("key")),
    Case("no bucket", lambda place: None, ("NoSuchBucket",), bucket="no-such-bucket-here"),
    Case("no bucket", lambda place: None, ("NoSuchBucket",), lambda store: store.stat("key"), "no-such-bucket-here"),
    answers("PermanentRedirect", 301, "another region"),
    Case("another region", lambda place: place.fault(Answer(301, HTML)), ("301",)),
    answers("AuthorizationHeaderMalformed", 400, "another region"),
    answers("NoSuchUpload", 404, "upload gone", write),
    Case("not S3", lambda place: place.fault(Answer(200, HTML)), ("HTTP 200",)),
    Case("not S3", lambda place: place.fault(Answer(200, HTML)), ("HTTP 200",), keys_of),
    Case("not S3", lambda place: place.fault(WITHOUT_LENGTH), ("HTTP 200", "ContentLength")),
    Case("not S3", lambda place: place.fault(Answer(200, b"")), ("HTTP 200",), write),
    Case("not S3", lambda place: place.fault(Answer(404, HTML)), ("404",)),
    Case("not S3", lambda place: place.fault(Answer(404, b"no XML")), ("404",), lambda store: store.stat("key")),
    Case("not S3", lambda place: place.fault(Answer(405, b"no XML")), ("405", "Method Not Allowed"), write),
    answers("MalformedXML", 400, "refused", write),
]


def test_every_row_has_a_case() -> None:
    assert {cause.name for cause in S3_CAUSES} == {case.cause for case in CASES}
    assert len({cause.name for cause in S3_CAUSES}) == len(S3_CAUSES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.cause}: {case.words[0]}")
def test_a_cause_is_told(case: Case, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cause = next(cause for cause in S3_CAUSES if cause.name == case.cause)
    monkeypatch.setattr("pipeline.stores.patience._FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(PATIENCE_VARIABLE, str(0.2 / 60))
    with faulty_endpoint() as proxy, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        S3Store("ddpm-tests", "causes").write("key", b"some bytes")
        num_before = len(proxy.requests)
        case.provoke(Place(patch, proxy, tmp_path, stack, s3_server.endpoint))
        store = S3Store(case.bucket or "ddpm-tests", "causes", is_anonymous=case.is_anonymous)
        with pytest.raises(StorageError) as caught:
            case.ask(store)
        num_requests = len(proxy.requests) - num_before
    assert type(caught.value) is (StorageError if cause.passes else StorageAccessError)
    check_one_line(caught.value, f"{store.uri}", "cannot ", *case.words, cause.advice)
    assert str(caught.value).endswith(f"; {cause.advice}")
    told = str(caught.value).lower()
    assert told.index(case.words[0].lower()) < told.index(cause.advice.lower()), "own words come first"
    assert cause.passes or "tried again for" not in told
    assert num_requests <= 2 or cause.passes, "what does not pass is asked once"
    assert "AWS_ACCESS_KEY_ID" not in str(caught.value) or case.cause in (
        "no credentials", "access key unknown", "not public",
    )  # fmt: skip


def test_a_missing_key_is_no_fault(s3_server: object) -> None:
    with pytest.raises(ObjectMissingError):
        open_store("s3://ddpm-tests/causes").read("missing")


def test_a_certificate_that_is_named_is_trusted(
    s3_server: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the row would be there for whatever ends a TLS connection."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    with tls_server(tmp_path) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        with pytest.raises(StorageError) as caught:
            open_store("s3://ddpm-tests/causes").read("key")
    assert type(caught.value) is StorageError and "certificate" not in str(caught.value)


def test_no_cause_tells_a_secret(s3_server: object, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    with pytest.raises(StorageError) as caught:
        open_store("s3://ddpm-tests/causes").read("key")
    assert secret not in str(caught.value)
