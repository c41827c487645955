"""What one training worker does: read its lanes, step the network, and on rank 0 keep the run's record.

Runs inside a Ray Train worker, one DDP rank each; what a step computes is in training_step.py.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import ray
import ray.train
import ray.train.torch
import torch

from ddpm import ImportanceSampler, build_network
from pipeline.data.ingest import RankBatch, rank_batches
from pipeline.models.model_source import activate_source
from pipeline.models.network_pass import laid_out
from pipeline.progress import say, send_lines_to
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.fork import begin_with_fork
from pipeline.training.metrics.system_metrics import SystemMetrics
from pipeline.training.metrics.telemetry import StepClock, highest, peak_memory_bytes
from pipeline.training.run_record import read_run_record, refuse_to_begin_again
from pipeline.training.train_board import Divergence, Orders
from pipeline.training.train_config import data_order
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.group_control import GroupControl
from pipeline.training.worker.health import TooManySkipped
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.rank_zero import RankZero, is_averages_turn
from pipeline.training.worker.restore import restore_newest
from pipeline.training.worker.step_profile import StepProfile
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruments:
    """What watches the steps of a worker."""

    system: SystemMetrics
    """Its machine."""
    profile: StepProfile
    """Where the time of some steps goes."""


def train_worker(task: TrainTask) -> None:
    """Train to the last step, from the newest good checkpoint if there is one.

    Raises:
        PipelineError: As its subclasses say; the run can be resumed.
    """
    config = task.config
    os.environ[PATIENCE_VARIABLE] = str(task.patience_minutes)
    torch.set_num_threads(config.workers.cpus_per_worker)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    if rank == 0:
        send_lines_to(task.board.say.remote)  # among them that a store gives no answer
    with GroupControl(task, rank) as control:
        if not control.is_to_leave():
            _train(task, control, rank, world)


def _train(task: TrainTask, control: GroupControl, rank: int, world: int) -> None:
    config, device = task.config, ray.train.torch.get_device()
    if task.source is not None:
        activate_source(task.source, config.network)
    checkpoints = CheckpointStore.of_run(config.output)
    state = _initial_state(task, device, rank, world)
    restored = restore_newest(
        state,
        checkpoints,
        is_reader=ray.train.get_context().get_local_rank() == 0,
        device=device,
        may_start_anew=config.start_over,
    )
    if restored is None and rank == 0:  # DDP gives rank 0's weights to the others
        refuse_to_begin_again(read_run_record(open_store(config.output)), config)
        state = _initial_state(task, device, rank, world, begin=True)
    rank_zero = RankZero(task, checkpoints, state, device, restored) if rank == 0 else None
    batches = rank_batches(
        config.dataset,
        task.manifest,
        "train",
        data_order(config, task.manifest),
        config.data,
        rank=rank,
        world=world,
        start_step=state.step,
        stop_step=config.steps,
    )
    context = ray.train.get_context()
    instruments = Instruments(
        system=SystemMetrics(device, node=context.get_node_rank(), is_first=context.get_local_rank() == 0),
        profile=StepProfile(config.profile if rank == 0 else 0, device, partial(_keep_profile, task, state)),
    )
    _fit(task, control, state, batches, rank_zero, device, instruments)


def _initial_state(
    task: TrainTask, device: torch.device, rank: int, world: int, *, begin: bool = False
) -> TrainingState:
    """A state to restore into or, with `begin`, that of step 0, whose weights may be another model's."""
    config = task.config
    network = build_network(task.model_config, seed=config.seed, gradient_checkpointing=config.gradient_checkpointing)
    if begin:
        begin_with_fork(config, network, task.fork_digest)
    importance = None
    if config.objective.t_choice == "importance":
        importance = ImportanceSampler(task.model_config.schedule.num_timesteps, device=device)
    return TrainingState(
        laid_out(network, device, channels_last=config.channels_last),
        config.optimizer,
        sigma_rels=config.post_hoc_ema.tracked,
        importance=importance,
        rank=rank,
        world=world,
    )


