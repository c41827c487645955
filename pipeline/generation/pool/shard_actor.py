"""A process that holds the network and makes output shards: what a Ray actor runs.

It is given up to two shards at once. The device draws one after the other in a thread of its own; packing and
committing the one before goes on beside it.
"""

import os
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray

from pipeline.errors import PipelineError
from pipeline.generation.making.shard_maker import Ingredients, ShardMaker
from pipeline.generation.output.commits import Commit
from pipeline.generation.pool.failure_kinds import as_own_error, kind_of
from pipeline.generation.pool.node_models import fetch_model
from pipeline.generation.pool.shard_queue import FailureKind
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec
from pipeline.ray_errors import ErrorValues, of_values, to_values
from pipeline.stores.patience import num_waits
from pipeline.stores.storage import open_store


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkOrder:
    """What an actor is told once; it travels to each of them, so the models' files are not in it."""

    spec: SamplingSpec
    """What to make."""
    store_uri: str
    """The output prefix."""
    models_uri: str
    """Where the models are staged: its parent."""
    trusts_code: bool
    """Whether code that comes with a model may run."""
    make_ingredients: Callable[..., Ingredients]
    """Ingredients with all but `model` and `guide` filled in."""
    num_threads: int
    """CPU threads of torch."""
    use_gpu: bool
    """Whether the process has a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an actor is."""

    node_id: str
    """Ray's name for its node."""
    device: str
    """Its GPU's number there, or its process."""

    @property
    def name(self) -> str:
        """Short, for lines, and told apart from other places."""
        return f"{self.device} of node {self.node_id[:8]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a shard, or of loading: a commit, or a failure."""

    commit: Commit | None = None
    """The record that stands; None after loading, and of a failure."""
    kind: FailureKind | None = None
    """Whom a failure is held against; None: there is none."""
    values: ErrorValues | None = None
    """The failure, as values: an exception would come back wrapped in Ray's, without its class."""
    num_waits: int = 0
    """How often the process has paused for a server so far."""

    @property
    def error(self) -> PipelineError:
        """The failure."""
        assert self.values is not None, "there is one"
        return of_values(**self.values)


class ShardActor:
    """Makes shards, one after the other."""

    def __init__(self, order: WorkOrder) -> None:
        """Take the order; nothing is loaded, since an actor that fails here fails without a reason."""
        self._order = order
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")  # torch's thread count is a thread's
        self._maker: ShardMaker | None = None

    def place(self) -> Place:
        """Where this actor is; an answer says that it has started."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(
            node_id=context.get_node_id(), device=f"GPU {','.join(gpus)}" if gpus else f"process {os.getpid()}"
        )

    def load(self) -> Answer:
        """Fetch the models and load them."""
        try:
            self._maker = self._device_thread.submit(self._load).result()
        except Exception as error:
            return _failed(error, "sampling: a process cannot load the model", is_loading=True)
        return Answer(num_waits=num_waits())

    def make(self, shard: OutputShard) -> Answer:
        """Make and commit a shard."""
        assert self._maker is not None, "loaded first"
        try:
            drawn = self._device_thread.submit(self._maker.draw, shard).result()
            return Answer(commit=self._maker.commit(drawn), num_waits=num_waits())
        except Exception as error:
            return _failed(error, f"output shard {shard.index} (ids from {shard.first_id})")

    def num_waits(self) -> int:
        """How often this process has paused for a server so far; asked beside what it does."""
        return num_waits()

    def _load(self) -> ShardMaker:
        order, spec = self._order, self._order.spec
        models = open_store(order.models_uri)
        guide = spec.guide_digest and fetch_model(models, spec.guide_digest, trusted=order.trusts_code)
        ingredients = order.make_ingredients(
            model=fetch_model(models, spec.model_digest, trusted=order.trusts_code), guide=guide or None
        )
        device = "cuda" if order.use_gpu else "cpu"
        store = open_store(order.store_uri)
        return ShardMaker(ingredients, spec, store, num_threads=order.num_threads, device=device)


def _failed(error: Exception, where: str, *, is_loading: bool = False) -> Answer:
    own = as_own_error(error, where)
    values = to_values(own)
    if own is not error:
        values["trace"] = "".join(traceback.format_exception(error))
    return Answer(kind=kind_of(error, is_loading=is_loading), values=values, num_waits=num_waits())
