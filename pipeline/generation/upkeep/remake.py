"""Single images of a run, made again and compared with what is stored: the proof that they follow from the manifest."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.shard_parts import SHARDS_PER_PART
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import read_shard
from pipeline.errors import ConfigError, ObjectMissingError, ShardCorruptError
from pipeline.generation.output.manifest import GenerationManifest, read_part
from pipeline.generation.output.removals import Removals, read_removals
from pipeline.generation.spec.sampling_plan import plan_shards
from pipeline.generation.upkeep.ids import by_shard
from pipeline.generation.upkeep.making_again import make_maker
from pipeline.generation.upkeep.stored_run import ModelAccess, load_run
from pipeline.stores.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Remade:
    """An image that was made again."""

    sample_id: int
    """Which."""
    image: bytes
    """It, in the run's format."""
    extension: str
    """How it is coded."""
    fault: str | None
    """How the stored one differs; None: it has the same bytes."""


def remake(store: ObjectStore, ids: tuple[int, ...], access: ModelAccess, *, use_gpu: bool | None) -> Iterator[Remade]:
    """Make images again, by the fixed batches that they were made in.

    Args:
        store: The run's prefix.
        ids: Sample ids, ascending.
        access: How models are reached that are not staged beside the run.
        use_gpu: Whether on a GPU; None: as the run's config.toml says.

    Raises:
        ConfigError: If the run has no such image, or it was removed; before anything is made.
        PipelineError: As its subclasses say, of models, inputs and the store.
    """
    manifest = load_run(store)
    shards = by_shard(manifest, ids)
    removals = read_removals(store)
    for index, wanted in shards.items():
        if index in removals and (gone := sorted(removals[index].ids & set(wanted))):
            reason = next(one.reason for one in removals[index].records if gone[0] in one.ids)
            raise ConfigError(
                f"ids: image {gone[0]} was removed for good ({reason}) and is never made again, got it; leave it out"
            )
    plan = plan_shards(manifest.spec, manifest.num_images)
    maker = make_maker(store, manifest, access, use_gpu)
    for index, wanted in shards.items():
        stored, fault = _stored(store, manifest, index, removals)
        for sample in maker.remake(plan.shard(index), wanted):
            differs = fault
            if fault is None and stored.get(sample.key) is None:
                differs = "is not in its shard"
            elif fault is None and stored[sample.key] != sample.image:
                differs = "has other bytes"
            yield Remade(sample_id=int(sample.key), image=sample.image, extension=sample.extension, fault=differs)


def find_tar(
    store: ObjectStore, manifest: GenerationManifest, index: int, removals: dict[int, Removals] | None = None
) -> ShardRecord:
    """The tar that stands of a shard: of its newest removal, else of the manifest; errors as `read_part`."""
    if removals is not None and index in removals:
        return removals[index].tar
    part = manifest.parts[index // SHARDS_PER_PART]
    return read_part(store, part)[index % SHARDS_PER_PART]


def _stored(
    store: ObjectStore, manifest: GenerationManifest, index: int, removals: dict[int, Removals]
) -> tuple[dict[str, bytes], str | None]:
    """The images of a shard by their keys, or why they cannot be compared."""
    try:
        samples = read_shard(store, find_tar(store, manifest, index, removals))
    except (ShardCorruptError, ObjectMissingError) as error:
        return {}, f"cannot be compared ({error})"
    return {sample.key: sample.image for sample in samples}, None
