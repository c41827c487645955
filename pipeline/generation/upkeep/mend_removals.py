"""Removal records that are lost, damaged or edited, written again, so that what was taken down stays down.

A shard with removals is a chain: the tar that the commit record names, one tar after each removal, the last of them the
tar that stands. The others are deleted, but their digests, sizes and counts stand twice, in the record before and in
the one after, and which images are gone is seen in the tar that stands. So one record of a chain follows from all else,
except why and when; where two are damaged, or more than one would do, nothing is changed.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline import config_io
from pipeline.data.shard_table import ShardRecord
from pipeline.generation.output.commits import tar_index
from pipeline.generation.output.removals import RemovalRecord, Removals, fault_of_removals, removal_key, sound_removals
from pipeline.generation.spec.sampling_plan import OutputShard, ShardPlan
from pipeline.generation.upkeep.range_facts import RangeFacts, measure
from pipeline.generation.upkeep.repaired import Repaired, put
from pipeline.stores.object_store import ObjectStore

LOST_REASON = "not known: the record was lost, and jobs/output.py repair wrote it again"


def mend_removals(store: ObjectStore, facts: RangeFacts, plan: ShardPlan, done: Repaired) -> frozenset[int]:
    """Write the removal records of a range again that do not agree with what else is there.

    Args:
        store: The run's prefix.
        facts: The range; to be read again where something was written.
        plan: The run's shards.
        done: Takes what was written, and what could not be.

    Returns:
        Shards whose removals stay unclear: nothing of theirs may be changed.
    """
    unclear = set[int]()
    for index in facts.indices:
        chain = _Chain(store, facts, plan.shard(index))
        if chain.is_sound():
            continue
        mended = chain.mend()
        if mended is None:
            unclear.add(index)
            done.unmended.append(
                f"shard {index}: what was removed of it is not clear: removal records, commit record, manifest and tar "
                "do not agree; nothing of it was changed, put back the record that was altered"
            )
            continue
        key = removal_key(index, mended.sequence)
        put(store, key, config_io.to_json(mended))
        done.mended.append(key)
    return frozenset(unclear)


class _Chain:
    """The removals of one shard, beside all else that tells of them."""

    def __init__(self, store: ObjectStore, facts: RangeFacts, shard: OutputShard) -> None:
        self._store, self._shard, self._ids = store, shard, frozenset(shard.sample_ids)
        index = shard.index
        self._row = facts.row(index)
        self._committed = facts.records[index].tar if index in facts.records else None
        self._tars = [key for key in facts.tars if tar_index(key) == index]
        self._removals = facts.removals.get(index)
        found: Mapping[str, RemovalRecord | str] = facts.broken.get(index, {})
        if self._removals is not None:
            found = {removal_key(index, one.sequence): one for one in self._removals.records}
        self._found = dict(found)
        self._is_broken = index in facts.broken

    def is_sound(self) -> bool:
        """Whether the records agree with the part and the tar that stands, as far as those are there."""
        if self._is_broken:
            return False
        if self._removals is None:
            if self._row is not None:
                return self._row.num_samples >= self._shard.num_samples
            return not self._looks_removed()
        found = measure(self._store, self._removals.tar.key)
        return self._agrees(self._removals) and (
            found is None or found == (self._removals.tar, self._ids - self._removals.ids)
        )

    def _looks_removed(self) -> bool:
        """Without a part: whether the original tar is gone and one with fewer of its images is there."""
        if self._committed is None or self._committed.key in self._tars:
            return False
        return any(found is not None and found[1] < self._ids for found in map(self._measure, self._tars))

    def _agrees(self, removals: Removals) -> bool:
        states = {tar.key: tar for one in removals.records for tar in (one.tar_before, one.tar)}
        if removals.original.num_samples != self._shard.num_samples:
            return False
        return self._row is None or states.get(self._row.key) == self._row

    def mend(self) -> RemovalRecord | None:
        """The one record that, written again, makes all agree; None: there is none, or more than one."""
        by_sequence = {int(key[-9:-5]): record for key, record in self._found.items()}
        number = max(by_sequence, default=-1) + 1
        unread = [k for k in range(number) if not isinstance(by_sequence.get(k), RemovalRecord)]
        if len(unread) > 1:
            return None
        readable = {k: one for k, one in by_sequence.items() if isinstance(one, RemovalRecord)}
        options = {}
        for k in unread or range(number + 1):
            for record in self._rebuild(k, readable, by_sequence.get(k)):
                chain = readable | {k: record}
                in_order = {removal_key(one.index, one.sequence): one for _, one in sorted(chain.items())}
                if fault_of_removals(in_order) is not None:
                    continue
                removals = sound_removals(in_order)
                if self._agrees(removals) and self._committed in (None, removals.original):
                    options[k, record.key, record.ids] = record
        lost = [record for (k, _, _), record in options.items() if k == number]
        found = lost or list(options.values())  # what is missing at the end contradicts none of those that are there
        return found[0] if len(found) == 1 else None

    def _rebuild(
        self, k: int, readable: Mapping[int, RemovalRecord], had: RemovalRecord | str | None
    ) -> Iterator[RemovalRecord]:
        """Record k, from the tars before and after it: one for each tar that may be the one after."""
        others = {j: one for j, one in readable.items() if j != k}
        known = others.get(k - 1)
        before = known.tar if known is not None else None
        if k == 0:
            before = self._committed
            if before is None and isinstance(had, RemovalRecord):
                before = _counted(had.tar_before, self._shard.num_samples)
        if before is None:
            return
        older = {one.old_key for j, one in others.items() if j < k} | {before.key}
        follower = others.get(k + 1)
        if follower is not None:
            last = others[max(others)].key
            standing, afters = [last], {last: follower.tar_before}
        else:
            standing = [key for key in self._tars if key not in older]
            if self._row is not None and self._row.key not in older:
                standing = [self._row.key]
            afters = {}
        reason, removed_at_utc = self._told(k, had)
        gone_before = {one for other in others.values() for one in other.ids}
        for key in standing:
            found = self._measure(key)
            if found is None or not found[1] < self._ids:
                continue
            ids = self._ids - found[1] - gone_before
            after = afters.get(key, found[0])
            yield RemovalRecord(
                index=self._shard.index,
                sequence=k,
                ids=tuple(sorted(ids)),
                reason=reason,
                removed_at_utc=removed_at_utc,
                old_key=before.key,
                old_sha256=before.sha256,
                old_size_bytes=before.size_bytes,
                key=after.key,
                sha256=after.sha256,
                size_bytes=after.size_bytes,
                num_samples=before.num_samples - len(ids),
            )

    def _told(self, k: int, had: RemovalRecord | str | None) -> tuple[str, str]:
        """Why and when: what the damaged record still says."""
        said: Any = {}
        if isinstance(had, RemovalRecord):
            said = {"reason": had.reason, "removed_at_utc": had.removed_at_utc}
        elif had is not None:
            try:
                said = json.loads(self._store.read(removal_key(self._shard.index, k)))
            except ValueError:
                said = {}
        reason, removed_at_utc = (
            one if isinstance(said, dict) and isinstance(one := said.get(name), str) else None
            for name in ("reason", "removed_at_utc")
        )
        return reason or LOST_REASON, removed_at_utc or datetime.now(UTC).isoformat(timespec="seconds")

    def _measure(self, key: str) -> tuple[ShardRecord, frozenset[int]] | None:
        return measure(self._store, key)


def _counted(tar: ShardRecord, num_samples: int) -> ShardRecord:
    return ShardRecord(key=tar.key, size_bytes=tar.size_bytes, sha256=tar.sha256, num_samples=num_samples)
