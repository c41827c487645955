"""Rank 0 of a run without Ray, over a store that writes when it is let."""

import dataclasses
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ddpm import build_network
from pipeline.config_io import to_json
from pipeline.errors import StorageError
from pipeline.stores.local_store import LocalStore
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.run_record import RUN_RECORD, RunRecord
from pipeline.training.train_config import OptimizerConfig, RunIdentity, TrainConfig
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.rank_zero import RankZero
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import MODEL, manifest

IDENTITY = RunIdentity.of(TrainConfig(), manifest("a"))
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, ema_halflife_images=100)


class GatedStore(LocalStore):
    """Writes files when it is let, and fails when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open, self.reached = threading.Event(), threading.Event()
        self.held = ""
        """How the keys begin that are not written before it is open; those that wait already wait on."""
        self.failing = self.forbidding = False
        self.after_create: Callable[[], object] = lambda: None

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        if key.startswith(self.held):
            self.reached.set()
            self.open.wait()
        if self.failing:
            raise StorageError("the disk is full")
        super().write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        created = super().create(key, data)
        self.after_create()
        return created

    def delete(self, key: str) -> None:
        if self.forbidding:
            raise ValueError("an error that nobody thought of")
        super().delete(key)


class Run:
    """Rank 0 of a run on random gradients, without Ray.

    With `goes_on` it counts on from the newest checkpoint; the weights are new ones.
    """

    def __init__(
        self, folder: Path, tracking: TrackingRun, lines: list[str], lease_token: str, *, goes_on: bool, **changes: Any
    ) -> None:
        self.lines = lines
        ignored = SimpleNamespace(remote=lambda *_: None)
        board = SimpleNamespace(update=ignored, checkpointed=ignored)
        config = TrainConfig(
            output=str(folder), network=MODEL.network, schedule=MODEL.schedule, class_conditional=True,
            optimizer=OPTIMIZER, steps=100, checkpoint_interval_steps=2, grid_interval_steps=0,
        )  # fmt: skip
        config = dataclasses.replace(config, **changes)
        task = TrainTask(
            config=config,
            manifest=manifest(*"0123456789"),
            model_config=MODEL,
            source=None,
            fork_digest=None,
            run=tracking,
            board=board,
            lease_token=lease_token,
            patience_minutes=0.0,
        )
        LocalStore(folder).create(RUN_RECORD, to_json(RunRecord(run_id=tracking.run_id, identity=IDENTITY)))
        self.state = TrainingState(build_network(MODEL, seed=0), OPTIMIZER, sigma_rels=config.post_hoc_ema.tracked)
        self.store = GatedStore(folder / "checkpoints")
        self.checkpoints = CheckpointStore(self.store)
        restored = self.checkpoints.newest() if goes_on else None
        self.state.step = restored.step if restored else 0
        self.rank_zero = RankZero(task, self.checkpoints, self.state, torch.device("cpu"), restored)

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            for parameter in self.state.network.parameters():
                parameter.grad = torch.randn(parameter.shape)
            self.state.apply_gradient(16)
            self.rank_zero.after_step()

    def wait_for_writer(self) -> None:
        """Unlike `finish`, raise nothing."""
        self.rank_zero._writer._jobs["checkpoint"].exception()
