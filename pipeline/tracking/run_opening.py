"""How a run comes to be at the server: found by its key or made with it, now or when the server is back.

A run's key is a tag that its owner chooses before the run exists: an answer that is lost then makes no second run, and
whoever knows the key finds the run. `Opening` does the steps of a start in order; while the server is away a thread
goes on trying, and the job begins meanwhile.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.redact import redact
from pipeline.tracking.mlflow_causes import describe, is_outage, mlflow_cause, refusal
from pipeline.tracking.mlflow_client import connect, probe

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY_TAG = "ddpm.run_key"
START_CHECK_TAG = "ddpm.start_check"
"""Tag of a run whose start checks were refused after it had begun: the reason."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _HURRIED_PAUSE_S = 1.0, 60.0, 0.5


class NotOpenedError(ConnectionError):
    """The run is not at the server yet; its driver will make it."""


def find_run(uri: str, experiment: str, run_key: str) -> str | None:
    """The id of the run with a key; None if there is none. Raises what MLflow's client raises."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    return None if found is None else _find(client, found.experiment_id, run_key)


def make_run(
    uri: str, experiment: str, run_key: str, run_name: str | None, tags: Mapping[str, str]
) -> tuple[str, bool]:
    """The id of the run with a key, and whether it was made now, since there was none.

    Safe to repeat; raises what MLflow's client raises.

    Raises:
        ConfigError: If the experiment was deleted.
    """
    client = connect(uri)
    experiment_id = _experiment_id(client, uri, experiment)
    run_id = _find(client, experiment_id, run_key)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id, False
    ours = {"mlflow.source.name": Path(sys.argv[0]).name, RUN_KEY_TAG: run_key}
    shown = {key: redact(text) for key, text in tags.items()}
    made = client.create_run(experiment_id, run_name=run_name and redact(run_name), tags={**shown, **ours})
    return str(made.info.run_id), True


def rejoin_run(uri: str, run_id: str) -> None:
    """Set a run RUNNING again. Safe to repeat; raises what MLflow's client raises.

    Raises:
        ConfigError: If the server has no such run, or it was deleted.
    """
    client = connect(uri)
    try:
        client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
    except Exception as error:
        if refusal(error):
            raise ConfigError(
                f"MLflow run {run_id!r}: not at {uri}, or deleted; restore it, or go on in a new run with --new-run"
            ) from error
        raise


def _find(client: "MlflowClient", experiment_id: str, run_key: str) -> str | None:
    """The first of the runs with a key."""
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{RUN_KEY_TAG}` = '{run_key}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return found[0].info.run_id if found else None


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """Finds or makes the experiment; several jobs may start at once."""
    from mlflow.exceptions import MlflowException

    location = None
    if uri.startswith("sqlite:///"):  # MLflow's own default is the current folder
        location = Path(uri.removeprefix("sqlite:///")).parent.joinpath("mlruns").as_uri()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # For pages that look at it; those of MLflow 3.17 open as of prompts and traces, unless the browser or the
            # address says workflowType=machine_learning.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=location, tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Not in the block above: what is raised here would be taken for a consequence of that exception.
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise ConfigError(f"tracking.experiment: {name!r} was deleted at {uri}; restore it or choose another name")
    return str(experiment.experiment_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a start; safe to repeat."""

    act: Callable[[], object]
    """What is done; whatever it raises is an outage, and tried again, or a refusal."""
    refused: Callable[[Exception], None] | None = None
    """Told of a refusal that is found while the job runs; the next step follows. None: it is tried again for ever."""
    at_start_only: bool = False
    """Whether the end of a job does not wait for it."""


class Opening:
    """The steps of a start, in order.

    Args:
        uri: Tracking URI.
        steps: What to do.
        say: Prints one line.
    """

    def __init__(self, uri: str, steps: Sequence[Step], say: Callable[[str], None]) -> None:
        """Do nothing yet."""
        self._uri, self._say = uri, say
        self._steps = deque(steps)
        self._ending, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Do the steps now; once the server is found to be away, the rest follows from a thread.

        Raises:
            Exception: What a step raised, or the first request to the server, if it is no outage.
        """
        try:
            if (error := probe(self._uri)) is not None:  # without it a server that is silent would be waited for
                raise error
            while self._steps:
                self._steps[0].act()
                self._steps.popleft()
        except Exception as error:
            if not is_outage(error):
                raise
            self._say(
                f"MLflow at {self._uri} gives no answer ({describe(error)}); "
                "the job begins, its metrics are kept and sent when the server is there; "
                f"{mlflow_cause(error).advice}"
            )
            self._thread = threading.Thread(target=self._work, name="mlflow-opening", daemon=True)
            self._thread.start()

    def end(self, timeout_s: float) -> None:
        """Hurry with what is left to do, for up to so many seconds, and stop."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._stopped.set()

    def _work(self) -> None:
        pause_s, said = _FIRST_PAUSE_S, ""
        while self._steps and not self._stopped.is_set():
            step = self._steps[0]
            if not (step.at_start_only and self._ending.is_set()):
                try:
                    step.act()
                except Exception as error:
                    if is_outage(error) or step.refused is None:
                        if not is_outage(error) and said != describe(error):
                            said = describe(error)
                            self._say(f"MLflow at {self._uri}: the run cannot be opened ({said}); tried again")
                        self._pause(pause_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                        continue
                    step.refused(error)
            self._steps.popleft()
            pause_s = _FIRST_PAUSE_S
        if not self._steps:
            self._say(f"MLflow at {self._uri} answers; the run is open")

    def _pause(self, pause_s: float) -> None:
        if not self._ending.is_set():
            self._ending.wait(pause_s)
        if self._ending.is_set():
            self._stopped.wait(_HURRIED_PAUSE_S)
