"""The driver's loop over groups of workers: starts one after the other until the last checkpoint stands.

Ray Train runs a group and says how it ended; that it is replaced, with how many workers and from where, is decided
here, because only here is known how far training got. Ray's own policies count failures over the whole run, try again
what can only fail again, and end a group without notice to make it larger.
"""

import os

from pipeline.cluster_nodes import gone_nodes, whole_cluster
from pipeline.errors import ConfigError, PipelineError, StoppedError, TrainingFailedError
from pipeline.models.model_files import ModelFiles
from pipeline.progress import Progress, say
from pipeline.stores.lease import Lease
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.driver.failures import MAX_LOSSES, Failure, FailureCount
from pipeline.training.driver.group_watch import GroupTerms, GroupWatch
from pipeline.training.driver.places import wait_for_places
from pipeline.training.driver.rollback import roll_back
from pipeline.training.driver.validation import Validator
from pipeline.training.driver.worker_group import failure_of, found_no_room, resources_of, run_group, was_preempted
from pipeline.training.hang_timeout import hang_timeout_s
from pipeline.training.run_record import read_run_record, update_run_record
from pipeline.training.stop_request import StopRequest
from pipeline.training.train_board import BoardState
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_task import TrainTask

RESTARTS_TAG = "ddpm.restarts"
"""Of an MLflow run: how often its workers were started again, and its driver."""


