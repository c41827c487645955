"""Each row of the table, provoked: by a real database, disk or socket, or by an answer as a server gives it."""

import re
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import sqlalchemy
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.errors import TrackingUnavailableError
from pipeline.redact import redact
from pipeline.stores.causes import cause_of
from pipeline.tracking.mlflow_causes import MLFLOW_CAUSES, describe, failure_of, is_outage, mlflow_cause, refusal
from pipeline.tracking.mlflow_client import connect, mlflow_errors
from tests.faulty_proxy import Answer, Cut, Fault, FaultyProxy, LoseRequest, Stall

# As Flask answers for a page that it does not have; an MLflow 2.22.5 server says so of /logged-models.
NOT_FOUND_PAGE = (
    b"<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n<p>The requested URL was not "
    b"found on the server. If you entered the URL manually please check your spelling and try again.</p>\n"
)


class Place:
    """Where a fault is made."""

    def __init__(self, folder: Path, database: Path, stack: ExitStack) -> None:
        self.folder, self.database, self._stack = folder, database, stack

    def uri(self, fault: Fault) -> str:
        """A server to which every request suffers the fault; a password is in its address."""
        proxy = self._stack.enter_context(FaultyProxy("http://127.0.0.1:9"))
        proxy.add(fault)
        return proxy.endpoint.replace("://", "://me:secret-word@")

    def listen(self, serve: Callable[[socket.socket], None]) -> int:
        """A port at which one connection is served."""
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True).start()
        return int(listener.getsockname()[1])


def _ask(fault: Fault) -> Callable[[Place], object]:
    return lambda place: connect(place.uri(fault)).search_experiments(max_results=1)


def _answer(status: int, body: bytes = b"") -> Callable[[Place], object]:
    return _ask(Answer(status, body))


def _full_disk_here(_: Place) -> None:
    with Path("/dev/full").open("w") as disk:
        disk.write("a model")


def _upload(root: str, fault: Fault) -> Callable[[Place], None]:
    def upload(place: Place) -> None:
        (place.folder / "model.json").write_text("{}")
        get_artifact_repository(root, tracking_uri=place.uri(fault)).log_artifact(str(place.folder / "model.json"))

    return upload


def _file_as_folder(place: Place) -> None:
    (place.folder / "file").write_text("")
    _upload(f"{(place.folder / 'file').as_uri()}/artifacts", Answer(500))(place)


def _other_schema(place: Place) -> None:
    shutil.copy(place.database, place.folder / "old.db")
    with sqlite3.connect(place.folder / "old.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'ff01dab36901'")
    database.close()
    connect(f"sqlite:///{place.folder}/old.db").search_experiments()


def _unknown_run(place: Place) -> None:
    shutil.copy(place.database, place.folder / "mlflow.db")
    connect(f"sqlite:///{place.folder}/mlflow.db").get_run("f00")


def _locked_database(place: Place) -> None:
    holder = sqlite3.connect(place.folder / "locked.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        engine = sqlalchemy.create_engine(f"sqlite:///{place.folder}/locked.db", connect_args={"timeout": 0.1})
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE t (x)"))
    finally:
        holder.close()


def _full_database(place: Place) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{place.folder}/full.db")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("PRAGMA max_page_count = 1"))
        connection.execute(sqlalchemy.text("CREATE TABLE t (x)"))
        connection.execute(sqlalchemy.text("CREATE TABLE u (x)"))


def _unopened_database(place: Place) -> None:
    sqlalchemy.create_engine(f"sqlite:///{place.folder}/no/folder.db").connect()


def _postgres_answers(message: str) -> Callable[[Place], object]:
    """As a Postgres server refuses a connection, to its real client."""

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(8)  # the question for TLS
            connection.sendall(b"N")
            connection.recv(1000)
            fields = b"".join(
                f"{kind}{text}\0".encode() for kind, text in (("S", "FATAL"), ("C", "28P01"), ("M", message))
            )
            connection.sendall(b"E" + struct.pack(">i", 4 + len(fields) + 1) + fields + b"\0")

    def ask(place: Place) -> object:
        uri = f"postgresql+psycopg2://me:secret-word@127.0.0.1:{place.listen(serve)}/db"
        return sqlalchemy.create_engine(uri).connect()

    return ask


def _strange_certificate(place: Place) -> None:
    key, certificate = place.folder / "key.pem", place.folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client leaves
            context.wrap_socket(connection, server_side=True)

    connect(f"https://localhost:{place.listen(serve)}").search_experiments()


def _plain_http(place: Place) -> None:
    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    connect(f"https://127.0.0.1:{place.listen(serve)}").search_experiments()


def _redirect_for_ever(place: Place) -> None:
    class Loop(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "/again")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Loop) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            connect(f"http://127.0.0.1:{server.server_port}").search_experiments()
        finally:
            server.shutdown()


