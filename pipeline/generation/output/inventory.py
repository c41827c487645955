"""What of a run is in its output prefix, for any number of shards: one byte each, and the records of a few ranges.

A driver looks once, by listings alone: a range with a part (manifest.py) is complete and is not looked into; of others
the keys of the commit records say which shards exist. While shards are made, each range that becomes complete is
*closed* beside the work: its records are read, its tars listed and compared with them, and its part is written. A shard
whose tar is gone or cut short is then missing again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool

from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ObjectMissingError, PipelineError, StorageError, is_outage
from pipeline.generation.output.commits import CommitRecord, part_index, read_record, tar_index
from pipeline.generation.output.manifest import GenerationManifest, list_parts, read_part, write_part
from pipeline.generation.output.removals import Removals, num_planned, read_removals, without_removed
from pipeline.generation.spec.sampling_plan import OutputShard, ShardPlan, check_same_shard
from pipeline.progress import say
from pipeline.stores.object_store import ObjectInfo, ObjectStore
from pipeline.stores.remover import Remover

_THREADS = 16
_READ_CHUNK = 1024  # records asked for at once
_FEW = 1000  # keys: what one request lists
_NUM_ENDS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedRange:
    """A range that was looked into."""

    index: int
    """Which."""
    part: PartRecord | None
    """Its part; None: something is missing."""
    lost: tuple[int, ...]
    """Shards whose tar is gone or cut short."""
    unnamed: tuple[ObjectInfo, ...]
    """Tars that no record names: orphans, or just being committed by another driver."""


class Inventory:
    """The shards of a plan: which are there, which are missing."""

    def __init__(self, store: ObjectStore, plan: ShardPlan, manifest: GenerationManifest | None) -> None:
        """Look what is there; nothing is written.

        Args:
            store: The output prefix.
            plan: The shards wanted.
            manifest: That of a finished run there, of at most as many images.

        Raises:
            OutputExistsError: If what is there cuts the ids differently (a run grown from a ragged end).
            ShardCorruptError: If a part was altered.
            StorageError: If the store fails.
        """
        self._store, self._plan = store, plan
        self.done = bytearray(plan.num_shards)
        """One byte per shard, 1 where it is there."""
        self._parts: dict[int, PartRecord] = {}
        self._known: dict[int, dict[int, ShardRecord]] = {}
        self._num_done = [0] * -(-plan.num_shards // SHARDS_PER_PART)
        self._closing: dict[int, AsyncResult[ClosedRange]] = {}
        self._thread: ThreadPool | None = None
        self._ends_of_parts: list[int] = []  # shards that may be the last, and so short, of an earlier plan
        self.unnamed: list[ObjectInfo] = []
        """Tars that no record names, of the ranges that were closed."""
        self._take_parts(manifest)
        self._take_records()

    @property
    def num_missing(self) -> int:
        """Shards that are not there."""
        return self.done.count(0)

    @property
    def num_images_done(self) -> int:
        """Images of the shards that are there."""
        last = self._plan.num_shards - 1
        full = self.done.count(1) * self._plan.shard_size
        return full - (self._plan.shard_size - self._plan.shard(last).num_samples if self.done[last] else 0)

    @property
    def num_known(self) -> int:
        """Shards of which more is kept than that they are there."""
        return sum(map(len, self._known.values()))

    @property
    def open_ranges(self) -> list[range]:
        """The shards of each range that has no part."""
        return [self._indices(index) for index in range(len(self._num_done)) if index not in self._parts]

    def missing(self) -> Iterator[OutputShard]:
        """The shards that are not there, in order."""
        return self._plan.missing(self.done)

    def add(self, record: CommitRecord) -> None:
        """Note a shard that has just been committed; a range that is complete by it is closed beside the work.

        An outage at that is no end: actors that wait for storage may make more, so it is closed once more.

        Raises:
            OutputExistsError, StorageError: As `finish`, of a range that was closed meanwhile, outages aside.
        """
        range_index = record.index // SHARDS_PER_PART
        self._known.setdefault(range_index, {})[record.index] = record.tar
        self._num_done[range_index] += not self.done[record.index]
        self.done[record.index] = 1
        self._close_if_complete(range_index)
        for finished in [index for index, one in self._closing.items() if one.ready()]:
            closing = self._closing.pop(finished)
            try:
                self._take_closed(closing.get())
            except StorageError as error:
                if not is_outage(error):
                    raise
                say(f"range {finished} of the output shards is closed later: {error}")
                self._close_if_complete(finished)

    def close_complete(self) -> None:
        """Close the ranges that are complete already, beside the work."""
        for range_index in range(len(self._num_done)):
            self._close_if_complete(range_index)

    def finish(self) -> Sequence[PartRecord] | None:
        """Wait until the ranges that are complete are closed.

        Returns:
            The parts of the run, in order; None if shards are missing: their tars were lost, or never made.

        Raises:
            OutputExistsError: If a record cuts the ids differently.
            ConfigError, FormatVersionError: If a record is damaged, or of another version.
            StorageError: If the store fails.
        """
        self.close_complete()
        try:
            while self._closing:
                self._take_closed(self._closing.pop(next(iter(self._closing))).get())
        finally:
            self.stop()
        if 0 in self.done:
            return None
        return [self._parts[index] for index in range(len(self._num_done))]

    def stop(self) -> None:
        """Wait for nothing any more; safe to repeat."""
        if self._thread is not None:
            self._thread.terminate()
            self._thread = None

    def _take_parts(self, manifest: GenerationManifest | None) -> None:
        """Ranges with a part of all their shards are complete; a shorter part knows some.

        A part that names a tar from which images were removed is none: a removal is under way, or was killed. A part
        that no manifest names may end in a short shard, as the plan of a run that was killed had it.
        """
        removals = read_removals(self._store)
        touched = {index // SHARDS_PER_PART for index in removals}
        if manifest is not None and self._plan.num_images != manifest.num_images:
            index = manifest.num_shards - 1
            last = read_part(self._store, manifest.parts[-1])[-1:]
            shard = OutputShard(
                index=index, first_id=index * self._plan.shard_size, num_samples=num_planned(last, index, removals)
            )
            check_same_shard(self._plan.shard(index), shard, self._plan.num_images, self._store.uri)
        for part in [*(manifest.parts if manifest else ()), *list_parts(self._store)]:
            indices, is_named = self._indices(part.range_index), manifest is not None and part in manifest.parts
            if part.range_index in self._parts or not indices:
                continue
            if part.range_index in touched and _is_superseded(read_part(self._store, part), indices.start, removals):
                say(
                    f"{self._store.uri}: images were removed, and that is not finished; run jobs/output.py remove again"
                )
                continue
            if part.num_shards == len(indices):
                self._parts[part.range_index] = part
                self.done[indices.start : indices.stop] = b"\1" * len(indices)
                self._ends_of_parts += [] if is_named else [indices[-1]]
            elif is_named:
                known = dict(enumerate(read_part(self._store, part), start=indices.start))
                self._known[part.range_index] = known
                self.done[indices.start : indices.start + len(known)] = b"\1" * len(known)

    def _take_records(self) -> None:
        """The keys of commit records, of all ranges without a part."""
        open_ranges = [index for index in range(len(self._num_done)) if index not in self._parts]
        first = list(islice(self._store.list("_parts/"), _FEW + 1)) if open_ranges else []
        if len(first) <= _FEW:
            self._mark(part_index(info.key) for info in first)
        else:
            with ThreadPool(min(_THREADS, len(open_ranges))) as threads:
                for committed in threads.imap_unordered(self._committed, open_ranges):
                    self._mark(committed)
        ends: list[int] = []
        for range_index in open_ranges:
            indices = self._indices(range_index)
            self._num_done[range_index] = self.done.count(1, indices.start, indices.stop)
            known = self._known.get(range_index, {})
            ends += [index for index in self._last_of_runs(indices) if index not in known]
        for record in _read_records(self._store, [*self._ends_of_parts[-_NUM_ENDS:], *ends[-_NUM_ENDS:]]):
            check_same_shard(self._plan.shard(record.index), record.shard, self._plan.num_images, self._store.uri)

    def _committed(self, range_index: int) -> list[int]:
        keys = (info.key for info in self._store.list(f"_parts/{range_index:05d}"))
        return [index for index in map(part_index, keys) if index is not None]

    def _mark(self, indices: Iterable[int | None]) -> None:
        for index in indices:
            if index is not None and index < self._plan.num_shards:
                self.done[index] = 1

    def _last_of_runs(self, indices: range) -> list[int]:
        """Shards that are there before one that is not, or at the end: any may be the last of an earlier plan."""
        stop = indices.stop
        ends, start = [], self.done.find(1, indices.start, stop)
        while start != -1:
            end = self.done.find(0, start, stop)
            ends.append((stop if end == -1 else end) - 1)
            start = -1 if end == -1 else self.done.find(1, end, stop)
        return ends

    def _indices(self, range_index: int) -> range:
        first = range_index * SHARDS_PER_PART
        return range(first, min(first + SHARDS_PER_PART, self._plan.num_shards))

    def _close_if_complete(self, range_index: int) -> None:
        indices = self._indices(range_index)
        is_open = range_index not in self._parts and range_index not in self._closing
        if is_open and self._num_done[range_index] == len(indices):
            known = dict(self._known.get(range_index, {}))
            if self._thread is None:
                self._thread = ThreadPool(1)  # unlike an executor's it is waited for by nobody who is interrupted
            self._closing[range_index] = self._thread.apply_async(
                close_range, (self._store, self._plan, indices, known)
            )

    def _take_closed(self, closed: ClosedRange) -> None:
        self.unnamed += closed.unnamed
        if closed.part is not None:
            self._parts[closed.index] = closed.part
            self._known.pop(closed.index, None)
        for index in closed.lost:
            self.done[index] = 0
            self._num_done[closed.index] -= 1
            self._known.get(closed.index, {}).pop(index, None)
        if closed.lost:
            say(
                f"{len(closed.lost)} committed shards have lost their tar (the first is {closed.lost[0]}): making them "
                "again"
            )


def close_range(store: ObjectStore, plan: ShardPlan, indices: range, known: Mapping[int, ShardRecord]) -> ClosedRange:
    """Compare the records of a complete range with its tars, and write its part.

    Args:
        store: The output prefix.
        plan: The shards wanted.
        indices: The shards of the range.
        known: Tars whose records need not be read: from a manifest, or from this run's own commits.

    Raises:
        OutputExistsError: If a record cuts the ids differently.
        ConfigError, FormatVersionError: If a record is damaged, or of another version.
        PipelineError: If a shard has lost its tar from which images were removed.
        StorageError: If the store fails.
    """
    range_index = indices.start // SHARDS_PER_PART
    objects = {info.key: info for info in store.list(f"{range_index:05d}") if tar_index(info.key) is not None}
    removals = read_removals(store, f"{range_index:05d}")
    tars = dict(known)
    for record in _read_records(store, [index for index in indices if index not in known]):
        check_same_shard(plan.shard(record.index), record.shard, plan.num_images, store.uri)
        tars[record.index] = record.tar
    for index, removed in removals.items():
        if index in tars:
            tars[index] = removed.tar
            for key in removed.superseded_keys:
                objects.pop(key, None)  # jobs/output.py remove deletes it, once the manifest names it no more
    lost = []
    for index in indices:
        tar = tars.get(index)
        found = None if tar is None else objects.pop(tar.key, None)
        if tar is None or found is None or found.size_bytes != tar.size_bytes:
            lost.append(index)
    if held := sorted(removals.keys() & set(lost)):
        raise PipelineError(
            f"{store.uri}: shard {held[0]}, from which images were removed, has lost its tar; sampling would make "
            f"those too: jobs/output.py repair {store.uri} makes it again without them"
        )
    part = None if lost else write_part(store, range_index, [tars[index] for index in indices])
    return ClosedRange(index=range_index, part=part, lost=tuple(lost), unnamed=tuple(objects.values()))


def _is_superseded(tars: Sequence[ShardRecord], first: int, removals: Mapping[int, Removals]) -> bool:
    return without_removed(tars, first, removals) != list(tars)


def _read_records(store: ObjectStore, indices: Sequence[int]) -> Iterator[CommitRecord]:
    """The records that are there, of some shards."""
    if not indices:
        return
    with ThreadPool(
        min(_THREADS, len(indices))
    ) as threads:  # unlike an executor it waits for no thread when interrupted
        for start in range(0, len(indices), _READ_CHUNK):
            chunk = indices[start : start + _READ_CHUNK]
            yield from (one for one in threads.imap(lambda index: _record(store, index), chunk) if one is not None)


def _record(store: ObjectStore, index: int) -> CommitRecord | None:
    try:
        return read_record(store, index)
    except ObjectMissingError:
        return None


def collect_orphans(
    store: ObjectStore, unnamed: Sequence[ObjectInfo], *, older_than_s: float, now_s: float
) -> list[str]:
    """Delete the tars that no record names and that nobody can still be writing.

    Args:
        store: The output prefix.
        unnamed: The candidates, from closed ranges.
        older_than_s: Least age to collect, seconds; much longer than any writer takes from its tar to its record.
        now_s: The time, seconds since 1970.

    Returns:
        The keys that were deleted: up to the first that cannot be, of which a line is said.
    """
    collected, remover = [], Remover(store, say)
    for candidate in unnamed:
        index = tar_index(candidate.key)
        if index is None or now_s - candidate.modified_s <= older_than_s:
            continue
        record = _record(store, index)
        # Its age once more: a writer that makes the same bytes may have adopted it since the listing.
        current = store.stat(candidate.key)
        removed = read_removals(store, f"{index:09d}").get(index)
        is_named = (record is not None and record.key == candidate.key) or (
            removed is not None and candidate.key in removed.keys
        )
        if not is_named and current is not None and now_s - current.modified_s > older_than_s:
            if not remover.remove([candidate.key]):
                break
            collected.append(candidate.key)
    return collected
