"""Where MLflow is, whether it answers, and a quiet client for it.

Which files import mlflow is listed in tests/test_doors.py. All but models/sampler_model.py do so inside functions,
because that takes a second.
"""

import contextlib
import functools
import logging
import os
import re
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tenacity

from pipeline.errors import ConfigError, PipelineError, TrackingUnavailableError
from pipeline.redact import is_redacted, redact
from pipeline.stores.patience import patiently
from pipeline.tracking.client_retry import use_in_mlflow
from pipeline.tracking.mlflow_causes import MLFLOW_VARIABLES, describe, explain, is_outage

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SCHEMES = frozenset({"http", "https", "sqlite", "postgresql", "mysql", "mssql"})
_CHECK_S = 9.0
_ANSWER_S = 8
_FOREIGN = frozenset({"boto3", "botocore", "mlflow", "requests", "sqlalchemy", "urllib3"})
_SQLITE_START = b"SQLite format 3\0"

# Few and short attempts inside MLflow's client: the queue does the waiting. Whoever sets a variable is heard.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs and models are recorded."""

    uri: str | None = field(default=None, repr=False)
    """MLflow tracking URI (http://..., sqlite:///..., postgresql://...). None: the variable MLFLOW_TRACKING_URI, else
    the SQLite file artifacts/mlflow.db. User and password in it are used, but neither shown nor stored."""
    experiment: str = "ddpm"
    """Name of the MLflow experiment; made if there is none."""

    def __post_init__(self) -> None:
        """Check the experiment's name, and that a password in the URI stands where it can be told."""
        if self.uri is not None and (rule := _broken_rule(self.uri)):
            raise ValueError(f"uri: {rule}")
        if not self.experiment.strip():
            raise ValueError(f"experiment: must not be empty, got {self.experiment!r}")


def tracking_uri(config: TrackingConfig) -> str:
    """The URI that a config stands for; a relative SQLite path becomes absolute, since workers run in other folders.

    Raises:
        TrackingUnavailableError: If the URI's scheme is none that MLflow's servers and databases have.
        ConfigError: If it was stored, and so without its password, and the environment does not have the whole of it;
            or if the environment's is malformed.
    """
    in_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if in_environment and (rule := _broken_rule(in_environment)):
        raise ConfigError(f"MLFLOW_TRACKING_URI: {rule}")
    uri = config.uri or in_environment or "sqlite:///artifacts/mlflow.db"
    if is_redacted(uri):
        if in_environment is None or is_redacted(in_environment) or redact(in_environment) != uri:
            raise ConfigError(
                f"tracking.uri: {uri!r} was stored without its user and password, which are needed; give the whole "
                "of it by --tracking.uri or in MLFLOW_TRACKING_URI"
            )
        uri = in_environment
    scheme = uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else ""
    if scheme not in _SCHEMES:
        raise TrackingUnavailableError(
            f"tracking.uri: {uri!r} is no MLflow address; give http://host:port, https://... or sqlite:///file.db"
        )
    prefix, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator and path:
        return f"{prefix}:///{Path(path).expanduser().absolute()}"
    return uri


def _broken_rule(uri: str) -> str | None:
    """What is wrong with an address that has an "@" and is no URI, so that `redact` could not tell its password."""
    if "@" not in uri or uri.startswith("sqlite:") or ("://" in uri and not re.search(r"[\s\"]", uri)):
        return None
    shown = f"***@{uri.rpartition('@')[2]}"
    return f"user and password must stand after :// and be encoded (%20 for a space), got {shown}; write the URI so"


def resolve_tracking(config: TrackingConfig) -> TrackingConfig:
    """The config with its URI spelt out, for processes that have another folder or environment."""
    return replace(config, uri=tracking_uri(config))


