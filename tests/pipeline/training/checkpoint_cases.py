"""What the tests of checkpoints share: files to save, a store of which single calls go wrong, everything in it."""

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.training.checkpoints.checkpoint_files import Piece
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore

FILES = {"a.bin": b"first", "b.bin": b"second"}
OTHER = {"a.bin": b"FIRST", "b.bin": b"SECOND"}
KEY_2 = f"_records/step-{2:09d}.json"


def pieces(files: Mapping[str, bytes] = FILES) -> list[Piece]:
    return [lambda name=name: {name: files[name]} for name in files]  # type: ignore[misc]


def snapshot(store: ObjectStore) -> dict[str, tuple[bytes, float]]:
    """Everything in a store, to see that nothing was changed."""
    return {info.key: (store.read(info.key), info.modified_s) for info in store.list()}


def read_all(checkpoints: CheckpointStore, record: CheckpointRecord) -> dict[str, bytes]:
    return {name: checkpoints.read(record, name) for name in sorted(record.names)}


def age(store: ObjectStore, hours: float = 2.0) -> None:
    """Make everything in a local folder look as if it had been written so long ago."""
    for info in store.list():
        os.utime(Path(store.uri, info.key), (info.modified_s - 3600 * hours,) * 2)


class WrappedStore(LocalStore):
    """A real store, of which single calls go wrong."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(Path(store.uri))
