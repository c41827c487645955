"""Shards of a finished run, made again in this process; nothing is committed, and only recorded bytes are written."""

import functools
import hashlib
from collections.abc import Collection

from pipeline.data.shard_table import ShardRecord
from pipeline.errors import PipelineError, UsageError
from pipeline.generation.making.shard_maker import ShardMaker
from pipeline.generation.output.commits import part_key
from pipeline.generation.output.manifest import GenerationManifest
from pipeline.generation.spec.sampling_plan import plan_shards
from pipeline.generation.upkeep.repaired import Repaired
from pipeline.generation.upkeep.stored_run import ModelAccess, find_ingredients, stored_config
from pipeline.progress import say
from pipeline.stores.object_store import ObjectStore


def make_maker(
    store: ObjectStore, manifest: GenerationManifest, access: ModelAccess, use_gpu: bool | None
) -> ShardMaker:
    """What makes the run's shards, in this process, with as many threads as the run had.

    Raises:
        PipelineError: As `find_ingredients` and ShardMaker.
    """
    config = stored_config(store)
    ingredients = find_ingredients(store, manifest, config, access)
    on_gpu = use_gpu if use_gpu is not None else config is not None and config.use_gpu
    say(f"making images of {store.uri} with {manifest.model_uri} on a {'GPU' if on_gpu else 'CPU'}, in this process")
    return ShardMaker(
        ingredients,
        manifest.spec,
        store,
        num_threads=1 if config is None else config.cpus_per_actor,
        device="cuda" if on_gpu else "cpu",
    )


class MakingAgain:
    """Makes shards of a run again; the model is loaded when the first is asked for."""

    def __init__(
        self, store: ObjectStore, manifest: GenerationManifest, access: ModelAccess, use_gpu: bool | None
    ) -> None:
        """Arguments as `make_maker`."""
        self._store, self._plan = store, plan_shards(manifest.spec, manifest.num_images)
        self._make_maker = functools.cache(lambda: make_maker(store, manifest, access, use_gpu))

    def pack(self, index: int, without: Collection[int] = ()) -> bytes:
        """The bytes of a shard, without images of some ids.

        Raises:
            PipelineError: As `make_maker` and `ShardMaker.draw`.
        """
        maker = self._make_maker()
        return maker.pack(maker.draw(self._plan.shard(index)), without)

    def put_back(self, index: int, tar: ShardRecord, without: Collection[int], done: Repaired) -> bool:
        """Write a tar again that is gone or altered; whether its bytes are those that are recorded.

        Args:
            index: Which shard.
            tar: What is recorded of it.
            without: Ids that were removed.
            done: Takes its key, or why it could not be made.

        Raises:
            UsageError: If flags or files are missing that making needs.
            StorageError: If it cannot be written.
        """
        try:
            data = self.pack(index, without)
        except UsageError:
            raise
        except PipelineError as error:
            done.unmended.append(f"{tar.key}: cannot be made again ({error})")
            return False
        if (hashlib.sha256(data).hexdigest(), len(data)) != (tar.sha256, tar.size_bytes):
            done.unmended.append(
                f"{tar.key}: this machine makes other bytes, so that nothing was changed; run it on hardware and "
                f"with software as in {part_key(index)}"
            )
            return False
        self._store.write(tar.key, data)
        done.mended.append(tar.key)
        return True
