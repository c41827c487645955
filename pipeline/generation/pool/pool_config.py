"""The machines' share in a generation run: how many actors of what size, and what they are forgiven."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError

UNKNOWN_KIND = "unknown"
"""Of an actor that made nothing: a shard's record says on what it was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The machines' share in a generation run; it decides nothing about the images."""

    num_actors: int
    """Processes that each hold the network and make one output shard at a time."""
    cpus_per_actor: int
    """Logical CPUs, and threads of torch, of each."""
    use_gpu: bool
    """Give each one GPU."""
    accelerator_type: str | None
    """Kind of GPU, by Ray's name; None: any."""
    max_shard_retries: int
    """Times that a shard is tried again elsewhere after it has failed on a living node."""
    shard_timeout_s: float
    """A shard that takes longer, and longer than ten times the median, is given up, seconds; who waits for storage has
    this time again."""
    start_timeout_s: float
    """An actor's loading may take so long, and its first shard while nobody has made a first one, seconds."""
    idle_limit_s: float
    """The job ends when nothing was made and nobody works for so long, seconds."""

    @property
    def resources(self) -> Mapping[str, float]:
        """What an actor needs, by Ray's names."""
        needs = {"CPU": float(self.cpus_per_actor)} | ({"GPU": 1.0} if self.use_gpu else {})
        return needs | ({f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {})

    @property
    def ray_options(self) -> dict[str, Any]:
        """The same for `ray.remote`; what dies is replaced by the pool, which knows what its death means."""
        options = {"num_cpus": self.cpus_per_actor, "max_restarts": 0, "max_task_retries": 0}
        more: dict[str, Any] = {"accelerator_type": self.accelerator_type} if self.accelerator_type else {}
        return options | more | ({"num_gpus": 1} if self.use_gpu else {})


@dataclass(kw_only=True, slots=True)
class KindStatistics:
    """What the actors on one kind of device have done, of those that have ended."""

    actor_s: float = 0.0
    """Time from having a place to their end, all together, seconds."""
    busy_s: float = 0.0
    """The part of it from the first shard given to an actor to the last that it made, seconds."""
    num_images: int = 0
    """Images that they made."""
    num_bytes: int = 0
    """Of the shards with them, bytes."""


@dataclass(kw_only=True, slots=True)
class PoolStatistics:
    """What a pool has done so far."""

    num_made: int = 0
    """Shards."""
    num_retries: int = 0
    """Failures that were held against a shard."""
    num_lost: int = 0
    """Actors that were lost with their nodes, or did not answer."""
    making_s: float = 0.0
    """From the first shard given to any actor to the last one made, seconds: the start of Ray and actors is not in."""
    of_kind: dict[str, KindStatistics] = field(default_factory=dict)
    """By kind of device; an actor that made nothing is of the kind UNKNOWN_KIND."""

    def kind(self, name: str) -> KindStatistics:
        """Those of one kind, which may be new."""
        return self.of_kind.setdefault(name, KindStatistics())


def check_room(config: PoolConfig, cluster: ClusterConfig) -> None:
    """Refuse what a Ray that is started in this process can never run; a cluster may grow.

    Raises:
        ConfigError: Names the field, what is there and what to do.
    """
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        return
    there = cluster.num_cpus or os.cpu_count() or 1
    if config.cpus_per_actor > there:
        raise ConfigError(
            f"cpus_per_actor: at most the {there} CPUs of the Ray that is started here, got {config.cpus_per_actor}; "
            "lower it, or name a cluster with --cluster.address"
        )
    if config.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "use_gpu: there is no GPU on this machine, got true; leave it out, or name a cluster with --cluster.address"
        )
