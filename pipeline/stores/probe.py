"""Whether a store keeps its promises of one winner, asked once before a job writes what stands on them.

Some servers with the S3 API ignore If-None-Match or If-Match, some refuse them; some file systems have neither hard
links nor locks. Found at the end of a job, each would have cost its results.
"""

import contextlib
import secrets

from pipeline.errors import StorageAccessError, StorageError, StorageUnfitError
from pipeline.progress import say
from pipeline.stores.object_store import ObjectStore

PROBE_PREFIX = "_probe-"
"""No folder: a local one would stay, empty."""
PROBE_PATIENCE_S = 60.0
_REMOVAL_PATIENCE_S = 3.0


def check_conditions(store: ObjectStore) -> None:
    """Create a key twice, replace it by its version and by one that is gone, and remove it.

    A store that forbids deletes passes, with one line: the key of some bytes stays.

    Raises:
        StorageUnfitError: If the store ignores a condition, or takes the right version for another.
        StorageAccessError: If it refuses conditions, or access.
        StorageError: If it gives no answer for a minute.
    """
    store = store.with_patience(PROBE_PATIENCE_S)
    key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
    first, second, third = (f"{key} {number}".encode() for number in ("first", "second", "third"))
    hasty = store.with_patience(_REMOVAL_PATIENCE_S)
    try:
        is_new = store.create(key, first)
    except StorageAccessError:
        raise  # it was not made
    except StorageError:
        with contextlib.suppress(StorageError):  # its answer may be what was lost; more is said of the cause already
            hasty.delete(key)
        raise
    try:
        if not is_new:
            raise _unfit(store, "says of a new key that it exists")
        _check(store, key, first, second, third)
    except StorageError:
        with contextlib.suppress(StorageError):
            hasty.delete(key)
        raise
    try:
        store.delete(key)
    except StorageError as error:
        say(f"a probe's file stays where it is: {error}")


def _check(store: ObjectStore, key: str, first: bytes, second: bytes, third: bytes) -> None:
    if store.create(key, second):
        raise _unfit(store, "ignores If-None-Match")
    before = store.read_versioned(key)
    etag = store.replace(key, second, before.etag)
    if etag is None:
        raise _unfit(store, "takes the version that is there for another (If-Match)")
    if store.replace(key, third, before.etag) is not None:
        raise _unfit(store, "ignores If-Match")
    after = store.read_versioned(key)
    if (before.data, after.data, after.etag) != (first, second, etag):
        raise _unfit(store, "does not read back what was written")


def _unfit(store: ObjectStore, fault: str) -> StorageUnfitError:
    return StorageUnfitError(
        f"{store.uri}: the store {fault}, so two jobs could spoil each other's results; use another store"
    )