class Supervisor:
    """Trains to the last step, inside a Ray session.

    Args:
        task: What the workers get.
        checkpoints: The run's checkpoints.
        lease: The lease of the run's output.
        stop: Whether this driver is to end.
        progress: Shows the steps.
    """

    def __init__(
        self, task: TrainTask, checkpoints: CheckpointStore, lease: Lease, stop: StopRequest, progress: Progress
    ) -> None:
        """Check that there can be enough workers, where that is known.

        Raises:
            ConfigError: If the Ray of this process has not got them.
        """
        self._task, self._checkpoints, self._lease, self._stop = task, checkpoints, lease, stop
        self._workers, self._output = task.config.workers, open_store(task.config.output)
        self._progress = progress
        newest = checkpoints.newest()
        self._shown_step = newest.step if newest else 0
        self._failures = FailureCount(self._workers.max_failures, newest.step if newest else -1)
        self._num_groups, self._validator = 0, Validator(task, checkpoints)
        _check_embedded(task.config)

    def run(self) -> tuple[CheckpointRecord, ModelFiles]:
        """The last checkpoint, and the model in it.

        Raises:
            StoppedError: If the driver was asked to end; the newest checkpoint is the one to go on from.
            PipelineError: What ended the run, as the class of its cause.
            KeyboardInterrupt: At Ctrl-C.
        """
        while True:
            self._check_stop()
            num_workers, avoided = wait_for_places(
                resources_of(self._workers),
                self._workers.fewest,
                self._workers.num_workers,
                report=say,
                check=self._check_stop,
            )
            self._lease.confirm()
            error, watch = self._run_group(num_workers, avoided)
            self._lease.confirm()
            finished = self._checkpoints.read_finished(self._task.config.steps)
            if finished is not None:
                self._validator.finish()
                return finished
            self._after(error, watch)

    def _run_group(self, num_workers: int, avoided: list[str]) -> tuple[Exception | None, GroupWatch]:
        workers = self._workers
        self._num_groups += 1
        if self._num_groups > 1:
            num_before = read_run_record(self._output).num_restarts
            record = update_run_record(self._output, num_restarts=num_before + 1)
            self._task.run.tag(RESTARTS_TAG, str(record.num_restarts))
        if num_workers < workers.num_workers or self._num_groups > 1:
            say(f"training with {num_workers} of {workers.num_workers} workers")
        self._task = self._task.of_group(self._num_groups)
        terms = GroupTerms(
            number=self._num_groups,
            num_workers=num_workers,
            min_workers=workers.fewest,
            max_workers=workers.num_workers,
            resources=resources_of(workers),
            resize_interval_s=workers.resize_interval_s,
            hang_timeout_s=hang_timeout_s(workers),
        )
        watch = GroupWatch(
            self._task.board,
            self._progress,
            self._stop,
            self._keep_stacks,
            lambda state: self._validator.look(state.checkpoint_step),
            terms,
            self._shown_step,
        )
        watch.begin()
        try:
            error = run_group(self._task, num_workers, avoided)
        finally:
            watch.end()
        self._shown_step = watch.state.step
        return error, watch

    def _after(self, error: Exception | None, watch: GroupWatch) -> None:
        """Decide what follows a group that has ended before the last step; returns if another is to be started."""
        state = watch.state
        if self._stop.reason is not None and error is not None:
            say(f"the workers failed while they were stopped: {failure_of(error, state).message}")
        self._check_stop()
        if state.divergence is not None:
            self._task = roll_back(self._task, state.divergence, state.step, self._output, self._checkpoints)
            self._failures = FailureCount(self._workers.max_failures, self._newest_step())
            return
        newest_step = self._newest_step()
        from_step = max(newest_step, 0)
        if error is None:
            if watch.leaving is None:
                raise TrainingFailedError(
                    f"{self._task.config.output}: the workers ended at step {from_step}, before step "
                    f"{self._task.config.steps}; --resume goes on"
                )
            say(f"the workers have left at step {from_step}: {watch.leaving}")
            return
        if (loss := self._loss(error, state)) is not None:
            if self._failures.is_one_loss_too_many(newest_step):
                raise TrainingFailedError(f"{loss}, {MAX_LOSSES} times without a new checkpoint; --resume goes on")
            say(f"{loss}; going on from step {from_step}")
            return
        failure = failure_of(error, state)
        if watch.hang is not None:
            failure = Failure(error=None, kind="", message=watch.hang, step=failure.step)
        reason = self._failures.why_not_again(failure, newest_step)
        if reason is not None:
            raise _final(failure, reason) from error
        at = f" at step {failure.step}" if failure.step >= 0 else ""
        say(
            f"the workers failed{at}: {failure.message}; going on from step {from_step} "
            f"(failure {self._failures.number} since, {self._workers.max_failures} allowed)"
        )

    def _loss(self, error: Exception, state: BoardState) -> str | None:
        """Which of the machines was lost; None: that is not why the group ended."""
        if gone := gone_nodes(member.node_id for member in state.members.values()):
            return f"lost {len(gone)} of the nodes that trained ({', '.join(gone)[:60]})"
        if was_preempted(error):
            return "a node of the workers was taken away"
        if found_no_room(error):
            return "the room for the workers went before they had started"
        return None

    def _newest_step(self) -> int:
        newest = self._checkpoints.newest()
        return newest.step if newest else -1

    def _check_stop(self) -> None:
        """Raises StoppedError if the driver is to end."""
        reason = self._stop.reason
        if reason is None:
            return
        newest = self._checkpoints.newest()
        where = (
            f"at step {newest.step}, checkpoint {self._checkpoints.uri(newest)}" if newest else "before a checkpoint"
        )
        raise StoppedError(f"{where}, because of {reason}; the same command with --resume goes on")

    def _keep_stacks(self, text: str) -> None:
        self._task.run.log_text(text, f"hangs/group-{self._num_groups}.txt")


def _check_embedded(config: TrainConfig) -> None:
    """A Ray of this process will never have more than it has: refuse at once what it cannot run."""
    if config.cluster.address is not None or "RAY_ADDRESS" in os.environ:
        return
    there = whole_cluster()
    for kind, amount in resources_of(config.workers).items():
        if there.get(kind, 0) < amount * config.workers.fewest:
            raise ConfigError(
                f"workers: {config.workers.fewest} need {amount * config.workers.fewest:g} {kind}s, Ray has "
                f"{there.get(kind, 0):.0f}; choose a smaller workers.num_workers, or another cluster"
            )


def _final(failure: Failure, reason: str) -> PipelineError:
    """What ends the run, as the class of its cause."""
    if failure.error is not None:
        return failure.error
    return TrainingFailedError(
        f"the training workers failed ({failure.message}); {reason}; --resume goes on from the last checkpoint"
    )
