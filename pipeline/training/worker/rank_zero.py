"""What rank 0 keeps besides training: metrics, grids, checkpoints, snapshots of averages, the driver's progress.

Checkpoints and snapshots are copied to the host between two steps and written beside training.
"""

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from ddpm import DiffusionModel, build_network, generate, x_0_to_images
from pipeline.config_sections import write_section
from pipeline.data.pictures import image_grid
from pipeline.errors import LeaseLostError
from pipeline.models.model_files import WEIGHTS, ModelCard
from pipeline.progress import say
from pipeline.stores.cancellation import Cancellation
from pipeline.stores.lease import holder_token
from pipeline.stores.patience import patience_s
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord, Retention
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.ema_snapshots import SnapshotStore, parse_snapshots
from pipeline.training.checkpoints.host_copy import HostCopy
from pipeline.training.checkpoints.state_files import SNAPSHOTS_JSON, UNSENT_METRICS_JSON, StateParts, encode_state
from pipeline.training.metrics.telemetry import STALL_METRIC, Stall, Throughput
from pipeline.training.metrics.unsent_metrics import encode_unsent, resend
from pipeline.training.run_record import update_run_record
from pipeline.training.side_work import SideWork
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.background import BackgroundWriter
from pipeline.training.worker.interval_log import IntervalLog
from pipeline.training.worker.training_state import TrainingState

_GRID_ROWS, _GRID_COLUMNS = 4, 10
_FLUSH_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 30.0


def is_averages_turn(config: TrainConfig, step: int) -> bool:
    """Whether something is made of the averages after a step: rank 0 needs them whole then."""
    grids, snapshots = config.grid_interval_steps, config.post_hoc_ema.snapshot_interval_steps
    return any(_is_due(interval, config, step) for interval in (config.checkpoint_interval_steps, grids, snapshots))


def _is_due(interval: int, config: TrainConfig, step: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == config.steps)


@dataclass(frozen=True, eq=False, slots=True)
class _Writing:
    """A checkpoint on its way into the store."""

    parts: StateParts
    cancellation: Cancellation
    """Tells that another checkpoint is needed, and this one is not."""
    patience: Cancellation
    """Tells that somebody waits for it who has seconds: what need not be done before it stands is done after."""
    stands: Future[CheckpointRecord]
    """Set when it is recorded, before what follows."""

    @property
    def step(self) -> int:
        return self.parts.position.step