def _closed_port(place: Place) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        connect(f"http://me:secret-word@127.0.0.1:{taken.getsockname()[1]}").search_experiments()


def _logged_models(fault: Fault) -> Callable[[Place], object]:
    return lambda place: connect(place.uri(fault)).create_logged_model("0")


def _error(code: str, message: str) -> bytes:
    return f'{{"error_code": "{code}", "message": "{message}"}}'.encode()


def _tag_a_model(fault: Fault) -> Callable[[Place], object]:
    """MLflow's client calls whatever goes wrong here a wrong parameter."""
    return lambda place: connect(place.uri(fault)).set_logged_model_tags("m-0", {"a": "b"})


FULL = "(sqlite3.OperationalError) database or disk is full"
HOST = "Invalid Host header - possible DNS rebinding attack detected"

CASES: list[tuple[str, Callable[[Place], object], str]] = [
    ("disk full", _full_disk_here, "No space left on device"),
    ("disk full", _full_database, "database or disk is full"),
    ("disk full", _answer(503, _error("TEMPORARILY_UNAVAILABLE", FULL)), f"HTTP 503: {re.escape(FULL)}"),
    ("disk full", _answer(507, b"quota"), "HTTP 507: quota"),
    ("database of another MLflow version", _other_schema, "Detected out-of-date database schema"),
    ("request refused", _unknown_run, "Run with id=f00 not found"),
    ("request refused", _answer(400, _error("INVALID_PARAMETER_VALUE", "max_results")), "max_results"),
    (
        "request refused",
        _logged_models(Answer(404, _error("RESOURCE_DOES_NOT_EXIST", "no experiment"))),
        "no experiment",
    ),
    ("host name not allowed", _answer(403, HOST.encode()), f"HTTP 403: {HOST}"),
    ("credentials refused", _answer(401, b"You are not authenticated."), "HTTP 401: You are not authenticated."),
    ("permission denied", _answer(403, b"Permission denied"), "HTTP 403: Permission denied"),
    ("permission denied", _answer(403, _error("PERMISSION_DENIED", "not yours")), "not yours"),
    ("too large", _answer(413, b"<h1>413 Request Entity Too Large</h1>"), "HTTP 413: 413 Request Entity Too Large"),
    ("server too old", _logged_models(Answer(404, NOT_FOUND_PAGE)), "HTTP 404: Not Found The requested URL was not"),
    ("certificate not trusted", _strange_certificate, "certificate verify failed"),
    ("no TLS there", _plain_http, "SSL.*wrong version number"),
    ("database refuses the login", _postgres_answers('password authentication failed for user "me"'), "password"),
    ("database cannot be used", _unopened_database, "unable to open database file"),
    ("database cannot be used", _postgres_answers('database "db" does not exist'), "does not exist"),
    ("database locked or away", _locked_database, "database is locked"),
    ("database locked or away", _postgres_answers("the database system is starting up"), "is starting up"),
    (
        "database locked or away",
        lambda _: sqlalchemy.create_engine("postgresql+psycopg2://me:secret-word@127.0.0.1:9/db").connect(),
        "Connection refused",
    ),
    (
        "artifact store fails",
        _upload("mlflow-artifacts:/1", Answer(500, b"Internal Server Error")),
        "HTTP 500: Internal",
    ),
    ("artifact folder cannot be used", _file_as_folder, "Not a directory|File exists"),
    ("too many requests", _answer(429, b"slow down"), "HTTP 429: slow down"),
    ("too many requests", _upload("mlflow-artifacts:/1", Answer(429)), "too many 429"),
    ("server fails", _answer(500, _error("INTERNAL_ERROR", "boom")), "HTTP 500: boom"),
    ("server fails", _answer(502, b"<html><title>502</title><h1>Bad Gateway</h1></html>"), "HTTP 502: Bad Gateway$"),
    ("server fails", _answer(503), "503"),
    ("server fails", _answer(504, b"upstream"), "HTTP 504: upstream"),
    ("server fails", _answer(408), "408"),
    ("no answer", _closed_port, "Connection refused"),
    ("no answer", lambda _: connect("http://no-such-host.invalid:1").search_experiments(), "not known|resolution"),
    ("no answer", _ask(Stall()), "timed out"),
    ("no answer", _ask(LoseRequest()), "closed|aborted|reset"),
    ("no answer", _tag_a_model(LoseRequest()), "closed|aborted|reset"),
    ("server fails", _tag_a_model(Answer(503, b"busy")), "HTTP 503: busy"),
    ("permission denied", _tag_a_model(Answer(403, b"Permission denied")), "HTTP 403: Permission denied"),
    ("request refused", _tag_a_model(Answer(404, _error("RESOURCE_DOES_NOT_EXIST", "no model"))), "no model"),
    ("it answers, but not as MLflow does", _answer(404, NOT_FOUND_PAGE), "HTTP 404: Not Found"),
    ("it answers, but not as MLflow does", _answer(200, b"<html>welcome</html>"), "welcome"),
    ("it answers, but not as MLflow does", _answer(405), "HTTP 405"),
    ("it answers, but not as MLflow does", _answer(501), "HTTP 501"),
    ("not possible", _redirect_for_ever, "redirects"),
    ("not possible", _answer(403, b'{"detail": "the proxy says no"}'), "the proxy says no"),
]