def _fit(
    task: TrainTask,
    control: GroupControl,
    state: TrainingState,
    batches: Iterator[RankBatch],
    rank_zero: RankZero | None,
    device: torch.device,
    instruments: Instruments,
) -> None:
    """Train, and close the run's record whatever happens."""
    try:
        is_finished = _steps(task, control, state, batches, rank_zero, device, instruments)
        if rank_zero is not None and is_finished:
            rank_zero.finish()
    except TooManySkipped as error:
        # On all ranks alike, and no failure that is counted: the driver goes back to a checkpoint.
        control.end()
        control.diverged(Divergence(steps=error.steps, message=str(error)))
    finally:
        instruments.profile.close()
        if rank_zero is not None:
            rank_zero.close()


def _steps(
    task: TrainTask,
    control: GroupControl,
    state: TrainingState,
    batches: Iterator[RankBatch],
    rank_zero: RankZero | None,
    device: torch.device,
    instruments: Instruments,
) -> bool:
    """Whether all steps were made, and the group was not asked to leave."""
    config, step = task.config, TrainingStep(task, state, device)
    clock, totals = StepClock(), LossTotals(task.model_config.schedule.num_timesteps, device)
    watch, left_out, grad_norm = LossWatch(), frozenset(task.left_out_steps), None
    first_step = state.step
    control.begin(first_step)

    def report() -> None:
        """Collective; waits for the device."""
        losses, throughput = totals.reduce(), clock.interval()
        waits = {"data_wait_share": throughput.data_wait_share, "peak_memory_bytes": float(peak_memory_bytes(device))}
        of_all = highest(waits, device) | instruments.system.gather()
        watch.report()
        if rank_zero is not None:
            norm = dict[str, float]() if grad_norm is None else {"grad_norm": float(grad_norm)}
            rank_zero.log(losses | norm | of_all, throughput)

    for batch, waited_s in _timed(batches):
        clock.waited(waited_s)
        orders = control.agreed(state.step)
        if Orders.LEAVE in orders or Orders.SAVE in orders:
            step.check_skips()
        if Orders.LEAVE in orders and state.step % config.log_interval_steps and state.step > first_step:
            report()  # what was trained since the last report, which nobody trains again
        if _follow(orders, control, state, rank_zero):
            return False
        if state.step in left_out:
            state.leave_out()
        else:
            grad_norm = step(batch, totals, watch)
            clock.stepped(config.global_batch)
        is_last = state.step == config.steps
        is_logged = is_last or state.step % config.log_interval_steps == 0
        if is_logged or state.step % config.checkpoint_interval_steps == 0:
            step.check_skips()  # before the checkpoint: one that is gone back to is none of a run that has diverged
        if is_logged:
            report()
        instruments.profile.step()
        with clock.paused():
            if is_averages_turn(config, state.step):
                state.averages.gather()
            if rank_zero is not None:
                rank_zero.after_step()
    control.end()
    return True


def _keep_profile(task: TrainTask, state: TrainingState, trace: bytes, table: str) -> None:
    task.run.log_file(trace, f"profile/step-{state.step:09d}.json.gz")
    task.run.log_text(table, f"profile/step-{state.step:09d}.txt")
    say(f"a trace of the steps up to {state.step} is in the MLflow run, under profile/; ui.perfetto.dev shows it")


def _follow(orders: Orders, control: GroupControl, state: TrainingState, rank_zero: RankZero | None) -> bool:
    """Do what the driver asks; whether the group leaves."""
    if Orders.LOOK_FOR_PREEMPTION in orders:
        control.look_for_preemption()
    is_leaving = Orders.LEAVE in orders
    if is_leaving:
        control.end()
    if is_leaving or Orders.SAVE in orders:
        state.averages.gather()
        if rank_zero is not None:
            rank_zero.save_now()
    return is_leaving


def _timed(batches: Iterator[RankBatch]) -> Iterator[tuple[RankBatch, float]]:
    """Each batch with the seconds that it was waited for."""
    iterator = iter(batches)
    while True:
        started_s = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started_s
