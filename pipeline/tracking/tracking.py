"""MLflow runs: opened by the driver, joined by whoever trains, never a reason for training to stop.

A run is opened at once if the server is there, and else when it is back; what the server refuses at once is an error at
once. Everything that is logged goes through a queue: it never raises, and is sent later when the server is away.
"""

import functools
import hashlib
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from pipeline.progress import say
from pipeline.redact import redact
from pipeline.tracking.metric_queue import MetricPoint, MetricQueue, RefusedError
from pipeline.tracking.mlflow_causes import describe, is_outage, refusal
from pipeline.tracking.mlflow_client import (
    TrackingConfig,
    check_server,
    connect,
    mlflow_errors,
    resolve_tracking,
    tracking_uri,
)
from pipeline.tracking.run_opening import START_CHECK_TAG, NotOpenedError, Opening, Step, find_run, make_run, rejoin_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["TrackingConfig", "TrackingRun", "check_server", "new_run_key", "resolve_tracking"]

T = TypeVar("T")

_PARAMS_PER_REQUEST, _MAX_PARAM_LENGTH = 100, 6000  # limits of MLflow's API


def new_run_key() -> str:
    """A key for a new run: 32 hexadecimal digits that no other run has."""
    return secrets.token_hex(16)


class TrackingRun:
    """A handle on one MLflow run. It travels to other processes, where each sends through a queue of its own.

    Args:
        uri: Tracking URI.
        run_id: The run; None while it is known by its key only.
        experiment: Name of its experiment; needed with the key.
        run_key: Its key.
    """

    def __init__(self, uri: str, run_id: str | None, *, experiment: str = "", run_key: str = "") -> None:
        """Hold the names; nothing is asked of the server."""
        if run_id is None and not (experiment and re.fullmatch(r"[\w.-]+", run_key)):
            raise ValueError(
                f"a run without an id needs an experiment and a key of letters and digits, got {run_key!r}"
            )
        self.uri, self.experiment, self.run_key = uri, experiment, run_key
        self._run_id, self._experiment_id = run_id, ""
        self._find: Callable[[], str | None] = functools.partial(find_run, uri, experiment, run_key)
        self._finding = threading.Lock()
        self._skip_logged = False
        self._last_skipped_step: int | None = None
        self._opening: Opening | None = None
        self._is_running = False
        self._queue = self._new_queue()

    def __reduce__(self) -> "tuple[Callable[..., Self], tuple[str, str | None]]":
        """Pickle the names only; the queue, and the opening of the run, stay where they are."""
        rebuild = functools.partial(type(self), experiment=self.experiment, run_key=self.run_key)
        return rebuild, (self.uri, self._run_id)

    @classmethod
    def open(
        cls,
        config: TrackingConfig,
        run_key: str,
        run_name: str | None = None,
        *,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        check: "Callable[[TrackingRun], object] | None" = None,
        on_opened: Callable[[str], object] | None = None,
    ) -> Self:
        """Open the run with a key: the one that has it, or a new one, and its experiment if there is none.

        While the server is away the job begins: a line says so, metrics are kept, and a thread of this process opens
        the run, and does the rest, when the server answers. `run_id` is None until then.

        Args:
            config: Where.
            run_key: Letters and digits that no other run of the experiment has; `new_run_key` makes one.
            run_name: What a new run is called; MLflow invents a name otherwise.
            params: Parameters of the run; see `log_params`.
            tags: Tags of a new run.
            check: Start checks, given this run; safe to repeat. What they refuse later than now is a line and the
                tag `ddpm.start_check`.
            on_opened: Told the run's id once it has one, before the checks; now or later, from another thread.

        Raises:
            TrackingUnavailableError: If the server is there and refuses.
            ConfigError: If the experiment was deleted.
            PipelineError: What the checks raise now; the run is then FAILED.
        """
        run = cls(tracking_uri(config), None, experiment=config.experiment, run_key=run_key)
        run._find = functools.partial(make_run, run.uri, config.experiment, run_key, run_name, tags or {})
        run._begin([Step(act=run.require_id), Step(act=lambda: run.log_params(params or {}))], check, on_opened)
        return run

    @classmethod
    def join(
        cls,
        config: TrackingConfig,
        run_id: str,
        *,
        run_key: str = "",
        check: "Callable[[TrackingRun], object] | None" = None,
    ) -> Self:
        """Continue a run: its status is RUNNING again, now or, if the server is away, when it is back.

        Args:
            config: Where.
            run_id: The run.
            run_key: Its key, if it has one.
            check: Start checks, as in `open`.

        Raises:
            TrackingUnavailableError: If the server is there and refuses.
            ConfigError: If it has no such run; the message offers --new-run.
            PipelineError: What the checks raise now; the run is then FAILED.
        """
        run = cls(tracking_uri(config), run_id, experiment=config.experiment, run_key=run_key)
        run._begin([Step(act=lambda: rejoin_run(run.uri, run_id), refused=run._say_refused)], check, None)
        return run

    @property
    def run_id(self) -> str | None:
        """The run's id; None while it is not at the server, as far as this process knows."""
        return self._run_id

    def require_id(self) -> str:
        """The run's id, asking the server if it is not known; its driver makes the run if there is none.

        Raises:
            NotOpenedError: If there is none yet. It is an outage, like the others below.
            Exception: What MLflow's client raises; `mlflow_errors` and `is_outage` know it.
        """
        with self._finding:
            if self._run_id is None:
                self._run_id = self._find()
            if self._run_id is None:
                raise NotOpenedError(f"run {self.run_key} is not opened yet")
            return self._run_id

    @property
    def experiment_id(self) -> str:
        """The experiment's id; raises as `require_id`."""
        if not self._experiment_id:
            self._experiment_id = str(connect(self.uri).get_run(self.require_id()).info.experiment_id)
        return self._experiment_id

    def _begin(
        self,
        start: list[Step],
        check: "Callable[[TrackingRun], object] | None",
        on_opened: Callable[[str], object] | None,
    ) -> None:
        steps = [*start, Step(act=self._note_running)]
        if on_opened is not None:
            steps.append(Step(act=lambda: on_opened(self.require_id()), refused=self._say_refused))
        if check is not None:
            steps.append(Step(act=lambda: self._pass(check), refused=self._say_check, at_start_only=True))
        self._opening = Opening(self.uri, steps, lambda line: say(line))
        try:
            with mlflow_errors(self.uri):
                self._opening.begin()
        except Exception:
            if self._is_running:
                self.finish("FAILED")
            raise

    def _note_running(self) -> None:
        self._is_running = True

    def _pass(self, check: "Callable[[TrackingRun], object]") -> None:
        """Makes the start checks; the run's tag says what they refuse, and nothing once they pass."""
        try:
            check(self)
        except Exception as error:
            if not is_outage(error):
                tag = (START_CHECK_TAG, str(error))
                self._put("the tag of the start checks", lambda client: client.set_tag(self.require_id(), *tag))
            raise
        client = connect(self.uri)
        if START_CHECK_TAG in client.get_run(self.require_id()).data.tags:
            client.delete_tag(self.require_id(), START_CHECK_TAG)

    def _say_check(self, error: Exception) -> None:
        say(
            f"error: the start checks, made now that MLflow answers, are refused: {error}; the job goes on; "
            "correct this before its end, or --resume registers the model afterwards"
        )

    def _say_refused(self, error: Exception) -> None:
        say(f"error: {error}; the job goes on")

    def _put(self, name: str, request: "Callable[[MlflowClient], object]") -> None:
        self._queue.put_task(name, lambda: self._ask(request))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, once, from the driver; synchronous.

        MLflow keeps the first value of a parameter. Where a resumed run has another, the tag `resumed.<name>` says so.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        from mlflow.entities import Param, RunTag

        with mlflow_errors(self.uri):
            client = connect(self.uri)
            known = client.get_run(self.require_id()).data.params
            texts = {key: redact(str(value))[:_MAX_PARAM_LENGTH] for key, value in params.items()}
            new = [Param(key, text) for key, text in texts.items() if key not in known]
            changed = [
                RunTag(f"resumed.{key}", text) for key, text in texts.items() if key in known and known[key] != text
            ]
            for start in range(0, len(new), _PARAMS_PER_REQUEST):
                client.log_batch(self.require_id(), params=new[start : start + _PARAMS_PER_REQUEST])
            for start in range(0, len(changed), _PARAMS_PER_REQUEST):
                client.log_batch(self.require_id(), tags=changed[start : start + _PARAMS_PER_REQUEST])

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
            entries = connect(self.uri).get_metric_history(self.require_id(), key)
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
        deadline_s = time.monotonic() + timeout_s
        self._end_opening(timeout_s)
        queue, self._queue = self._queue, self._new_queue()
        num_lost = queue.close(max(0.0, deadline_s - time.monotonic()))
        if num_lost:
            say(f"MLflow at {self.uri}: {num_lost} metrics or files of run {self.run_id or self.run_key} are lost")
        return num_lost

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout_s: float = 30.0) -> int:
        """Close, and set the run's final status as the last thing that is sent. Never raises.

        Returns:
            How many values and files were lost.
        """
        deadline_s = time.monotonic() + timeout_s
        self._end_opening(timeout_s)
        name = f"the status {status} of run {self.run_id or self.run_key}"
        self._put(name, lambda client: client.set_terminated(self.require_id(), status))
        return self.close(max(0.0, deadline_s - time.monotonic()))

    def _end_opening(self, timeout_s: float) -> None:
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.end(timeout_s)

    def _new_queue(self) -> MetricQueue:
        return MetricQueue(self._send, self._ping, lambda line: say(line), redact(self.uri))

    def _send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        if self._skip_logged and self._last_skipped_step is None:
            self._last_skipped_step = self._ask(lambda _: self._last_logged_step())
        last = self._last_skipped_step if self._last_skipped_step is not None else -1
        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points if p.step > last or not self._skip_logged]
        if metrics:
            self._ask(lambda client: client.log_batch(self.require_id(), metrics=metrics))

    def _ping(self) -> None:
        self._ask(lambda client: client.get_run(self.require_id()))

    def _last_logged_step(self) -> int:
        run = connect(self.uri).get_run(self.require_id())
        return max((metric.step for metric in run.to_proto().data.metrics), default=-1)

    def _upload(self, data: bytes, path: str) -> None:
        folder, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        with tempfile.TemporaryDirectory(prefix="ddpm-upload-") as temporary:
            file = Path(temporary) / name
            file.write_bytes(data)
            self._ask(
                lambda client: client.log_artifact(self.require_id(), str(file), None if folder == "." else folder)
            )

    def _link_checkpoint(self, step: int, uri: str, digest: str) -> None:
        """What `mlflow.create_external_model` does, on this run's own server and safe to repeat."""
        from mlflow.entities import LoggedModelOutput

        key = hashlib.sha256(uri.encode()).hexdigest()[:16]  # MLflow's filters have no escape for a quote
        tags = {"mlflow.model.isExternal": "true", "ddpm.uri": uri, "ddpm.uri_key": key, "ddpm.digest": digest}

        def link(client: "MlflowClient") -> None:
            mine = f"source_run_id = '{self.require_id()}' AND tags.`ddpm.uri_key` = '{key}'"
            found = client.search_logged_models([self.experiment_id], filter_string=mine, max_results=1)
            model = found[0] if found else None
            if model is None:
                model = client.create_logged_model(
                    self.experiment_id,
                    name=f"step-{step:09d}",
                    source_run_id=self.require_id(),
                    tags=tags,
                    params={"step": str(step)},
                    model_type="checkpoint",
                )
            outputs = client.get_run(self.require_id()).outputs
            if not outputs or model.model_id not in {output.model_id for output in outputs.model_outputs}:
                client.log_outputs(self.require_id(), [LoggedModelOutput(model.model_id, step=step)])
            client.finalize_logged_model(model.model_id, "READY")
            client.set_tag(self.require_id(), "ddpm.checkpoint", uri)
            client.set_tag(self.require_id(), "ddpm.checkpoint_digest", digest)

        self._ask(link)

    def _ask(self, request: "Callable[[MlflowClient], T]") -> T:
        """One request; what it raises says in one line what went wrong, and whether to try again."""
        try:
            return request(connect(self.uri))
        except Exception as error:
            raise (RefusedError if refusal(error) else ConnectionError)(describe(error)) from error
