"""The averaged model of each checkpoint, measured on held-out images beside training: a task of its own.

It never stops training: a task that fails, or finds no room, is a line. It runs at the lowest priority, one at a time;
checkpoints that come meanwhile are passed over, all but the last one.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ddpm import LikelihoodConfig
from pipeline.data.image_stream import LabelledImages
from pipeline.errors import CheckpointError
from pipeline.measuring.bound import FEW_PILOT_IMAGES, BoundMeter
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.measuring.held_out_loss import held_out_loss
from pipeline.models.model_files import load_model
from pipeline.progress import say
from pipeline.ray_errors import own_error
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.side_work import SideWork
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_task import TrainTask

_BATCH_IMAGES = 64
_LAST_WAIT_S, _SILENT_S = 600.0, 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """A task."""

    step: int
    """Of the checkpoint."""
    answer: Any
    """Its reference."""


class Validator:
    """The driver's side; of one thread at a time.

    Args:
        task: What the workers get.
        checkpoints: The run's checkpoints.
    """

    def __init__(self, task: TrainTask, checkpoints: CheckpointStore) -> None:
        """Nothing is measured yet."""
        self._task, self._checkpoints, self._config = task, checkpoints, task.config.validation
        self._side_work = SideWork("measuring a checkpoint on held-out images", say)
        held_out = task.manifest.splits.get("held_out")
        self._is_on = self._config.num_images > 0 and held_out is not None and len(held_out.shards) > 0
        self._running: _Running | None = None
        self._asked_step = -1
        self._started_s = -float("inf")

    def look(self, step: int) -> None:
        """Take an answer that has come, and measure the newest checkpoint if it is time; waits for nothing.

        Args:
            step: Of the newest checkpoint that is known; -1 for none.
        """
        if not self._is_on:
            return
        self._take(timeout_s=0.0)
        is_time = time.monotonic() - self._started_s >= self._config.interval_s
        if self._running is None and step > self._asked_step and is_time:
            self._start(step)

    def finish(self) -> None:
        """Measure the last checkpoint, if it was not, and wait for that for some minutes."""
        newest = self._checkpoints.newest() if self._is_on else None
        if newest is None:
            return
        if self._running is not None and self._running.step != newest.step:
            ray.cancel(self._running.answer, force=True)
            self._running = None
        if self._asked_step != newest.step:
            self._start(newest.step)
        self._take(timeout_s=_SILENT_S)
        if self._running is not None:
            say(f"measuring the last checkpoint on held-out images, for up to {_LAST_WAIT_S:.0f} s")
            self._take(timeout_s=_LAST_WAIT_S)
        if self._running is not None:
            say(f"the last checkpoint is not measured on held-out images after {_LAST_WAIT_S:.0f} s: given up")
            ray.cancel(self._running.answer, force=True)
        self._side_work.sum_up()

    def _start(self, step: int) -> None:
        self._asked_step, self._started_s = step, time.monotonic()
        options: dict[str, Any] = {"num_gpus": 1} if self._config.use_gpu else {}
        # max_calls: its process, which has given up its priority, serves nobody else.
        remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1, **options)(_serve)
        # The board and the run stay here.
        self._running = _Running(step=step, answer=remote.remote(step, *_inputs(self._task)))

    def _take(self, *, timeout_s: float) -> None:
        running = self._running
        if running is None or not ray.wait([running.answer], timeout=timeout_s)[0]:
            return
        self._running = None
        with self._side_work.attempt(running.step):
            try:
                figures: dict[str, float] = ray.get(running.answer)
            except ray.exceptions.RayError as error:
                raise own_error(error) or error from None
            self._task.run.log_metrics(figures, running.step)


def _inputs(task: TrainTask) -> tuple[Any, ...]:
    return task.config, task.source, task.patience_minutes


def _serve(step: int, config: TrainConfig, source: bytes | None, patience_minutes: float) -> dict[str, float]:
    """In a process of its own, at the lowest priority."""
    os.environ[PATIENCE_VARIABLE] = str(patience_minutes)
    os.nice(19)
    # Where GPUs train, the processors have time.
    torch.set_num_threads((os.cpu_count() or 1) if config.workers.use_gpu else config.workers.cpus_per_worker)
    return measure_checkpoint(config, step, source)


def measure_checkpoint(config: TrainConfig, step: int, source: bytes | None) -> dict[str, float]:
    """The figures of a checkpoint's averaged model on held-out images.

    Args:
        config: The run's.
        step: The checkpoint's.
        source: Source of the run's own network: a model that comes with any other code is not built.

    Returns:
        `validation_loss`, which is the objective's, and `validation_bits_per_dim`, with their standard errors.

    Raises:
        PipelineError: If the checkpoint or the dataset cannot be read.
    """
    device = torch.device("cuda" if config.validation.use_gpu else "cpu")
    checkpoints = CheckpointStore.of_run(config.output)
    record = next((record for record in checkpoints.candidates() if record.step == step), None)
    if record is None:
        raise CheckpointError(f"{checkpoints.root}: the checkpoint of step {step} is gone; keep more of them")
    files = checkpoints.read_model(record)
    files = dataclasses.replace(files, trusted=files.source == source)  # the driver's own code, and no other
    _, model = load_model(files, checkpoints.uri(record))
    model = model.to(device)
    dataset = EvaluationDataset(config.dataset)

    def stream() -> Iterator[LabelledImages]:
        groups = dataset.stream("held_out", config.validation.num_images)
        return groups if model.null_label is not None else (group.without_labels() for group in groups)

    loss = held_out_loss(
        model,
        config.objective,
        stream(),
        seed=config.seed,
        draws=config.validation.draws,
        batch_size=_BATCH_IMAGES,
        device=device,
    )
    meter = BoundMeter(
        model=model, seed=config.seed, batch_size=_BATCH_IMAGES, device=device, pilot_images=FEW_PILOT_IMAGES
    )
    terms = LikelihoodConfig(terms="importance", terms_per_image=config.validation.draws)
    bits = meter.bound(stream(), terms).bits_per_dim
    return {
        "validation_loss": loss.value,
        "validation_loss_standard_error": loss.standard_error,
        "validation_bits_per_dim": bits.value,
        "validation_bits_per_dim_standard_error": bits.standard_error,
    }
