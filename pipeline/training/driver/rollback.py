"""Going back, once in a run, to the last checkpoint before too many batches had to be left out, and past them.

What is decided is recorded in run.json before anything is changed, so that a driver that is killed in between does it
to the end when it is resumed: `finish_roll_back` is safe to repeat.
"""

import dataclasses

from pipeline.errors import TrainingDivergedError
from pipeline.progress import say
from pipeline.stores.object_store import ObjectStore
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.run_record import RUN_RECORD, RollbackRecord, RunRecord, read_run_record, update_run_record
from pipeline.training.train_board import Divergence
from pipeline.training.train_task import TrainTask

ROLLED_BACK_TAG = "ddpm.rolled_back"


def roll_back(
    task: TrainTask, divergence: Divergence, reached_step: int, output: ObjectStore, checkpoints: CheckpointStore
) -> TrainTask:
    """Go back to the newest checkpoint before the steps that were left out, or to the oldest that there is.

    Args:
        task: What the workers got.
        divergence: Which steps were left out.
        reached_step: Steps that the workers had behind them, as far as was logged.
        output: The run's folder.
        checkpoints: The run's checkpoints.

    Returns:
        What the next workers get: those batches are left out from the start.

    Raises:
        TrainingDivergedError: If the run has gone back once before.
        StorageError: If the store does not answer, or later checkpoints cannot be removed.
    """
    if read_run_record(output).rollback is not None:
        raise TrainingDivergedError(
            f"{divergence.message}; the run has gone back to a checkpoint once before: start anew with a lower "
            "optimizer.learning_rate, or raise max_skipped_batches and --resume"
        )
    to_step = _step_to_go_back_to(divergence.steps, checkpoints)
    rollback = RollbackRecord(
        to_step=to_step, from_step=max(reached_step, max(divergence.steps) + 1), left_out_steps=divergence.steps
    )
    record = update_run_record(output, rollback=rollback)
    steps = ", ".join(map(str, divergence.steps))
    say(f"{divergence.message}; going back to step {to_step} and past the batches of steps {steps}")
    task.run.tag(
        ROLLED_BACK_TAG, f"from step {rollback.from_step} to {to_step}, left out {steps}; logged again from there"
    )
    finish_roll_back(output, checkpoints)
    return with_rollback(task, record)


def _step_to_go_back_to(steps: tuple[int, ...], checkpoints: CheckpointStore) -> int:
    """A checkpoint amid those steps has finite weights too: better than none at all."""
    kept = [record.step for record in checkpoints.candidates()]
    return next((step for step in kept if step <= min(steps)), min(kept, default=0))


def finish_roll_back(output: ObjectStore, checkpoints: CheckpointStore) -> None:
    """Remove the checkpoints that a recorded return has made void, unless that is done; for the lease's holder.

    Raises:
        StorageError: If the store does not answer, or a record cannot be removed.
    """
    if output.stat(RUN_RECORD) is None:
        return
    rollback = read_run_record(output).rollback
    if rollback is None or rollback.is_done:
        return
    checkpoints.remove_after(rollback.to_step)
    update_run_record(
        output, rollback=dataclasses.replace(rollback, is_done=True), has_checkpoints=not checkpoints.is_empty()
    )


def with_rollback(task: TrainTask, record: RunRecord) -> TrainTask:
    """What workers get in a run that has gone back."""
    return task if record.rollback is None else dataclasses.replace(task, rollback=record.rollback)
