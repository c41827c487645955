"""Where the figures of an interval go: into the MLflow run, to Prometheus, onto the driver's terminal."""

import torch
import torch.distributed

from pipeline.progress import say
from pipeline.training.metrics.efficiency import Efficiency
from pipeline.training.metrics.gauges import Gauges
from pipeline.training.metrics.telemetry import Throughput
from pipeline.training.run_record import RateRecord
from pipeline.training.side_work import SideWork
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.training_state import TrainingState


class IntervalLog:
    """Figures of a run, logged by one rank.

    Args:
        task: What the worker was given.
        device: Where the network lives.
    """

    def __init__(self, task: TrainTask, device: torch.device) -> None:
        """Log nothing yet."""
        self._task, self._device = task, device
        self.rate: RateRecord | None = None
        """How fast training is; None before the first interval."""
        self._efficiency: Efficiency | None = None
        self._gauges = Gauges(task.config.run_name)
        self._measuring = SideWork("measuring the hardware", say)
        self._showing = SideWork("telling Ray's metrics", say)

    def log(self, state: TrainingState, metrics: dict[str, float], throughput: Throughput) -> None:
        """Log an interval's figures under the present step.

        Args:
            state: The state in training.
            metrics: Losses, and what was gathered from all ranks.
            throughput: Of this rank.
        """
        metrics = metrics | {
            "learning_rate": state.learning_rate,
            "images_per_s": throughput.images_per_s,
            "skipped_batches": float(len(state.skipped_steps)),
        }
        world = torch.distributed.get_world_size()
        self.rate = RateRecord(images_per_s=throughput.images_per_s, num_workers=world)
        with self._measuring.attempt(state.step):
            if self._efficiency is None:
                self._efficiency = Efficiency(self._task, self._device, world)
            metrics |= self._efficiency.of(throughput, state.step)
        self._task.run.log_metrics(metrics, state.step)
        with self._showing.attempt(state.step):
            self._gauges.show(metrics | {"step": float(state.step)})
        loss = f"loss {metrics['loss']:.4f}, " if "loss" in metrics else ""
        self._task.board.update.remote(self._task.group, state.step, f"{loss}{throughput.images_per_s:.0f} img/s")

    def close(self) -> None:
        """Say what failed more than once."""
        for side_work in (self._measuring, self._showing):
            side_work.sum_up()
