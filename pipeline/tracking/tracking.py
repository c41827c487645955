"""MLflow runs: opened by the driver, joined by whoever trains, never a reason for training to stop.

A run is opened at once if the server is there, and else when it is back; what the server refuses at once is an error at
once. Everything that is logged goes through a queue: it never raises, and is sent later when the server is away.
"""

import contextlib
import functools
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from pipeline.progress import say
from pipeline.redact import redact
from pipeline.stores.cancellation import Cancellation
from pipeline.stores.patience import said_if_slow
from pipeline.tracking import run_requests
from pipeline.tracking.metric_queue import MetricPoint, MetricQueue, RefusedError
from pipeline.tracking.mlflow_causes import for_queue, is_outage
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

_CLOSE_S, _INTERRUPTED_CLOSE_S, _SILENT_S = 30.0, 5.0, 5.0


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
        self._redone: tuple[int, int] | None = None
        self._last_skipped_step: int | None = None
        self._opening: Opening | None = None
        self._may_run = self._is_running = self._is_new = self._is_refused = False
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
            on_opened: Told the run's id once the checks are made; now or later, from another thread.

        Raises:
            TrackingUnavailableError: If the server is there and refuses.
            ConfigError: If the experiment was deleted.
            PipelineError: What the checks raise now; a run that was made here is then deleted, another FAILED.
        """
        run = cls(tracking_uri(config), None, experiment=config.experiment, run_key=run_key)

        def find_or_make() -> str:
            run_id, run._is_new = make_run(run.uri, config.experiment, run_key, run_name, tags or {})
            return run_id

        run._find = find_or_make
        opened = Step(act=lambda: run._start(run.require_id))
        run._begin([opened, Step(act=lambda: run.log_params(params or {}))], check, on_opened)
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
        rejoin = functools.partial(rejoin_run, run.uri, run_id)
        run._begin([Step(act=lambda: run._start(rejoin), refused=_say_refused)], check, None)
        return run

    @property
    def run_id(self) -> str | None:
        """The run's id; None while it is not at the server, as far as this process knows."""
        return self._run_id

    def require_id(self) -> str:
        """The run's id, asking the server if it is not known; its driver makes the run if there is none.

        Raises:
            NotOpenedError: If there is none yet. It is an outage, like the others below.
            Exception: What MLflow's client raises.
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
        steps = [*start]
        if check is not None:
            steps.append(Step(act=lambda: self._pass(check), refused=self._say_check, at_start_only=True))
        if on_opened is not None:
            steps.append(Step(act=lambda: on_opened(self.require_id()), refused=_say_refused))
        self._opening = Opening(self.uri, steps, lambda line: say(line))
        try:
            with mlflow_errors(self.uri):
                self._opening.begin()
        except BaseException as error:
            self._give_up(error)
            raise

    def _start(self, act: Callable[[], object]) -> None:
        """Makes or rejoins the run; interrupted in between, it may be RUNNING or not."""
        self._may_run = True
        act()
        self._is_running = True

    def _give_up(self, error: BaseException) -> None:
        """Leaves no run RUNNING that nobody works on, and no run at all of a start that was refused."""
        is_interrupted = not isinstance(error, Exception)
        if self._is_new and self._is_refused:
            with contextlib.suppress(Exception):  # a user who may not delete
                connect(self.uri).delete_run(self.require_id())
                return
        if self._is_refused:
            self.tag(START_CHECK_TAG, str(error))
        if self._is_running or (is_interrupted and self._may_run):
            status: Literal["FAILED", "KILLED"] = "KILLED" if is_interrupted else "FAILED"
            self.put(
                f"the status {status} of run {self.run_id or self.run_key}",
                lambda client: run_requests.end_if_running(
                    client, self._run_id or find_run(self.uri, self.experiment, self.run_key), status
                ),
            )
            self.close(_INTERRUPTED_CLOSE_S if is_interrupted else _CLOSE_S)

    def _pass(self, check: "Callable[[TrackingRun], object]") -> None:
        """Makes the start checks; the run's tag says what they refuse, and nothing once they pass."""
        try:
            check(self)
        except Exception as error:
            self._is_refused = not is_outage(error)
            raise
        client = connect(self.uri)
        if START_CHECK_TAG in client.get_run(self.require_id()).data.tags:
            client.delete_tag(self.require_id(), START_CHECK_TAG)

    def _say_check(self, error: Exception) -> None:
        self.tag(START_CHECK_TAG, str(error))
        say(
            f"error: the start checks, made now that MLflow answers, are refused: {error}; the job goes on; "
            "correct this before its end, or --resume registers the model afterwards"
        )

    def put(self, name: str, request: "Callable[[MlflowClient], object]") -> None:
        """Queue a request that is safe to repeat; `name` is what a line calls it."""
        self._queue.put_task(name, lambda: self._ask(request))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, once, from the driver; synchronous.

        MLflow keeps the first value of a parameter. Where a resumed run has another, the tag `resumed.<name>` says so.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        with mlflow_errors(self.uri):
            run_requests.log_params(connect(self.uri), self.require_id(), params)

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

    def resend(self, points: Sequence[MetricPoint]) -> None:
        """Queue what a process before this one had queued; of what the server has got meanwhile, nothing is twice."""
        self._queue.put_points(points)

    def unsent(self, last_step: int) -> list[MetricPoint]:
        """Values of steps up to one that the server has not taken yet, as far as is known; they stay queued."""
        return self._queue.unsent(last_step)

    def skip_logged_steps(self, redone: tuple[int, int] | None = None) -> None:
        """From now on drop values of steps up to the last one that the run already has.

        For the process that logs the training steps of a run that may have been resumed; call it before `log_metrics`.
        The server is asked by the queue, before it sends anything: a server that is away delays nothing.

        Args:
            redone: First and last of steps that are logged a second time, where the run has gone back.
        """
        self._skip_logged, self._redone = True, redone

    def tag(self, key: str, value: str) -> None:
        """Queue a tag of the run."""
        self.put(f"the tag {key}", lambda client: client.set_tag(self.require_id(), key, value))

    def untag(self, key: str) -> None:
        """Queue that a tag of the run is taken away, if it has it."""
        self.put(f"the tag {key}", lambda client: run_requests.delete_tag(client, self.require_id(), key))

    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """Every value of a metric as (step, value), by step; empty if the run has no such metric.

        Raises:
            TrackingUnavailableError: If the server does not answer.
        """
        with mlflow_errors(self.uri):
            entries = connect(self.uri).get_metric_history(self.require_id(), key)
        return sorted((entry.step, entry.value) for entry in entries)

    def log_file(self, data: bytes, path: str) -> None:
        """Queue a file for the run's artifacts, such as `samples/step-000001000.png`."""
        self.put(path, lambda client: run_requests.upload(client, self.require_id(), data, path))

    def log_text(self, text: str, path: str) -> None:
        """Queue a text file for the run's artifacts, such as `config.toml`."""
        self.log_file(redact(text).encode(), path)

    def log_checkpoint(self, step: int, uri: str, digest: str) -> None:
        """Queue a link to a verified checkpoint: an external model of the run with URI and digest; copies nothing."""
        self.put(
            f"the link to {uri}",
            lambda client: run_requests.link_checkpoint(
                client, self.require_id(), self.experiment_id, step, uri, digest
            ),
        )

    def flush(self, timeout_s: float = 30.0, waiting: Cancellation | None = None) -> int:
        """Send what is queued; gives up early when the server does not answer, or when `waiting` is cancelled.

        Returns:
            How many values and files are still queued; they are kept.
        """
        return self._queue.flush(timeout_s, waiting)

    def close(self, timeout_s: float = _CLOSE_S, kept_to_step: int = -1) -> int:
        """Send what is queued, trying for up to `timeout_s`, and stop; the run's status stays as it is.

        Values of steps up to `kept_to_step` are kept elsewhere (see `unsent`), and so not lost.

        Returns:
            How many values and files were lost; a line says so if there are any.
        """
        return self._close(timeout_s, lambda: None, kept_to_step)

    def finish(
        self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout_s: float | None = None
    ) -> int:
        """Close, and set the run's final status as the last thing that is sent. Never raises.

        Args:
            status: How it ended.
            timeout_s: Longest wait; None: 30 s, and 5 s for whoever interrupted the run.

        Returns:
            How many values and files were lost.
        """
        name = f"the status {status} of run {self.run_id or self.run_key}"
        default_s = _INTERRUPTED_CLOSE_S if status == "KILLED" else _CLOSE_S
        return self._close(
            default_s if timeout_s is None else timeout_s,
            lambda: self.put(name, lambda client: client.set_terminated(self.require_id(), status)),
        )

    def _close(self, timeout_s: float, put_last: Callable[[], object], kept_to_step: int = -1) -> int:
        deadline_s = time.monotonic() + timeout_s
        waits = f"waiting for MLflow at {self.uri}, which has not taken all yet, for up to {timeout_s:.0f} s"
        with said_if_slow(waits, lambda line: say(line), after_s=_SILENT_S):
            opening, self._opening = self._opening, None
            if opening is not None:
                opening.end(timeout_s)
            put_last()
            queue, self._queue = self._queue, self._new_queue()
            num_lost = queue.close(max(0.0, deadline_s - time.monotonic()), kept_to_step)
        if num_lost:
            names = f", among them {', '.join(queue.unsent_names[-3:])}" if queue.unsent_names else ""
            run = self.run_id or self.run_key
            say(f"MLflow at {self.uri}: {num_lost} metrics or files of run {run} are lost{names}")
        return num_lost

    def _new_queue(self) -> MetricQueue:
        return MetricQueue(self._send, self._ping, lambda line: say(line), redact(self.uri))

    def _send(self, points: Sequence[MetricPoint]) -> None:
        from mlflow.entities import Metric

        if self._skip_logged and self._last_skipped_step is None:
            self._last_skipped_step = self._ask(
                lambda client: run_requests.last_logged_step(client, self.require_id(), self._redone)
            )
        last = self._last_skipped_step if self._last_skipped_step is not None else -1
        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points if p.is_resent or p.step > last]
        if metrics:
            self._ask(lambda client: client.log_batch(self.require_id(), metrics=metrics))

    def _ping(self) -> None:
        run = self._ask(lambda client: client.get_run(self.require_id()))
        if run.info.lifecycle_stage == "deleted":
            raise RefusedError(f"the run was deleted at {self.uri}; restore it there")

    def _ask(self, request: "Callable[[MlflowClient], T]") -> T:
        """One request; what it raises says in one line what went wrong, and whether to try again."""
        try:
            return request(connect(self.uri))
        except Exception as error:
            raise for_queue(error) from error


def _say_refused(error: Exception) -> None:
    say(f"error: {error}; the job goes on")
