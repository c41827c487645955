"""The driver of a training run: claims its output, runs the workers, registers the model.

Ray Train runs groups of workers, and supervisor.py replaces them. It is handed neither datasets nor checkpoints: each
worker builds its own stream and finds the newest good checkpoint itself, so that there is one authority on where a run
stands.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

from pipeline.cluster import ray_session
from pipeline.errors import PipelineError, StoppedError, TrackingUnavailableError
from pipeline.models.model_files import ModelFiles
from pipeline.models.model_uri import absolute_model_uri
from pipeline.models.registration import register_model
from pipeline.models.registry import CHECKPOINT_TAG, RegisteredVersion, registered_checkpoints
from pipeline.progress import Progress, say
from pipeline.stores.lease import Lease, hold_lease
from pipeline.stores.patience import patience_s
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingRun, resolve_tracking
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.claim import claim
from pipeline.training.driver.rollback import finish_roll_back, with_rollback
from pipeline.training.driver.supervisor import RESTARTS_TAG, Supervisor
from pipeline.training.metrics.unsent_metrics import resend
from pipeline.training.run_description import log_inputs
from pipeline.training.run_record import RunRecord, read_run_record, refuse_to_begin_again, update_run_record
from pipeline.training.stop_request import StopRequest, parse_duration
from pipeline.training.train_board import training_board
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_plan import TrainPlan, load_plan, noisy_average
from pipeline.training.train_task import TrainTask

STOPPED_TAG = "stopped"
"""Of an MLflow run whose driver was asked to end: why, and where the run stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Where a finished training run left its results."""

    run_id: str
    """The MLflow run."""
    checkpoint_uri: str
    """The last checkpoint; `sample` takes it as a model."""
    steps: int
    """Steps behind it."""
    version: RegisteredVersion
    """The registered model."""


def train(config: TrainConfig) -> TrainResult:
    """Train, or go on training, and register the averaged weights under the alias `candidate`.

    Args:
        config: What to train on what; places may be relative.

    Returns:
        Where the results are.

    Raises:
        LeaseHeldError: If another driver works in this output; nothing was changed.
        CheckpointError: If the run had checkpoints and none of them can be used.
        PipelineError: As its other subclasses say; nothing that was recorded is lost, and `resume` goes on.
    """
    config = _absolute(config)
    plan = load_plan(config)
    store = open_store(config.output)
    check_conditions(store)
    stop = StopRequest(None if config.stop_after is None else parse_duration(config.stop_after))
    with hold_lease(store, duration_s=config.lease_s) as lease:
        checkpoints = CheckpointStore.of_run(config.output)
        if config.resume:
            finish_roll_back(store, checkpoints)
        finished = checkpoints.read_finished(config.steps) if config.resume else None
        record, run = claim(config, plan, store, lease, is_finished=finished is not None)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        log_inputs(run, config, plan)
        if note := noisy_average(config):
            say(note)
        try:
            if finished is None:
                finished = _train(config, plan, checkpoints, record, run, lease, stop)
            resend(run, checkpoints, finished[0])  # no worker goes on from it
            result = _register(config, checkpoints, *finished, run, lease)
            _tag_cost(run, read_run_record(store))
            status = "FINISHED"
        except StoppedError as stopped:
            status = "KILLED"
            run.tag(STOPPED_TAG, str(stopped))
            _tag_cost(run, read_run_record(store))
            raise
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            if lease.is_lost:
                run.close()  # its status is what the other driver makes of it
            else:
                run.finish(status)
    return result


def _train(
    config: TrainConfig,
    plan: TrainPlan,
    checkpoints: CheckpointStore,
    record: RunRecord,
    run: TrackingRun,
    lease: Lease,
    stop: StopRequest,
) -> tuple[CheckpointRecord, ModelFiles]:
    """The last checkpoint, and the model in it."""
    newest = checkpoints.newest()
    if newest is None:
        refuse_to_begin_again(record, config)
    else:
        record = update_run_record(open_store(config.output), num_restarts=record.num_restarts + 1)
        run.tag(RESTARTS_TAG, str(record.num_restarts))
    if record.run_key is None:  # of the time before there were pins
        _pin_registered(checkpoints, run)
    lease.confirm()
    checkpoints.remove_leftovers()
    run.untag(STOPPED_TAG)
    done = newest.step if newest else 0
    with (
        ray_session(config.cluster),
        stop.listening(),
        training_board(done) as board,
        Progress("training", config.steps, "steps", done=done) as progress,
    ):
        task = TrainTask(
            config=config,
            manifest=plan.manifest,
            model_config=plan.model_config,
            source=plan.source,
            fork_digest=record.fork_digest,
            lease_token=lease.token,
            patience_minutes=patience_s() / 60,
            run=run,
            board=board,
            begun_at_s=record.begun_at_s,
        )
        return Supervisor(with_rollback(task, record), checkpoints, lease, stop, progress).run()


def _register(
    config: TrainConfig,
    checkpoints: CheckpointStore,
    last: CheckpointRecord,
    files: ModelFiles,
    run: TrackingRun,
    lease: Lease,
) -> TrainResult:
    """Safe to repeat: a driver that is killed before leaves it to the resumed one."""
    lease.confirm()
    checkpoints.pin(last, config.register_as)
    uri = checkpoints.uri(last)
    try:
        version = register_model(run, files, config.register_as, tags={CHECKPOINT_TAG: uri})
    except PipelineError as error:
        raise type(error)(
            f"trained to step {last.step}, checkpoint {uri}, and not registered: {error}; the same command with "
            "--resume registers it"
        ) from error
    return TrainResult(run_id=run.require_id(), checkpoint_uri=uri, steps=last.step, version=version)


def _tag_cost(run: TrackingRun, record: RunRecord) -> None:
    """How often the run was started again, and how long it took on the wall's clock, waiting included."""
    run.tag(RESTARTS_TAG, str(record.num_restarts))
    if record.begun_at_s is not None:
        run.tag("ddpm.wall_time_s", f"{time.time() - record.begun_at_s:.0f}")


def _pin_registered(checkpoints: CheckpointStore, run: TrackingRun) -> None:
    """Keep what versions of a run came from that were registered before there were pins."""
    try:
        registered = registered_checkpoints(run)
    except TrackingUnavailableError as error:
        say(f"checkpoints that this run's versions came from may be removed, since they cannot be looked up: {error}")
        return
    for record in checkpoints.records():
        if (name := registered.get(checkpoints.uri(record))) is not None:
            checkpoints.pin(record, name)


def _absolute(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        config,
        dataset=open_store(config.dataset).uri,
        output=open_store(config.output).uri,
        fork_from=None if config.fork_from is None else absolute_model_uri(config.fork_from),
        tracking=resolve_tracking(config.tracking),
    )
