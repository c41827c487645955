"""Where MLflow is, and what is said when it is not there."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, TrackingUnavailableError
from pipeline.redact import redact
from pipeline.tracking import mlflow_client
from pipeline.tracking.mlflow_client import tracking_uri
from pipeline.tracking.tracking import TrackingConfig, check_server, resolve_tracking


def test_where_runs_go_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/artifacts/mlflow.db"
    assert resolve_tracking(TrackingConfig()).uri == f"sqlite:///{tmp_path}/artifacts/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="sqlite:///x/y.db")) == f"sqlite:///{tmp_path}/x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingConfig()) == "http://server:5000"
    assert tracking_uri(TrackingConfig(uri="https://other")) == "https://other"
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


def _closed_port(_: Path) -> Iterator[str]:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def _silent_port(_: Path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://me:secret-word@127.0.0.1:{listener.getsockname()[1]}"


def _web_page(_: Path) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>\nwelcome</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _no_database(folder: Path) -> Iterator[str]:
    (folder / "notes.txt").write_text("not a database, but a text of some length")
    yield f"sqlite:///{folder}/notes.txt"


def _no_folder(folder: Path) -> Iterator[str]:
    (folder / "file").write_text("")
    yield f"sqlite:///{folder}/file/mlflow.db"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (_closed_port, "Connection refused"),
        (_silent_port, "timed out"),
        (_web_page, "answers, but not as MLflow does"),
        (_no_database, "no SQLite database"),
        (_no_folder, "File exists|Not a directory"),
        (lambda _: iter(["http://no-such-host.invalid:5000"]), "Name or service not known|name resolution"),
        (lambda _: iter(["ftp://somewhere"]), "no MLflow address"),
        (lambda _: iter(["file:///mlruns"]), "no MLflow address"),
        (lambda _: iter(["mlruns"]), "no MLflow address"),
        # MLflow tries a database ten times before it says what is wrong.
        (lambda _: iter(["postgresql+psycopg2://me:secret-word@127.0.0.1:9/db"]), "no answer within 1 s"),
    ],
)
def test_a_server_that_does_not_answer_is_one_line(
    place: Callable[[Path], Iterator[str]], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mlflow_client._ANSWER_S < mlflow_client._CHECK_S <= 10, "seconds that an operator is kept waiting"
    monkeypatch.setattr(mlflow_client, "_ANSWER_S", 1)
    monkeypatch.setattr(mlflow_client, "_CHECK_S", 1 if reason.startswith("no answer") else 60)
    before = dict(os.environ)
    uris = place(tmp_path)
    uri = next(uris)
    with pytest.raises(TrackingUnavailableError, match=reason) as caught:
        check_server(TrackingConfig(uri=uri))
    message = str(caught.value)
    assert redact(uri) in message
    assert "secret-word" not in message
    assert "\n" not in message
    assert len(message) < 400
    assert list(uris) == []
    changed = {name for name in os.environ.keys() | before.keys() if os.environ.get(name) != before.get(name)}
    assert changed <= set(mlflow_client._ENVIRONMENT), "the short time limits of the check are gone again"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    # While MLflow tries the database, for 100 s, whoever opens another in this process waits.
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 0)
    for thread in threading.enumerate():
        if thread.name == "mlflow-check":
            thread.join()


STORED = "http://***@server:5000"


def test_a_uri_read_back_from_a_stored_text_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    message = (
        r"^tracking.uri: 'http://\*\*\*@server:5000' was stored without .* --tracking.uri or in MLFLOW_TRACKING_URI$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve_tracking(TrackingConfig(uri=STORED))
    for other in ("http://me:secret-word@elsewhere:5000", "http://server:5000", STORED):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        with pytest.raises(ConfigError, match=message):
            resolve_tracking(TrackingConfig(uri=STORED))
    whole = "http://me:secret-word@server:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert tracking_uri(TrackingConfig(uri=STORED)) == whole
    monkeypatch.setenv("MLFLOW_TRACKING_URI", STORED)
    with pytest.raises(ConfigError, match=message):
        tracking_uri(TrackingConfig())


@pytest.mark.parametrize(
    "uri",
    [
        "me:secret-word@server:5000",
        "http:/me:secret-word@server",
        "postgresql:me:secret-word@server",
        "http://me:secret word@server",
        'http://me:secret"word@server',
    ],
)
def test_a_password_that_could_not_be_told_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    rule = r": user and password must stand after ://.*, got \*\*\*@server(:5000)?; write the URI so$"
    with pytest.raises(ValueError, match="^uri" + rule) as given:
        TrackingConfig(uri=uri)
    with pytest.raises(ConfigError, match="^MLFLOW_TRACKING_URI" + rule) as inherited:
        tracking_uri(TrackingConfig())
    assert "secret" not in str(given.value) + str(inherited.value)


def test_a_configuration_does_not_show_its_uri() -> None:
    assert "server" not in repr(TrackingConfig(uri="http://me:secret-word@server"))
