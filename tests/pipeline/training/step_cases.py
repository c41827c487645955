"""Real training steps on made-up images, without Ray: a task, its batches, and a process group of one rank."""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm import ImportanceSampler, ModelConfig, ObjectiveConfig, build_network
from pipeline.data.batch_cutter import RankBatch
from pipeline.data.data_order import DataConfig
from pipeline.data.manifest import Split
from pipeline.data.shard_table import ShardRecord
from pipeline.training.run_record import RollbackRecord
from pipeline.training.train_config import OptimizerConfig, TrainConfig
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import MODEL, manifest

GLOBAL_BATCH = 8
CPU = torch.device("cpu")
IMPORTANCE = ObjectiveConfig(t_choice="importance")
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=4, ema_halflife_images=100)


def make_task(**changes: Any) -> TrainTask:
    """A task of 100 steps; `changes` are fields of TrainConfig or of TrainTask."""
    shards = [ShardRecord(key=f"train/{i}.tar", size_bytes=1, sha256="0" * 64, num_samples=25) for i in range(4)]
    of_config = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(
        **{
            "network": MODEL.network,
            "schedule": MODEL.schedule,
            "class_conditional": True,
            "optimizer": OPTIMIZER,
            "steps": 100,
            "global_batch": GLOBAL_BATCH,
            "data": DataConfig(lanes=2),
            "log_interval_steps": 10,
            **{name: value for name, value in changes.items() if name in of_config},
        }  # type: ignore[arg-type]
    )
    return TrainTask(
        config=config,
        manifest=dataclasses.replace(manifest(*"0123456789"), splits={"train": Split(shards=tuple(shards))}),
        model_config=MODEL,
        source=None,
        fork_digest=None,
        lease_token="ours",
        patience_minutes=0.0,
        run=SimpleNamespace(),  # type: ignore[arg-type]
        board=SimpleNamespace(),
        **{name: value for name, value in changes.items() if name not in of_config},
    )


def rollback_of(left_out_steps: tuple[int, ...]) -> RollbackRecord | None:
    """A return after which some batches are left out."""
    return RollbackRecord(to_step=0, from_step=0, left_out_steps=left_out_steps) if left_out_steps else None


def make_network(config: ModelConfig) -> nn.Module:
    """Without the layers of zeros that a new network ends in: they would keep most gradients at zero."""
    network = build_network(config, seed=1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
    return network


class Small(nn.Module):
    """A network that compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv_in, self.conv_out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        h = self.norm(self.conv_in(x_t)) + self.embedding(t)[:, :, None, None]
        prediction: Tensor = self.conv_out(nn.functional.silu(h))
        return prediction


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def make_state(task: TrainTask, device: torch.device = CPU) -> TrainingState:
    """Step 0 of a task."""
    importance = None
    if task.config.objective.t_choice == "importance":
        importance = ImportanceSampler(20, history=1, device=device)
    return TrainingState(
        make_network(task.model_config).to(device), task.config.optimizer, sigma_rels=(0.05,), importance=importance
    )


def batch_of(step: int, rank: int = 0, world: int = 1, lanes: int = 2) -> RankBatch:
    """A rank's part of the global batch of a step: that of its lanes."""
    first, end = (number * lanes // world * (GLOBAL_BATCH // lanes) for number in (rank, rank + 1))
    places = np.arange(first, end)
    ids = (step * GLOBAL_BATCH + places) % 100
    return RankBatch(
        images=np.stack([np.random.default_rng(i).integers(0, 256, (8, 8, 1), dtype=np.uint8) for i in ids]),
        labels=ids % 10,
        sample_ids=ids,
        epochs=(step * GLOBAL_BATCH + places) // 100,
    )


def poison(state: TrainingState, value: float, sample_of_step: dict[int, int]) -> None:
    """Add a value to the network's answer for one place of this rank's batch in some steps."""

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if state.step not in sample_of_step:
            return output
        wrong = torch.zeros(len(output), 1, 1, 1)
        wrong[sample_of_step[state.step]] = value
        return output + wrong

    state.network.register_forward_hook(add)


def everything_of(state: TrainingState) -> dict[str, Tensor]:
    """Copies of all tensors of a state: weights, moments and Adam's count, averages, the choice of t."""
    parts = state.parts()
    return {f"{file}/{name}": tensor.clone() for file, named in parts.tensors.items() for name, tensor in named.items()}


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Of two states."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@contextlib.contextmanager
def single_rank(backend: str = "gloo") -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
