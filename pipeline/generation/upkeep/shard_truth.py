"""Which tar each shard of a damaged run must have, and what proves it.

Four things tell of a shard: its row in the manifest's part, its commit record, its removal records, and its tar, whose
key holds the digest of its bytes. The part is believed where its own digest is right; its bytes name the digest, size
and count of each shard at once. A record alone is compared with the tar that it names, and whoever looks only at a part
of a record would spread one altered digit: sizes and counts are then those of the tar. What nothing proves stays as it
is.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool

from pipeline.data.shard_parts import PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.generation.output.commits import tar_index
from pipeline.generation.output.manifest import encode_part
from pipeline.generation.spec.sampling_plan import ShardPlan
from pipeline.generation.upkeep.range_facts import RangeFacts, measure
from pipeline.generation.upkeep.repaired import Repaired, put
from pipeline.stores.object_store import ObjectStore


def restore_part(store: ObjectStore, part: PartRecord, facts: RangeFacts, done: Repaired) -> RangeFacts:
    """Write a part again that is gone or altered, where the records give the bytes whose digest the manifest names.

    Args:
        store: The run's prefix.
        part: What the manifest names.
        facts: Its range.
        done: Takes its key.

    Returns:
        The range with its part; as it was where the records give other bytes, or the part is there.
    """
    if facts.rows is not None:
        return facts
    rows = [tar for index in facts.indices if (tar := facts.committed(index)) is not None]
    if len(rows) < len(facts.indices):
        return facts
    written, data = encode_part(part.range_index, rows)
    if written != part:
        return facts
    put(store, part.key, data)
    done.mended.append(part.key)
    return replace(facts, rows=rows, part_fault=None)


def find_truth(
    store: ObjectStore,
    facts: RangeFacts,
    plan: ShardPlan,
    threads: ThreadPool,
    done: Repaired,
    *,
    unclear: Collection[int],
) -> dict[int, ShardRecord]:
    """The tar that each shard of a range must have.

    Args:
        store: The run's prefix.
        facts: The range.
        plan: The run's shards.
        threads: Read tars, where those must tell.
        done: Takes a sentence for each shard of which nothing says it.
        unclear: Shards that are left out, since something else was said of them.
    """
    clear = [index for index in facts.indices if index not in unclear]
    truth: dict[int, ShardRecord] = {}
    for index, tar in zip(clear, threads.imap(lambda one: _settle(store, facts, plan, one), clear)):
        if isinstance(tar, str):
            done.unmended.append(f"shard {index}: {tar}")
        else:
            truth[index] = tar
    return truth


def _settle(store: ObjectStore, facts: RangeFacts, plan: ShardPlan, index: int) -> ShardRecord | str:
    """The tar of a shard, or why it is not known."""
    removed, row, committed = facts.removals.get(index), facts.row(index), facts.committed(index)
    num_left = plan.shard(index).num_samples - (0 if removed is None else len(removed.ids))
    if removed is not None:
        tar = removed.tar  # mend_removals has compared it
    elif row is None:
        measured = _measured(store, facts, index, committed, num_left)
        if measured is None:
            return "neither part nor record says which bytes it has; delete its tars, and its record if there is one"
        tar = measured
    elif committed is not None and committed.key != row.key:
        is_other = not _is_whole(store, row, num_left) and _is_whole(store, committed, num_left)
        tar = committed if is_other else row
    else:
        tar = row
    if tar.num_samples != num_left:
        return f"{tar.key} is said to hold {tar.num_samples} images, and {num_left} belong there; nothing was changed"
    return tar


def _measured(
    store: ObjectStore, facts: RangeFacts, index: int, committed: ShardRecord | None, num_left: int
) -> ShardRecord | None:
    """Without a part: what the record's tar says of itself, else the record; without a record the only whole tar."""
    if committed is not None:
        found = measure(store, committed.key)
        return committed if found is None else found[0]
    whole = [
        tar for tar, ids in _all_measured(store, facts, index) if len(ids) == num_left and tar.num_samples == num_left
    ]
    return whole[0] if len(whole) == 1 else None


def _all_measured(store: ObjectStore, facts: RangeFacts, index: int) -> Iterator[tuple[ShardRecord, frozenset[int]]]:
    for key in facts.tars:
        if tar_index(key) == index and (found := measure(store, key)) is not None:
            yield found


def _is_whole(store: ObjectStore, tar: ShardRecord, num_samples: int) -> bool:
    found = measure(store, tar.key)
    return found is not None and found[0] == tar and tar.num_samples == num_samples