def check_server(config: TrackingConfig) -> None:
    """Make sure, within 10 seconds, that MLflow answers; a new SQLite file is made with its tables.

    Raises:
        TrackingUnavailableError: If nothing answers, or something that is not MLflow, or it refuses the credentials.
    """
    uri = tracking_uri(config)
    error = probe(uri)
    if error is not None:
        raise error if isinstance(error, PipelineError) else unavailable(uri, error) from error


def probe(uri: str) -> Exception | None:
    """Why MLflow gives no usable answer within 10 seconds; None if it gives one."""
    failures: list[Exception] = []
    _set_defaults()

    def ask() -> None:
        try:
            connect(uri).search_experiments(max_results=1)
        except Exception as error:
            failures.append(error)

    with environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(_ANSWER_S)):
        thread = threading.Thread(target=ask, name="mlflow-check", daemon=True)  # a database may hang for minutes
        thread.start()
        thread.join(None if uri.startswith("sqlite") else _CHECK_S)
    if thread.is_alive():
        return TimeoutError(f"no answer within {_CHECK_S:.0f} s")
    return failures[0] if failures else None


@functools.cache
def connect(uri: str) -> "MlflowClient":
    """A quiet MLflow client; one per URI and process. It is thread-safe."""
    _set_defaults()
    if uri.startswith("sqlite:///"):
        _prepare_sqlite(uri)
    with warnings.catch_warnings():  # SQLAlchemy deprecates what MLflow does
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        use_in_mlflow()
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turns what MLflow raises in the block into TrackingUnavailableError with one line."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        foreign = type(error).__module__.partition(".")[0] in _FOREIGN
        if not foreign and not isinstance(error, OSError):
            raise
        raise unavailable(uri, error) from error


def waiting_for(uri: str) -> tenacity.Retrying:
    """Calls a function again for as long as MLflow is away, up to $DDPM_PATIENCE_MINUTES; raises its last error."""
    return patiently(is_outage, f"MLflow at {redact(uri)}", describe=describe)


def find_model_version(config: TrackingConfig, name: str, tag: str, value: str) -> int | None:
    """The newest version of a registered model that has a tag with this value, whichever run made it.

    Raises:
        TrackingUnavailableError: If the server does not answer.
    """
    uri = tracking_uri(config)
    with mlflow_errors(uri):
        versions = connect(uri).search_model_versions(f"name = '{name}'")
    return max((int(version.version) for version in versions if version.tags.get(tag) == value), default=None)


def _set_defaults() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Each retry of a request would be a line on the terminal; what comes of it is reported once, by whoever asked.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _prepare_sqlite(uri: str) -> None:
    """Makes the folder, and finds within no time what MLflow would retry for ten seconds."""
    file = Path(uri.removeprefix("sqlite:///"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") if file.exists() else contextlib.nullcontext() as stream:
            start = stream.read(len(_SQLITE_START)) if stream else b""
    except OSError as error:
        raise unavailable(uri, error) from error
    if start and start != _SQLITE_START:
        raise TrackingUnavailableError(f"MLflow at {uri}: the file is no SQLite database; correct {MLFLOW_VARIABLES}")
    if not all(os.access(place, os.W_OK) for place in (file, file.parent) if place.exists()):
        raise TrackingUnavailableError(f"MLflow at {uri}: it may not be written; correct {MLFLOW_VARIABLES}")


def has_tables(uri: str) -> bool:
    """Whether MLflow has made its tables in an SQLite file; False where there is no file. Nothing is made or changed.

    Args:
        uri: sqlite:///file.
    """
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not file.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            asked = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'registered_models'")
            return asked.fetchone() is not None
    except sqlite3.Error:
        return True  # no database, or locked: MLflow's answer says which


def unavailable(uri: str, error: BaseException, what: str | None = None) -> TrackingUnavailableError:
    """The error for a server without a usable answer: `what` failed, or the server; cause, its own words, advice."""
    return TrackingUnavailableError(f"{what or f'MLflow at {uri}'}: {explain(error)}")


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables set for the block; MLflow reads its settings from nowhere else."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
