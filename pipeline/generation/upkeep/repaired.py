"""What a repair has come to, and how it writes."""

from dataclasses import dataclass, field

from pipeline.errors import ObjectMissingError
from pipeline.stores.object_store import ObjectStore


@dataclass(kw_only=True, slots=True)
class Repaired:
    """What a repair has done, and what it could not do."""

    mended: list[str] = field(default_factory=list)
    """Keys that were written again."""
    unmended: list[str] = field(default_factory=list)
    """What stays wrong, a sentence each."""
    num_orphans: int = 0
    """Orphans that were removed."""


def put(store: ObjectStore, key: str, data: bytes) -> None:
    """Create an object that is created once, or replace the damaged one that was read.

    Raises:
        StorageError: If the store fails.
    """
    while not store.create(key, data):
        try:
            etag = store.read_versioned(key).etag
        except ObjectMissingError:
            continue
        if store.replace(key, data, etag) is not None:
            return
