"""What one training worker does: read its lanes, step the network, and on rank 0 keep the run's record.

Runs inside a Ray Train worker, one DDP rank each. The global batch and all of its noise are functions of the step, so
nothing here depends on the number of workers except the order of floating-point sums; dropout alone is seeded by step
and rank.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm import (
    ChosenTimesteps,
    DiffusionModel,
    ImportanceSampler,
    build_network,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
    stratified_timesteps,
)
from pipeline.data.ingest import RankBatch, rank_batches
from pipeline.errors import TrainingDivergedError
from pipeline.models.model_source import activate_source
from pipeline.progress import send_lines_to
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints import CheckpointStore
from pipeline.training.fork import begin_with_fork
from pipeline.training.rank_zero import RankZero
from pipeline.training.restore import restore_newest
from pipeline.training.run_record import read_run_record, refuse_to_begin_again
from pipeline.training.telemetry import StepClock
from pipeline.training.train_config import data_order
from pipeline.training.train_task import TrainTask
from pipeline.training.training_state import TrainingState

_NUM_QUARTILES = 4


def train_worker(task: TrainTask) -> None:
    """Train to the last step, from the newest good checkpoint if there is one.

    Raises:
        PipelineError: As its subclasses say; the run can be resumed.
    """
    config = task.config
    os.environ[PATIENCE_VARIABLE] = str(task.patience_minutes)
    torch.set_num_threads(config.workers.cpus_per_worker)
    if task.source is not None:
        activate_source(task.source, config.network)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if rank == 0:
        send_lines_to(task.board.say.remote)  # among them that a store gives no answer
    checkpoints = CheckpointStore.of_run(config.output)
    state = _initial_state(task, device, keep_ema=rank == 0)
    restored = restore_newest(
        state,
        checkpoints,
        is_reader=ray.train.get_context().get_local_rank() == 0,
        device=device,
        may_start_anew=config.start_over,
    )
    if restored is None and rank == 0:  # DDP gives rank 0's weights to the others
        refuse_to_begin_again(read_run_record(open_store(config.output)), config)
        state = _initial_state(task, device, keep_ema=True, begin=True)
    rank_zero = RankZero(task, checkpoints, state, device) if rank == 0 else None
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
    _fit(task, state, batches, rank_zero, device)


def _initial_state(task: TrainTask, device: torch.device, *, keep_ema: bool, begin: bool = False) -> TrainingState:
    """A state to restore into or, with `begin`, that of step 0, whose weights may be another model's."""
    config = task.config
    network = build_network(task.model_config, seed=config.seed, gradient_checkpointing=config.gradient_checkpointing)
    if begin:
        begin_with_fork(config, network, task.fork_digest)
    importance = None
    if config.objective.t_choice == "importance":
        importance = ImportanceSampler(task.model_config.schedule.num_timesteps)
    return TrainingState(
        network.to(device),
        config.optimizer,
        keep_ema=keep_ema,
        sigma_rels=config.post_hoc_ema.tracked,
        importance=importance,
    )


def _fit(
    task: TrainTask,
    state: TrainingState,
    batches: Iterator[RankBatch],
    rank_zero: RankZero | None,
    device: torch.device,
) -> None:
    """Train, and close the run's record whatever happens."""
    try:
        _steps(task, state, batches, rank_zero, device)
        if rank_zero is not None:
            rank_zero.finish()
    except TrainingDivergedError as error:
        # On all ranks alike. Raised here it would only be tried again, to the same end.
        ray.get(task.board.fail.remote(str(error)))
    finally:
        if rank_zero is not None:
            rank_zero.close()


def _steps(
    task: TrainTask,
    state: TrainingState,
    batches: Iterator[RankBatch],
    rank_zero: RankZero | None,
    device: torch.device,
) -> None:
    config, step = task.config, _Step(task, state, device)
    clock, totals = StepClock(), _LossTotals(task.model_config.schedule.num_timesteps, device)
    for batch, waited_s in _timed(batches):
        clock.waited(waited_s)
        grad_norm = step(batch, totals)
        clock.stepped(config.global_batch)
        if state.step % config.log_interval_steps == 0 or state.step == config.steps:
            losses, throughput = totals.reduce(), clock.interval()
            if rank_zero is not None:
                rank_zero.log(losses | {"grad_norm": grad_norm}, throughput)
        if rank_zero is not None and rank_zero.after_step():
            clock.interval()  # grids and checkpoints are not training's throughput


