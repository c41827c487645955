"""What the driver of a training run hands to its workers."""

from dataclasses import dataclass, replace
from typing import Any

from ddpm import ModelConfig
from pipeline.data.manifest import DatasetManifest
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.run_record import RollbackRecord
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
    fork_digest: str | None
    """Digest of the model that the run began with; None where that was none."""
    lease_token: str
    """Names the lease under which the workers write; once another stands in the store, they stop."""
    patience_minutes: float
    """How long servers that are away are waited for, as the driver was told: its environment does not travel."""
    run: TrackingRun
    """The MLflow run that rank 0 joins."""
    board: Any
    """Handle of the driver's board."""
    begun_at_s: float | None = None
    """When the run was begun, Unix time; None where that is not known."""
    group: int = 0
    """Number of the group of workers; the board hears no other."""
    rollback: RollbackRecord | None = None
    """That the run has gone back once."""

    @property
    def left_out_steps(self) -> tuple[int, ...]:
        """Global batches that are read and not trained on, because they were not finite before the run went back."""
        return () if self.rollback is None else self.rollback.left_out_steps

    def of_group(self, number: int) -> "TrainTask":
        """What another group gets."""
        return replace(self, group=number)
