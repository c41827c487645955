"""One optimiser step on one rank, and the losses since the last report.

The global batch and all of its noise are functions of the step, so nothing here depends on the number of workers except
the order of floating-point sums, and dropout, whose masks are drawn for each micro-batch by its place in the global
batch.
"""

import torch
import torch.distributed
from torch import Tensor

from ddpm import (
    ChosenTimesteps,
    DiffusionModel,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
    stratified_timesteps,
)
from pipeline.data.ingest import RankBatch
from pipeline.training.train_config import data_order
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.device_copy import DeviceCopy
from pipeline.training.worker.health import SkipLimit
from pipeline.training.worker.loss_watch import LossWatch, summary_of
from pipeline.training.worker.network_setup import set_up
from pipeline.training.worker.training_state import TrainingState

_NUM_QUARTILES = 4


class TrainingStep:
    """One optimiser step on one rank; collective.

    Args:
        task: What the worker was given.
        state: The state in training.
        device: Where the network lives.
    """

    def __init__(self, task: TrainTask, state: TrainingState, device: torch.device) -> None:
        """Prepare the network for this rank's part of the batch."""
        self._config, self._state, self._device = task.config, state, device
        rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        order = data_order(task.config, task.manifest)
        # A lane's place in the global batch is the same whoever reads it: that is what a slot is.
        lanes = [order.rank_lanes(of, self._world) for of in range(self._world)]
        rows = [len(own) * order.lane_rows_per_step for own in lanes]
        self._first_slot = first = lanes[rank].start * order.lane_rows_per_step
        self._slots = torch.arange(first, first + rows[rank], device=device)
        self._network, self._micro_batches = set_up(task, state, device, rank=rank, rows=rows)
        if state.step == 0:
            state.averages.begin(state.network)
        self._model = DiffusionModel.of(task.model_config, self._network)
        self._skip_limit = SkipLimit(task.config, task.left_out_steps, state.skipped_steps)
        self._to_device = DeviceCopy(device)
        self._summaries: dict[int, Tensor] = {}  # of this rank's part of the steps since the last look

    def __call__(self, batch: RankBatch, totals: "LossTotals", watch: LossWatch) -> Tensor:
        """Train on this rank's part of a global batch; nothing waits for the device.

        Returns:
            The norm of the whole gradient before clipping, 0-dim on the device.
        """
        config, state, step = self._config, self._state, self._state.step
        sample_ids, epochs = self._to_device(batch.sample_ids), self._to_device(batch.epochs)
        images = self._to_device(batch.images)
        label = None if batch.labels is None or self._model.null_label is None else self._to_device(batch.labels)
        chosen = self._choose_t(step)
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in self._micro_batches:
            noised = make_training_batch(
                self._model,
                images_to_x_0(images[rows], self._model.num_levels),
                None if label is None else label[rows],
                seed=config.seed,
                sample_ids=sample_ids[rows],
                epochs=epochs[rows],
                flip=config.horizontal_flip,
                label_drop=config.label_drop,
                timesteps=None if chosen is None else ChosenTimesteps(t=chosen.t[rows], weight=chosen.weight[rows]),
            )
            with self._network.shared(is_last=rows is self._micro_batches[-1]):
                self._seed_dropout(step, rows)
                losses = per_sample_loss(self._model, noised, objective=config.objective)
                # DDP averages gradients over ranks; ranks may hold different numbers of images.
                loss = (losses * noised.weight).sum() * (self._world / config.global_batch)
                # An infinite loss may have a finite gradient: NaN in its place reaches every rank with DDP's average.
                torch.autograd.backward(loss, torch.where(loss.isfinite(), torch.ones_like(loss), torch.nan))
            parts.append((noised.t, losses.detach()))
        t, losses = (torch.cat(column) for column in zip(*parts))
        grad_norm = state.apply_gradient(config.global_batch)
        is_finite = grad_norm.isfinite()
        self._summaries[step] = summary = summary_of(losses, sample_ids)
        totals.add(t, losses, is_finite)
        watch.add(step, summary, is_finite)
        if state.importance is not None:
            state.importance.update(*self._gather_in_slot_order(t, losses), is_trained=is_finite)
        return grad_norm

    def check_skips(self) -> None:
        """Learn which steps were skipped since the last call; every rank calls it after the same step.

        Raises:
            TooManySkipped: If too many were.
        """
        summaries, self._summaries = self._summaries, {}
        self._skip_limit.check(self._state.skipped_steps, summaries)

    def _seed_dropout(self, step: int, rows: slice) -> None:
        """By the step and the micro-batch's place in the global batch, whichever rank has it."""
        first = int(rows.start) + self._first_slot
        torch.manual_seed(((self._config.seed * 1_000_003 + step) * 2**31 + first) % 2**63)

    def _choose_t(self, step: int) -> ChosenTimesteps | None:
        """The t of this rank's slots; None where each sample draws its own."""
        config, slots = self._config, self._slots
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
        whole[:, self._slots] = torch.stack((t.double(), losses.double()))
        torch.distributed.all_reduce(whole)
        return whole[0].long(), whole[1]


class LossTotals:
    """Losses since the last report, in all and by quartile of t, summed over ranks when reported.

    Args:
        num_timesteps: T.
        device: Where the losses are.
    """

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        """Begin with none."""
        self._num_timesteps = num_timesteps
        self._sums = torch.zeros(2, _NUM_QUARTILES, dtype=torch.float64, device=device)

    def add(self, t: Tensor, losses: Tensor, is_finite: Tensor) -> None:
        """Count the losses [b] of a step at their t [b], unless the step is skipped; nothing waits for the device.

        Args:
            t: Step indices [b].
            losses: Losses [b].
            is_finite: 0-dim, on the device; not of these losses, but of the whole step.
        """
        quartile = t * _NUM_QUARTILES // self._num_timesteps
        losses = losses.double()
        # where, because 0 * NaN is NaN.
        self._sums[0].index_add_(0, quartile, torch.where(is_finite, losses, 0.0))
        self._sums[1].index_add_(0, quartile, torch.where(is_finite, torch.ones_like(losses), 0.0))

    def reduce(self) -> dict[str, float]:
        """Collective: every rank calls it; the means over the global batches since the last call."""
        torch.distributed.all_reduce(self._sums)
        (sums, counts), _ = self._sums.tolist(), self._sums.zero_()
        means = {f"loss_t_quartile_{q + 1}": sums[q] / counts[q] for q in range(_NUM_QUARTILES) if counts[q]}
        return {"loss": sum(sums) / sum(counts)} | means if sum(counts) else means
