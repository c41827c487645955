"""What earlier ticks made is removed, so that a series takes no more and more room.

A tick is removed only if it is complete and older than the present one, its manifest has stood for a day on the store's
clock, and it is none of the newest few. The order is that of what readers trust: the tick's record is marked, so that
nobody goes on with it; the manifest goes, from which moment no reader finds the images; then images, records and the
rest, as they are listed, so that any number of them takes little memory; the tick's record last, while the lease is
still held: who waited for it finds no record, and makes nothing. Killed in between, a removal goes on with the next
tick. Only keys that a run writes are deleted: whatever else lies in a prefix, or beside it, stays; so do the model's
files in `_models/`, of which nobody knows who else samples from them.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config_io import to_json
from pipeline.errors import LeaseHeldError, ObjectMissingError, PipelineError, UsageError
from pipeline.generation.output.commits import part_index, tar_index
from pipeline.generation.output.manifest import MANIFEST_KEY
from pipeline.generation.output.tick_records import TickRecord, list_ticks, parse_tick, tick_key
from pipeline.progress import say
from pipeline.stores.lease import LEASE_KEY, hold_lease, holder_token
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri, open_store

MIN_AGE_S = 86_400.0
"""Age of a manifest below which its images stay: somebody may have begun to read them."""
_OTHERS = re.compile(
    r"config\.toml|ledger\.json|plan\.json|evaluation\.json|contact_sheet\.png|completions\.png|index\.html|"
    r"(?:gallery|_manifest|_removed)/.+"
)
"""What a run writes beside images, records and manifest; the lease goes last of all, since it is held meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OldTick:
    """A tick that is to be removed, or whose removal was begun."""

    record: TickRecord
    """What it was begun with."""
    etag: str
    """Which version of its record that is."""


def removable_ticks(output: ObjectStore, present: TickRecord, keep_last: int) -> list[OldTick]:
    """The ticks that are to go, the earliest first; nothing is changed.

    Args:
        output: The output of the series.
        present: The tick that counts as the newest; later ones are not looked at.
        keep_last: Complete ticks that stay, the present one among them; at least 1.

    Raises:
        StorageError: If the store fails.
    """
    earlier: list[OldTick] = []
    now_s = 0.0  # the store's clock, or less: the latest time that it has given to anything seen here
    for tick, info in list_ticks(output):
        now_s = max(now_s, info.modified_s)
        if tick < present.tick and (found := _read(output, tick)) is not None:
            earlier.append(found)
    now_s = max(now_s, _manifest_time_s(output, present) or 0.0)
    chosen, num_kept = [], 1
    for old in reversed(earlier):
        if old.record.removal_begun:
            chosen.append(old)
            continue
        finished_s = _manifest_time_s(output, old.record)
        if finished_s is None:
            continue
        if num_kept < keep_last:
            num_kept += 1
        elif now_s - finished_s >= MIN_AGE_S:
            chosen.append(old)
    return chosen[::-1]


def remove_old_ticks(output: ObjectStore, present: TickRecord, keep_last: int, *, lease_s: float) -> list[str]:
    """Remove what `removable_ticks` names, and say so. What goes wrong is a line: the next tick tries again.

    Args:
        output: The output of the series.
        present: The tick that was just finished.
        keep_last: As `removable_ticks`.
        lease_s: Each prefix's lease is held while it is emptied, as long as this; 0: without one.

    Returns:
        The ticks that are gone now.
    """
    gone = []
    try:
        for old in removable_ticks(output, present, keep_last):
            tick = old.record.tick
            try:
                num_objects = _remove(output, old, lease_s)
            except LeaseHeldError as held:
                say(f"tick {tick} is not removed, since somebody works there ({held})")
                continue
            if num_objects is not None:
                say(f"removed tick {tick}: {num_objects:,} objects in {join_uri(output.uri, old.record.prefix)}")
                gone.append(tick)
    except PipelineError as error:
        say(f"earlier ticks could not be removed ({error}); the images of this one are all there, the next tries again")
    return gone


def _remove(output: ObjectStore, old: OldTick, lease_s: float) -> int | None:
    """How many objects of the prefix were deleted; None: somebody has changed the record, so it stays."""
    store = open_store(join_uri(output.uri, old.record.prefix))
    with hold_lease(store, duration_s=lease_s) if lease_s else contextlib.nullcontext() as lease:
        if not _mark(output, old):
            return None
        num_deleted = int(store.stat(MANIFEST_KEY) is not None)
        store.delete(MANIFEST_KEY)
        num_deleted += _empty(store)
        if lease is None:
            store.delete(LEASE_KEY)
        output.delete(tick_key(old.record.tick))
    if lease is not None and holder_token(store) == lease.token:  # else somebody waited for it, and has it now
        store.delete(LEASE_KEY)
    return num_deleted


def _mark(output: ObjectStore, old: OldTick) -> bool:
    """Whether the record is the one that was chosen, and says from now on that its removal has begun."""
    key = tick_key(old.record.tick)
    if not old.record.removal_begun:
        return output.replace(key, to_json(replace(old.record, removal_begun=True)), old.etag) is not None
    with contextlib.suppress(ObjectMissingError):
        return output.read_versioned(key).etag == old.etag  # else it was removed, and perhaps begun anew
    return False


def _empty(store: ObjectStore) -> int:
    """Delete all that a run writes but the lease; how many objects that was. Ends at the first that cannot be."""
    num_deleted = num_strangers = 0
    first_stranger = ""

    def written() -> Iterator[str]:
        nonlocal num_deleted, num_strangers, first_stranger
        for info in store.list():
            if tar_index(info.key) is not None or part_index(info.key) is not None or _OTHERS.fullmatch(info.key):
                num_deleted += 1
                yield info.key
            elif info.key not in (MANIFEST_KEY, LEASE_KEY):
                num_strangers, first_stranger = num_strangers + 1, first_stranger or info.key

    store.delete_all(written())
    store.remove_unfinished("", older_than_s=MIN_AGE_S)
    if num_strangers:
        say(f"{store.uri}: {num_strangers:,} objects that no run writes stay there, such as {first_stranger}")
    return num_deleted


def _manifest_time_s(output: ObjectStore, record: TickRecord) -> float | None:
    info = open_store(join_uri(output.uri, record.prefix)).stat(MANIFEST_KEY)
    return None if info is None else info.modified_s


def _read(output: ObjectStore, tick: str) -> OldTick | None:
    """None for a record that is gone by now, or that cannot be read: what it made stays."""
    try:
        found = output.read_versioned(tick_key(tick))
        return OldTick(record=parse_tick(output, tick, found.data), etag=found.etag)
    except ObjectMissingError:
        return None
    except UsageError as error:
        say(f"what tick {tick} made is not removed ({error})")
        return None
