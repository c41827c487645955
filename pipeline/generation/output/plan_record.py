"""How many images a run is to have: what it was last asked for, for whoever looks while it is made.

    plan.json    written before the first shard, and again when the run is asked to grow

Nothing is decided by it: what is there stands in the commit records, and what is finished in the manifest.
"""

from dataclasses import dataclass

from pipeline.config_io import read_record, to_json
from pipeline.errors import ObjectMissingError
from pipeline.generation.output.manifest import write_if_changed
from pipeline.stores.object_store import ObjectStore

PLAN_KEY = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """The content of `plan.json`."""

    format_version: int = 2
    """Version of this record."""
    spec_digest: str
    """Digest of the sampling spec."""
    shard_size: int
    """Images of each output shard but the last."""
    num_images: int
    """Images that are wanted, with ids 0 .. num_images - 1."""


def write_plan(store: ObjectStore, plan: PlanRecord) -> None:
    """Note what is wanted; of several drivers at once the last one's stays.

    Raises:
        StorageError: If the store fails.
    """
    write_if_changed(store, PLAN_KEY, to_json(plan))


def read_plan(store: ObjectStore) -> PlanRecord | None:
    """What is wanted; None: nothing says so.

    Raises:
        ConfigError: If the record is damaged.
        FormatVersionError: If it is of another version.
        StorageError: If the store fails.
    """
    try:
        data = store.read(PLAN_KEY)
    except ObjectMissingError:
        return None
    return read_record(PlanRecord, data, f"{store.uri}/{PLAN_KEY}", remedy="run the program that wrote it")
