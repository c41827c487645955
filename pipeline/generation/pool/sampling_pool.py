"""The one place where generation meets Ray: a pool of Ray Data actors that make and commit output shards."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from pipeline.cluster import quiet_data_context
from pipeline.config_io import from_json, to_json
from pipeline.errors import PipelineError
from pipeline.generation.making.shard_maker import Ingredients, ShardMaker
from pipeline.generation.output.commits import Commit, CommitRecord
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec
from pipeline.ray_errors import of_values, to_values
from pipeline.redact import redact
from pipeline.stores.storage import open_store
from pipeline.stores.waiting import told_of_outages

# A dataset of Ray lives in the driver's memory: shards are handed over in waves, so that ten million need no more.
_WAVE_SHARDS = 4096
_WAVE_SHARDS_PER_ACTOR = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The machines' share in a generation run; it decides nothing about the images."""

    num_actors: int
    """Processes that each hold the network and make one output shard at a time."""
    cpus_per_actor: int
    """Logical CPUs, and threads of torch, of each."""
    use_gpu: bool
    """Give each one GPU."""
    max_shard_retries: int
    """Times that a shard is tried again after its process or its machine has died."""
    ray_logs: bool
    """Show Ray's own output."""


def make_shards(
    ingredients: Ingredients, spec: SamplingSpec, store_uri: str, shards: Iterable[OutputShard], pool: PoolConfig
) -> Iterator[Commit]:
    """Make and commit shards on a pool of actors, in any order; needs an initialised Ray.

    Args:
        ingredients: The model, and what else the spec names; put into Ray's object store once.
        spec: What to make.
        store_uri: The output prefix.
        shards: Which shards; consumed lazily.
        pool: How many actors of what size.

    Yields:
        What became of each shard, as soon as it is committed.

    Raises:
        PipelineError: What an actor raised, with its class and message, or that actors died too often.
    """
    quiet_data_context(pool.ray_logs)
    ingredients_ref = ray.put(ingredients)
    wave_size = max(_WAVE_SHARDS, _WAVE_SHARDS_PER_ACTOR * pool.num_actors)
    waiting = iter(shards)
    while wave := [dataclasses.asdict(shard) for shard in islice(waiting, wave_size)]:
        dataset = _pool_dataset(wave, (ingredients_ref, spec, store_uri, pool.cpus_per_actor, pool.use_gpu), pool)
        try:
            for row in told_of_outages(dataset.iter_rows(), [open_store(store_uri)], "shard"):
                if row["error"]:
                    raise of_values(row["error"], row["message"], row["trace"])
                record = from_json(CommitRecord, row["message"].encode(), "commit of an actor")
                yield Commit(record=record, outcome=row["outcome"])
        except ray.exceptions.RayActorError as error:
            raise PipelineError(_lost_actor_message(error, spec, pool)) from error


def _pool_dataset(
    shards: list[dict[str, int]], constructor_args: tuple[Any, ...], pool: PoolConfig
) -> ray.data.Dataset:
    with warnings.catch_warnings():
        # Ray Data retries for ever unless told otherwise; Ray 2.60 to 2.63 have only this deprecated way to tell it.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # One row per block: a block is what an actor is handed, what is retried, and what is reported when it is done.
        return ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            _ShardActor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_actors, len(shards))),
            fn_constructor_args=constructor_args,
            num_cpus=pool.cpus_per_actor,
            num_gpus=1 if pool.use_gpu else 0,
            max_task_retries=pool.max_shard_retries,
        )


class _ShardActor:
    """Turns rows of Ray Data into shards, and commits or errors into rows."""

    def __init__(self, ingredients: Any, spec: SamplingSpec, store_uri: str, num_threads: int, use_gpu: bool) -> None:
        self._ingredients, self._spec, self._store_uri = ingredients, spec, store_uri
        self._num_threads, self._device = num_threads, "cuda" if use_gpu else "cpu"
        self._maker: ShardMaker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        shard = OutputShard(**{name: int(column[0]) for name, column in batch.items()})
        try:
            commit = self._load()(shard)
        except PipelineError as error:
            values = to_values(error)
            row = {"error": [values["error"]], "message": [values["message"]], "trace": [values["trace"]]}
            return {"outcome": [""], **row}
        record = to_json(commit.record).decode()
        return {"outcome": [commit.outcome], "error": [""], "message": [record], "trace": [""]}

    def _load(self) -> ShardMaker:
        # Not in __init__: an actor that dies while it is made is replaced without end.
        if self._maker is None:
            is_reference = isinstance(self._ingredients, ray.ObjectRef)
            ingredients = ray.get(self._ingredients) if is_reference else self._ingredients
            store = open_store(self._store_uri)
            self._maker = ShardMaker(ingredients, self._spec, store, num_threads=self._num_threads, device=self._device)
        return self._maker


def _lost_actor_message(error: Exception, spec: SamplingSpec, pool: PoolConfig) -> str:
    reason = redact(" ".join(str(error).split()))[:300]
    smaller = max(spec.batch_size // 2, 1)
    return (
        f"sampling: actors died {pool.max_shard_retries + 1} times over one output shard ({reason}); run again to go "
        f"on from what is committed; if memory ran out, choose fewer actors or batch_size={smaller}"
    )
