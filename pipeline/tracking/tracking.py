"""MLflow runs: created by the driver, joined by whoever trains, never a reason for training to stop.

Creating a run and logging its parameters is synchronous and fails early. Everything after that goes through a queue:
it never raises, and is sent later when the server is away.
"""

import functools
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from pipeline.errors import ConfigError
from pipeline.progress import say
from pipeline.redact import redact
from pipeline.tracking.metric_queue import MetricPoint, MetricQueue, RefusedError
from pipeline.tracking.mlflow_client import (
    TrackingConfig,
    check_server,
    connect,
    describe,
    mlflow_errors,
    refusal,
    resolve_tracking,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["TrackingConfig", "TrackingRun", "check_server", "resolve_tracking"]

T = TypeVar("T")

_PARAMS_PER_REQUEST, _MAX_PARAM_LENGTH = 100, 6000  # limits of MLflow's API


class TrackingRun:
    """A handle on one MLflow run. It travels to other processes, where each sends through a queue of its own.

    Args:
        uri: Tracking URI.
        run_id: The run.
        experiment_id: Its experiment.
    """

    def __init__(self, uri: str, run_id: str, experiment_id: str) -> None:
        """Hold the three names; nothing is asked of the server."""
        self.uri, self.run_id, self.experiment_id = uri, run_id, experiment_id
        self._say: Callable[[str], None] = say
        self._skip_logged = False
        self._last_skipped_step: int | None = None
        self._queue = self._new_queue()

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        """Pickle the names only; the queue stays where it is."""
        return type(self), (self.uri, self.run_id, self.experiment_id)

    @classmethod
    def create(
        cls,
        config: TrackingConfig,
        run_name: str | None = None,
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Self:
        """Create a run, and its experiment if there is none.

        Args:
            config: Where.
            run_name: What the run is called; MLflow invents a name otherwise.
            params: Parameters of the run; see `log_params`.
            tags: Tags of the run.

        Raises:
            TrackingUnavailableError: If the server does not answer.
            ConfigError: If the experiment was deleted.
        """
        uri = tracking_uri(config)
        with mlflow_errors(uri):
            client = connect(uri)
            experiment_id = _experiment_id(client, uri, config.experiment)
            source = {"mlflow.source.name": Path(sys.argv[0]).name}
            shown = {key: redact(text) for key, text in (tags or {}).items()}
            created = client.create_run(experiment_id, run_name=run_name and redact(run_name), tags={**source, **shown})
        run = cls(uri, created.info.run_id, experiment_id)
        run.log_params(params or {})
        return run

    @classmethod
    def join(cls, config: TrackingConfig, run_id: str) -> Self:
        """Continue a run: its status is RUNNING again.

        Raises:
            TrackingUnavailableError: If the server does not answer.
            ConfigError: If it has no such run.
        """
        uri = tracking_uri(config)
        with mlflow_errors(uri):
            client = connect(uri)
            try:
                run = client.get_run(run_id)
                client.update_run(run_id, status="RUNNING")
            except Exception as error:
                if refusal(error):
                    raise ConfigError(f"MLflow run {run_id!r}: not at {uri}, or deleted; start a new run") from error
                raise
        return cls(uri, run_id, run.info.experiment_id)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, once, from the driver; synchronous.

        MLflow keeps the first value of a parameter. Where a resumed run has another, the tag `resumed.<name>` says so.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        from mlflow.entities import Param, RunTag

        with mlflow_errors(self.uri):
            client = connect(self.uri)
            known = client.get_run(self.run_id).data.params
            texts = {key: redact(str(value))[:_MAX_PARAM_LENGTH] for key, value in params.items()}
            new = [Param(key, text) for key, text in texts.items() if key not in known]
            changed = [
                RunTag(f"resumed.{key}", text) for key, text in texts.items() if key in known and known[key] != text
            ]
            for start in range(0, len(new), _PARAMS_PER_REQUEST):
                client.log_batch(self.run_id, params=new[start : start + _PARAMS_PER_REQUEST])
            for start in range(0, len(changed), _PARAMS_PER_REQUEST):
                client.log_batch(self.run_id, tags=changed[start : start + _PARAMS_PER_REQUEST])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the values of one step. Never raises and never waits for the server."""
        time_ms = time.time_ns() // 1_000_000
        points = []
        for key, value in metrics.items():
            try:
                points.append(MetricPoint(key=key, value=float(value), step=int(step), time_ms=time_ms))
            except (TypeError, ValueError):
                self._queue.count_lost(1, f"metric {key!r} of step {step} is no number: {value!r}")
        self._queue.put_points(points)

    def report_to(self, say: Callable[[str], None]) -> None:
        """Hand the lines about the server to someone who can show them: what a worker prints is not seen."""
        self._say = say

    def skip_logged_steps(self) -> None:
        """From now on drop values of steps up to the last one that the run already has.

        For the process that logs the training steps of a run that may have been resumed; call it before `log_metrics`.
        The server is asked by the queue, before it sends anything: a server that is away delays nothing.
        """
        self._skip_logged = True

    def last_logged_step(self) -> int:
        """The highest step that any metric of the run has; -1 if there is none.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        with mlflow_errors(self.uri):
            return self._last_logged_step()

    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """Every value of a metric as (step, value), by step; empty if the run has no such metric.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        with mlflow_errors(self.uri):
            entries = connect(self.uri).get_metric_history(self.run_id, key)
        return sorted((entry.step, entry.value) for entry in entries)

    def log_image(self, png: bytes, path: str) -> None:
        """Queue an image file for the run's artifacts, such as `samples/step-000001000.png`."""
        self._queue.put_task(path, functools.partial(self._upload, png, path))

    def log_text(self, text: str, path: str) -> None:
        """Queue a text file for the run's artifacts, such as `config.toml`."""
        self._queue.put_task(path, functools.partial(self._upload, redact(text).encode(), path))

    def log_checkpoint(self, step: int, uri: str, digest: str) -> None:
        """Queue a link to a verified checkpoint: an external model of the run with URI and digest; copies nothing."""
        self._queue.put_task(f"the link to {uri}", functools.partial(self._link_checkpoint, step, uri, digest))

    def flush(self, timeout_s: float = 30.0) -> int:
        """Send what is queued; gives up early when the server does not answer.

        Returns:
            How many values and files are still queued; they are kept.
        """
        return self._queue.flush(timeout_s)

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what is queued, trying for up to `timeout_s`, and stop; the run's status stays as it is.

        Returns:
            How many values and files were lost; a line says so if there are any.
        """
        queue, self._queue = self._queue, self._new_queue()
        num_lost = queue.close(timeout_s)
        if num_lost:
            self._say(f"MLflow at {self.uri}: {num_lost} metrics or files of run {self.run_id} are lost")
        return num_lost

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout_s: float = 30.0) -> int:
        """Close, and set the run's final status as the last thing that is sent. Never raises.

        Returns:
            How many values and files were lost.
        """
        name = f"the status {status} of run {self.run_id}"
        self._queue.put_task(name, lambda: self._ask(lambda client: client.set_terminated(self.run_id, status)))
        return self.close(timeout_s)

    def _new_queue(self) -> MetricQueue:
        return MetricQueue(self._send, self._ping, lambda line: self._say(line), redact(self.uri))

    def _send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        if self._skip_logged and self._last_skipped_step is None:
            self._last_skipped_step = self._ask(lambda _: self._last_logged_step())
        last = self._last_skipped_step if self._last_skipped_step is not None else -1
        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points if p.step > last or not self._skip_logged]
        if metrics:
            self._ask(lambda client: client.log_batch(self.run_id, metrics=metrics))

    def _ping(self) -> None:
        self._ask(lambda client: client.get_run(self.run_id))

    def _last_logged_step(self) -> int:
        run = connect(self.uri).get_run(self.run_id)
        return max((metric.step for metric in run.to_proto().data.metrics), default=-1)

    def _upload(self, data: bytes, path: str) -> None:
        folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        with tempfile.TemporaryDirectory(prefix="ddpm-upload-") as temporary:
            file = Path(temporary) / name
            file.write_bytes(data)
            self._ask(lambda client: client.log_artifact(self.run_id, str(file), None if folder == "." else folder))

    def _link_checkpoint(self, step: int, uri: str, digest: str) -> None:
        """What `mlflow.create_external_model` does, on this run's own server and safe to repeat."""
        from mlflow.entities import LoggedModelOutput

        key = hashlib.sha256(uri.encode()).hexdigest()[:16]  # MLflow's filters have no escape for a quote
        tags = {"mlflow.model.isExternal": "true", "ddpm.uri": uri, "ddpm.uri_key": key, "ddpm.digest": digest}

        def link(client: "MlflowClient") -> None:
            mine = f"source_run_id = '{self.run_id}' AND tags.`ddpm.uri_key` = '{key}'"
            found = client.search_logged_models([self.experiment_id], filter_string=mine, max_results=1)
            model = found[0] if found else None
            if model is None:
                model = client.create_logged_model(
                    self.experiment_id,
                    name=f"step-{step:09d}",
                    source_run_id=self.run_id,
                    tags=tags,
                    params={"step": str(step)},
                    model_type="checkpoint",
                )
            outputs = client.get_run(self.run_id).outputs
            if not outputs or model.model_id not in {output.model_id for output in outputs.model_outputs}:
                client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=step)])
            client.finalize_logged_model(model.model_id, "READY")
            client.set_tag(self.run_id, "ddpm.checkpoint", uri)
            client.set_tag(self.run_id, "ddpm.checkpoint_digest", digest)

        self._ask(link)

    def _ask(self, request: "Callable[[MlflowClient], T]") -> T:
        """One request; what it raises says in one line what went wrong, and whether to try again."""
        try:
            return request(connect(self.uri))
        except Exception as error:
            raise (RefusedError if refusal(error) else ConnectionError)(describe(error)) from error


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """Finds or makes the experiment; several jobs may start at once."""
    from mlflow.exceptions import MlflowException

    location = None
    if uri.startswith("sqlite:///"):  # MLflow's own default is the current folder
        location = Path(uri.removeprefix("sqlite:///")).parent.joinpath("mlruns").as_uri()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise ConfigError(f"tracking.experiment: {name!r} was deleted at {uri}; restore it or choose another name")
    return str(experiment.experiment_id)