class RankZero:
    """The run's record, kept by one rank.

    Args:
        task: What the worker was given.
        checkpoints: The run's checkpoints.
        state: The state in training; read, never changed.
        device: Where the network lives.
        restored: The checkpoint that the state is; None at step 0.
    """

    def __init__(
        self,
        task: TrainTask,
        checkpoints: CheckpointStore,
        state: TrainingState,
        device: torch.device,
        restored: CheckpointRecord | None = None,
    ) -> None:
        """Join the MLflow run; steps that it already holds are not logged again, those that it lacks are sent."""
        self._task, self._checkpoints, self._state, self._device = task, checkpoints, state, device
        self._output, self._snapshots = open_store(task.config.output), SnapshotStore.of_run(task.config.output)
        self._writer, self._copy, self._stall = BackgroundWriter(say), HostCopy(), Stall()
        self._card = ModelCard(
            config=task.model_config,
            class_names=task.manifest.class_names if task.model_config.num_classes else (),
            dataset_digest=task.manifest.digest,
        )
        self._log = IntervalLog(task, device)
        self._grids, self._tidying = SideWork("drawing a grid", say), SideWork("removing older checkpoints", say)
        self._averages = state.averages  # for the writer's thread, which must not touch the state
        self._has_checkpoints = self._is_unsent = self._has_finished = False
        self._first_step = state.step
        self._writing: _Writing | None = None
        rollback = task.rollback
        task.run.skip_logged_steps(None if rollback is None else (rollback.to_step + 1, rollback.from_step))
        self._kept_to_step = -1
        """The step up to which a checkpoint holds what MLflow has not got."""
        if restored is not None:
            resend(task.run, checkpoints, restored)
            self._kept_to_step = restored.step

    def log(self, metrics: dict[str, float], throughput: Throughput) -> None:
        """Log an interval's figures under the present step and show them on the driver's terminal."""
        self._log.log(self._state, metrics, throughput)

    def after_step(self) -> None:
        """Take a snapshot, write a checkpoint and draw a grid where they are due.

        Raises:
            BaseException: What went wrong since, while a snapshot or a checkpoint was written.
        """
        self._writer.check()
        config, step = self._task.config, self._state.step
        self._take_snapshot()  # before the checkpoint, which names it
        if _is_due(config.checkpoint_interval_steps, config, step):
            self._save()
        if _is_due(config.grid_interval_steps, config, step):
            with self._grids.attempt(step):
                self._task.run.log_file(self._grid(), f"samples/step-{step:09d}.png")

    def save_now(self) -> CheckpointRecord | None:
        """Write a checkpoint of the present step, for whoever has seconds left, and wait until it stands.

        An earlier one that is still being written is cancelled; snapshots are not: they are small, and this checkpoint
        names them. One of this very step is finished. MLflow is sent to after it stands, and what is no longer kept is
        left to the next checkpoint.

        Returns:
            The checkpoint's record; None if there was nothing to do: it stood already, or the run has made no step
            since it began or was restored.

        Raises:
            BaseException: What went wrong since, or now, while a snapshot or a checkpoint was written.
        """
        self._writer.check()
        if self._state.step == self._first_step:
            return None
        writing = self._writing
        if writing is None or writing.step != self._state.step:
            writing = self._save(is_urgent=True)
        elif writing.stands.done():
            return None
        else:
            writing.patience.cancel()
        return self._writer.wait_until("checkpoint", writing.stands)

    def finish(self) -> None:
        """Wait until the last checkpoint stands.

        Raises:
            BaseException: What went wrong while it, or one before, was written.
        """
        self._writer.finish()
        self._has_finished = True

    def close(self) -> None:
        """Finish the checkpoint that is being written, and send what is still to be logged.

        Where training has come to its end MLflow is waited for as a store is, because nothing else will send it.
        """
        self._writer.close()
        self._checkpoints.close()
        for side_work in (self._grids, self._tidying):
            side_work.sum_up()
        self._log.close()
        timeout_s = max(_CLOSE_TIMEOUT_S, patience_s()) if self._has_finished else _CLOSE_TIMEOUT_S
        self._task.run.close(timeout_s, self._kept_to_step)
        with self._tidying.attempt(self._state.step):  # last: a request that hangs may take as long as there is left
            self._checkpoints.remove_cancelled(_CLOSE_TIMEOUT_S)

    def _take_snapshot(self) -> None:
        config, state = self._task.config, self._state
        if _is_due(config.post_hoc_ema.snapshot_interval_steps, config, state.step):
            state.averages.take_snapshot(state.step, self._snapshots, config.post_hoc_ema.dtype, self._writer)

    def _save(self, *, is_urgent: bool = False) -> _Writing:
        """Copy the state, and have the copy written; where it is urgent, in the place of one that is being written."""
        with self._stall:
            if is_urgent:
                self._writer.cancel("checkpoint")
                self._take_snapshot()  # which would wait for the checkpoint before
            else:
                self._writer.wait("checkpoint")
            parts = self._state.parts()
            parts = dataclasses.replace(parts, tensors=self._copy.take(parts.tensors))
        self._task.run.log_metrics({STALL_METRIC: self._stall.seconds}, self._state.step)
        cancellation = Cancellation()
        writing = self._writing = _Writing(parts, cancellation, Cancellation(cancellation), Future())
        if is_urgent:
            writing.patience.cancel()
        self._writer.start("checkpoint", lambda: self._write(writing), cancellation)
        return writing

    def _write(self, writing: _Writing) -> None:
        """Beside training: store a copy of the state, link it, and remove what is no longer kept."""
        task, step, parts = self._task, writing.step, writing.parts
        checkpoints = self._checkpoints.with_cancellation(writing.cancellation)
        # What was logged before a checkpoint is not logged again by a run that goes on from it; what MLflow does not
        # take now goes into the checkpoint.
        is_sent = self._send(step, writing.patience)
        # Snapshots are written by this thread, in order: here are those of the steps up to this one.
        snapshots = self._averages.snapshots if self._averages.is_tracking else None
        card = dataclasses.replace(self._card, train_step=step)
        pieces = [
            *encode_state(parts, card, task.source, snapshots),
            self._config_piece,
            lambda: self._unsent_piece(step),
        ]
        record = checkpoints.save(step, pieces, fence=lambda: self._fence(writing.cancellation))
        if UNSENT_METRICS_JSON in record.names:
            self._kept_to_step = step
        writing.stands.set_result(record)
        if not self._has_checkpoints:
            rate = self._log.rate
            known: dict[str, Any] = {} if rate is None else {"rate": rate}
            update_run_record(self._output, has_checkpoints=True, **known)
            self._has_checkpoints = True
        task.board.checkpointed.remote(task.group, step)
        task.run.log_checkpoint(step, checkpoints.uri(record), record.digest)
        if not is_sent:
            self._send(step, writing.cancellation)
        with self._tidying.attempt(step):
            self._checkpoints.remove_cancelled()
        if not writing.patience.is_cancelled or step == task.config.steps:
            self._tidy(record, checkpoints, writing.cancellation)

    def _send(self, step: int, waiting: Cancellation) -> bool:
        """Have MLflow take what was logged before a checkpoint; says whether that was waited for to the end."""
        num_left = self._task.run.flush(_FLUSH_TIMEOUT_S, waiting)
        if num_left and waiting.is_cancelled:
            return False
        if num_left and not self._is_unsent:
            say(
                f"checkpoint of step {step}: MLflow has not got {num_left} metrics or files of the steps before it; "
                "they are sent later, and the metrics are kept with the checkpoint; the files are lost if this process "
                "dies before"
            )
        self._is_unsent = num_left > 0
        return True

    def _config_piece(self) -> dict[str, bytes]:
        return {"config.toml": write_section(self._task.config, "train").encode()}

    def _unsent_piece(self, step: int) -> dict[str, bytes]:
        points = self._task.run.unsent(step)
        return {UNSENT_METRICS_JSON: encode_unsent(points)} if points else {}

    def _tidy(self, newest: CheckpointRecord, checkpoints: CheckpointStore, cancellation: Cancellation) -> None:
        """Side work: that it fails is no reason to end a run."""
        config = self._task.config
        self._fence(cancellation)
        with self._tidying.attempt(newest.step):
            retention = Retention(last=config.keep_checkpoints, every_steps=config.keep_every_steps)
            checkpoints.prune(newest, retention)
            if newest.step == config.steps and config.post_hoc_ema.tracked:
                self._remove_leftover_snapshots(newest)

    def _fence(self, cancellation: Cancellation) -> None:
        """Stop where another driver has taken over: what is recorded and removed here would be from its run.

        Raises:
            LeaseLostError: If the output's lease is another's.
        """
        if holder_token(self._output.with_cancellation(cancellation)) not in (None, self._task.lease_token):
            raise LeaseLostError(
                f"{self._output.uri}: another driver has taken over its lease, so this worker stops; nothing that it "
                "recorded is lost"
            )

    def _remove_leftover_snapshots(self, last: CheckpointRecord) -> None:
        """Those that the run's last checkpoint does not name: of two attempts at once it may be the other's."""
        named = self._checkpoints.read(last, SNAPSHOTS_JSON)
        self._snapshots.remove_all_but(parse_snapshots(named, SNAPSHOTS_JSON))

    @torch.no_grad()
    def _grid(self) -> bytes:
        """A PNG of samples of the averaged network: the same noise at every step of the run."""
        task, model_config = self._task, self._task.model_config
        network = build_network(model_config).to(self._device).eval()
        network.load_state_dict(self._averages.tensors()[WEIGHTS])
        columns = min(model_config.num_classes or _GRID_COLUMNS, _GRID_COLUMNS)
        ids = torch.arange(_GRID_ROWS * columns, device=self._device)
        images = generate(
            DiffusionModel.of(model_config, network),
            task.config.grid_sampler,
            seed=task.config.seed,
            sample_ids=ids,
            label=ids % columns if model_config.num_classes else None,
        )
        return image_grid(x_0_to_images(images).cpu().numpy(), columns=columns)
