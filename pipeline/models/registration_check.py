"""The start check of registration: what the end of a run needs of MLflow, asked by the calls that the end makes.

A server of another version, artifacts that cannot be stored and a registry without permission are found before hours
of training instead of after.
"""

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import TrackingUnavailableError
from pipeline.models.registration import make_registered_model
from pipeline.tracking.mlflow_causes import ARTIFACTS_FAIL, explain, mlflow_cause
from pipeline.tracking.mlflow_client import connect, unavailable
from pipeline.tracking.run_opening import START_CHECK_TAG
from pipeline.tracking.tracking import TrackingRun

_LONGEST_S = 45.0
_UPLOAD_ATTEMPTS, _UPLOAD_PAUSE_S = 3, 1.0
_MODEL_NAME = "start-check"


def check_registration(run: TrackingRun, name: str, config_toml: str) -> None:
    """Make sure, within a minute, that this run could register a model now. Safe to repeat.

    It makes the registered model `name` if there is none, tags it, makes a logged model `start-check` with a file, and
    deletes that again.

    Args:
        run: The run that will register; it is opened.
        name: Name in the registry.
        config_toml: The run's configuration; it becomes the run's artifact `config.toml`.

    Raises:
        TrackingUnavailableError: With what was tried, the server's own words, and what to do. `is_outage` tells a
            server that is away from one that refuses; artifacts that cannot be stored are refused.
    """
    check = _Check(run, name, config_toml)
    thread = threading.Thread(target=check.run, name="mlflow-start-check", daemon=True)  # a dead store hangs for long
    thread.start()
    thread.join(_LONGEST_S)
    trying = f"MLflow at {run.uri}: registering {name!r} was tried, and failed while {check.stage}"
    error: BaseException | None = check.error
    if thread.is_alive():
        error = TimeoutError(f"no answer within {_LONGEST_S:.0f} s")
        if check.is_storing and _answers(run):
            raise TrackingUnavailableError(f"{trying}: {ARTIFACTS_FAIL.name} ({error}); {ARTIFACTS_FAIL.advice}")
    if error is None:
        return
    if check.is_refused:  # no cause: it would count as an outage
        raise TrackingUnavailableError(f"{trying}: {explain(error)}")
    raise unavailable(run.uri, error, trying) from error


class _Check:
    """The calls, one after the other; what goes wrong is kept for the thread that waits."""

    def __init__(self, run: TrackingRun, name: str, config_toml: str) -> None:
        self._run, self._name, self._config_toml = run, name, config_toml
        self.stage = "connecting"
        self.error: Exception | None = None
        self.is_storing = False
        self.is_refused = False
        """Whether files cannot be stored, again and again, while the server answers."""

    def run(self) -> None:
        try:
            self._run_all()
        except Exception as error:
            self.error = error

    def _run_all(self) -> None:
        run, client = self._run, connect(self._run.uri)
        self.stage = "making the registered model"
        make_registered_model(client, self._name)
        self.stage = "tagging the registered model, which needs the permission to update it"
        client.set_registered_model_tag(self._name, START_CHECK_TAG, run.require_id())
        self.stage = "making a logged model"
        model = client.create_logged_model(
            run.experiment_id, name=_MODEL_NAME, source_run_id=run.require_id(), model_type=_MODEL_NAME
        )
        try:
            with tempfile.TemporaryDirectory(prefix="ddpm-start-check-") as folder:
                Path(folder, "config.toml").write_text(self._config_toml, encoding="utf-8")
                self.stage, self.is_storing = "storing a file of the logged model", True
                self._store(lambda: client.log_model_artifacts(model.model_id, folder))
                self.stage = "storing a file of the run"
                self._store(lambda: client.log_artifact(run.require_id(), str(Path(folder, "config.toml"))))
                self.is_storing = False
            self.stage = "finishing the logged model"
            client.finalize_logged_model(model.model_id, "READY")
        finally:
            with contextlib.suppress(Exception):  # registration deletes nothing, and needs no permission to
                client.delete_logged_model(model.model_id)

    def _store(self, upload: Callable[[], object]) -> None:
        """Stores a file; a failure of the store alone, a few times, is no outage of MLflow."""
        for attempt in range(1, _UPLOAD_ATTEMPTS + 1):
            try:
                upload()
                return
            except Exception as error:
                if mlflow_cause(error) is not ARTIFACTS_FAIL or not _answers(self._run):
                    raise
                self.is_refused = attempt == _UPLOAD_ATTEMPTS
                if self.is_refused:
                    raise
            time.sleep(attempt * _UPLOAD_PAUSE_S)


def _answers(run: TrackingRun) -> bool:
    """Whether the server itself answers."""
    try:
        connect(run.uri).get_run(run.require_id())
    except Exception:
        return False
    return True
