"""What the driver of a training run hands to its workers."""

from dataclasses import dataclass
from typing import Any

from ddpm import ModelConfig
from pipeline.data.manifest import DatasetManifest
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTask:
    """Everything that a worker is given; the driver makes it once."""

    config: TrainConfig
    """The run's configuration, its places absolute: a worker runs in another folder than the driver."""
    manifest: DatasetManifest
    """The dataset, so that no worker reads another one."""
    model_config: ModelConfig
    """The network in the shape of the dataset."""
    source: bytes | None
    """Source of the caller's own network."""
    run: TrackingRun
    """The MLflow run that rank 0 joins."""
    board: Any
    """Handle of the driver's progress board."""
    start_over: bool = False
    """Begin at step 0 where there are checkpoints and none of them can be used; otherwise that ends the run."""