@pytest.fixture
def place(migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with ExitStack() as stack:
        yield Place(tmp_path, migrated_database, stack)


@pytest.mark.parametrize(("name", "provoke", "words"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES])
def test_each_cause(name: str, provoke: Callable[[Place], object], words: str, place: Place) -> None:
    with pytest.raises(Exception) as caught:
        provoke(place)
    error = caught.value
    cause = mlflow_cause(error)
    assert cause.name == name
    assert re.search(words, describe(error)), describe(error)
    assert is_outage(error) == cause.passes
    assert (refusal(error) is not None) == (name == "request refused")
    with pytest.raises(TrackingUnavailableError) as told, mlflow_errors("http://me:secret-word@server:5000"):
        raise error
    message = str(told.value)
    assert message.startswith(f"MLflow at http://***@server:5000: {name} (")
    assert message.endswith(f"; {cause.advice}")
    assert describe(error) in message
    assert "\n" not in message and "secret" not in message and len(message) < 500
    # What was said once is said again by whoever wraps it: a later classification finds the same cause.
    assert mlflow_cause(told.value) is cause


def test_every_row_has_a_case() -> None:
    assert {cause.name for cause in MLFLOW_CAUSES} == {name for name, _, _ in CASES}
    assert len({cause.name for cause in MLFLOW_CAUSES}) == len(MLFLOW_CAUSES)


def test_what_passes() -> None:
    assert {cause.name for cause in MLFLOW_CAUSES if cause.passes} == {
        "database locked or away",
        "artifact store fails",
        "too many requests",
        "server fails",
        "no answer",
    }


def test_an_answer_that_breaks_off_is_no_answer(place: Place, migrated_database: Path) -> None:
    body = b'{"experiments": []}'
    upstream = place._stack.enter_context(FaultyProxy("http://127.0.0.1:9"))
    upstream.add(Answer(200, body))
    proxy = place._stack.enter_context(FaultyProxy(upstream.endpoint))
    proxy.add(Cut(len(body) // 2))
    with pytest.raises(Exception) as caught:
        connect(proxy.endpoint).search_experiments(max_results=1)
    assert mlflow_cause(caught.value).name == "no answer"


def test_an_error_of_our_own_is_no_outage() -> None:
    failure = failure_of(ValueError("http://me:secret-word@host is odd"))
    assert failure.reason == "http://***@host is odd"
    assert cause_of(failure, MLFLOW_CAUSES).name == "not possible"
    assert redact(failure.reason) == failure.reason