class _Step:
    """One optimiser step on one rank."""

    def __init__(self, task: TrainTask, state: TrainingState, device: torch.device) -> None:
        self._config, self._state, self._device = task.config, state, device
        ddp = DistributedDataParallel(
            state.network.train(), device_ids=[device.index] if device.type == "cuda" else None
        )
        self._model = DiffusionModel.of(task.model_config, ddp)
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        order = data_order(task.config, task.manifest)
        # A lane's place in the global batch is the same whoever reads it: that is what a slot is.
        self._slots = [
            torch.arange(lanes.start * order.lane_rows_per_step, lanes.stop * order.lane_rows_per_step)
            for lanes in (order.rank_lanes(rank, self._world) for rank in range(self._world))
        ]

    def __call__(self, batch: RankBatch, totals: "_LossTotals") -> float:
        config, state = self._config, self._state
        label = None if batch.labels is None or self._model.null_label is None else self._on_device(batch.labels)
        chosen = self._choose_t(state.step)
        noised = make_training_batch(
            self._model,
            images_to_x_0(self._on_device(batch.images), self._model.num_levels),
            label,
            seed=config.seed,
            sample_ids=self._on_device(batch.sample_ids),
            epochs=self._on_device(batch.epochs),
            flip=config.horizontal_flip,
            label_drop=config.label_drop,
            timesteps=chosen,
        )
        torch.manual_seed(((config.seed * 1_000_003 + state.step) * 65_537 + self._rank) % 2**63)  # dropout only
        losses = per_sample_loss(self._model, noised, objective=config.objective)
        # DDP averages gradients over ranks; ranks may hold different numbers of images.
        torch.autograd.backward((losses * noised.weight).sum() * (self._world / config.global_batch))
        this_step, skipped = state.step, len(state.skipped_steps)
        grad_norm = state.apply_gradient(config.global_batch)
        if len(state.skipped_steps) == skipped:
            totals.add(noised.t, losses.detach())
            if state.importance is not None:
                state.importance.update(*self._gather_in_slot_order(noised.t, losses.detach()))
        elif len(state.skipped_steps) > config.max_skipped_batches:
            worst = batch.sample_ids[int(losses.detach().nan_to_num(torch.inf, torch.inf).argmax())]
            raise TrainingDivergedError(
                f"step {this_step}: the loss or its gradient is not finite, for the {len(state.skipped_steps)}th time "
                f"(max_skipped_batches is {config.max_skipped_batches}); highest loss on this rank at sample {worst}; "
                "start anew with a lower optimizer.learning_rate, or raise max_skipped_batches and --resume"
            )
        return grad_norm

    def _choose_t(self, step: int) -> ChosenTimesteps | None:
        """The t of this rank's slots; None where each sample draws its own."""
        config, slots = self._config, self._slots[self._rank].to(self._device)
        match config.objective.t_choice:
            case "stratified":
                return stratified_timesteps(
                    self._model.schedule.num_timesteps,
                    seed=config.seed,
                    step=step,
                    slots=slots,
                    global_batch=config.global_batch,
                )
            case "importance":
                assert self._state.importance is not None
                return self._state.importance.draw(seed=config.seed, step=step, slots=slots)
        return None

    def _gather_in_slot_order(self, t: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Collective: t and losses of the whole global batch, equal on every rank and for any number of ranks."""
        # gather wants equal sizes, and ranks may hold different numbers of lanes: everyone fills in its own places.
        whole = torch.zeros(2, self._config.global_batch, dtype=torch.float64, device=self._device)
        whole[:, self._slots[self._rank].to(self._device)] = torch.stack((t.double(), losses.double()))
        torch.distributed.all_reduce(whole)
        return whole[0].long(), whole[1]

    def _on_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self._device)


class _LossTotals:
    """Losses since the last report, in all and by quartile of t, summed over ranks when reported."""

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self._num_timesteps = num_timesteps
        self._sums = torch.zeros(2, _NUM_QUARTILES, dtype=torch.float64, device=device)

    def add(self, t: Tensor, losses: Tensor) -> None:
        quartile = t * _NUM_QUARTILES // self._num_timesteps
        self._sums[0].index_add_(0, quartile, losses.double())
        self._sums[1].index_add_(0, quartile, torch.ones_like(losses, dtype=torch.float64))

    def reduce(self) -> dict[str, float]:
        """Collective: every rank calls it; the means over the global batches since the last call."""
        torch.distributed.all_reduce(self._sums)
        (sums, counts), _ = self._sums.tolist(), self._sums.zero_()
        means = {f"loss_t_quartile_{q + 1}": sums[q] / counts[q] for q in range(_NUM_QUARTILES) if counts[q]}
        return {"loss": sum(sums) / sum(counts)} | means if sum(counts) else means


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
