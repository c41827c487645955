"""How much of the hardware, and of the time, a training run makes use of."""

import time

import torch

from ddpm import flops_per_image
from pipeline.training.metrics.matrix_rate import PASSES_PER_STEP, matrix_flops_per_s
from pipeline.training.metrics.telemetry import Throughput
from pipeline.training.train_task import TrainTask


class Efficiency:
    """The figures of a run, measured against what the device of this worker can do.

    Args:
        task: What the worker was given.
        device: Where the network lives.
        world: Number of workers.
    """

    def __init__(self, task: TrainTask, device: torch.device, world: int) -> None:
        """Measure the device, in the precision of the run."""
        dtype = torch.bfloat16 if task.config.precision == "bf16" else torch.float32
        self._flops_per_image = PASSES_PER_STEP * flops_per_image(task.model_config) / world
        self._most = matrix_flops_per_s(device, dtype)
        self._begun_at_s, self._batch = task.begun_at_s, task.config.global_batch
        self._num_images, self._productive_s = 0, 0.0

    def of(self, throughput: Throughput, step: int) -> dict[str, float]:
        """Metrics of an interval; each interval of this worker once.

        Args:
            throughput: Of the interval.
            step: Steps that are behind the run.

        Returns:
            `model_flops_per_s` of one device, `model_flops_utilisation` (its share of the measured rate of matrix
            products), and `goodput`: the share of the time since the run began that the steps behind it take at the
            speed that this worker has seen. What was computed twice, waited for, or lost with a machine is the rest.
        """
        flops_per_s = throughput.images_per_s * self._flops_per_image
        figures = {"model_flops_per_s": flops_per_s, "model_flops_utilisation": flops_per_s / self._most}
        self._num_images += throughput.num_images
        self._productive_s += throughput.productive_s
        if self._begun_at_s is not None and self._num_images:
            needed_s = step * self._batch * self._productive_s / self._num_images
            figures["goodput"] = min(1.0, needed_s / max(time.time() - self._begun_at_s, 1e-9))
        return figures
