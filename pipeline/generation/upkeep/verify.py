"""Whether a run is as it was made: every shard against its record, the records against the manifest and its parts.

Nothing is written. A part of the manifest, 10,000 shards, is looked at at a time, and a few shards at once, so that a
run of any size needs little memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Literal

from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError
from pipeline.generation.output.commits import part_index, part_key, tar_index
from pipeline.generation.output.manifest import MANIFEST_KEY, GenerationManifest, load_generation_manifest
from pipeline.generation.output.removals import removal_index, removal_key
from pipeline.generation.spec.sampling_plan import ShardPlan, plan_shards
from pipeline.generation.upkeep.range_facts import THREADS, RangeFacts, measure, read_range, tar_faults
from pipeline.generation.upkeep.stored_run import require_run
from pipeline.progress import Progress
from pipeline.stores.object_store import ObjectStore

Kind = Literal["manifest", "part", "record", "missing", "altered", "removal", "orphan", "stranger"]
_OF_A_RUN = re.compile(
    r"manifest\.json|config\.toml|contact_sheet\.png|index\.html|gallery/.+|evaluation\.json|completions\.png|"
    r"lease\.json|ledger\.json|plan\.json|_manifest/\d{5}-\d{5}-[0-9a-f]{64}\.parquet"
)
PREFIX_NAME = re.compile(r"[0-9a-f]{16}")
"""What a prefix is called that jobs/sample.py made: the first digits of its spec's digest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    kind: Kind
    """manifest, part, record: that object; missing, altered: a tar; removal: one that is not finished; orphan: a tar
    that no record names; stranger: an object that no run makes."""
    key: str
    """The object."""
    text: str
    """What is wrong with it, as the end of a sentence."""
    index: int | None = None
    """Of which output shard it is; None: of none."""


def verify(store: ObjectStore, *, quick: bool = False) -> Iterator[Finding]:
    """What is wrong with a run.

    Args:
        store: The run's prefix.
        quick: Compare sizes by listing, and read neither shards nor records.

    Yields:
        Findings, as they are found.

    Raises:
        ConfigError: If no run has finished there.
        FormatVersionError: If something is of another version.
        StorageError: If the store fails.
    """
    require_run(store)
    try:
        manifest = load_generation_manifest(store)
    except ConfigError as error:
        yield Finding(kind="manifest", key=MANIFEST_KEY, text=f"is damaged ({error}), so that no shard can be compared")
    else:
        assert manifest is not None, "it was there a moment ago"
        yield from manifest_faults(store, manifest)
        yield from _shards(store, manifest, quick=quick)
    yield from _strangers(store)


def manifest_faults(store: ObjectStore, manifest: GenerationManifest) -> list[Finding]:
    """What the manifest itself shows to be edited; reads nothing."""
    spec, said = manifest.spec, []
    if manifest.spec_digest != spec.digest:
        said.append(f"was edited: spec_digest is {manifest.spec_digest}, that of its spec {spec.digest}")
    place = store.uri.rpartition("/")[2]
    if PREFIX_NAME.fullmatch(place) and place != spec.digest[:16]:
        said.append(f"was edited: its spec has the digest {spec.digest[:16]}, the prefix is called {place}")
    try:
        plan = plan_shards(spec, manifest.num_images)
    except ValueError as error:
        said.append(f"was edited: {error}")
    else:
        if [(part.range_index, part.num_shards) for part in manifest.parts] != ranges_of(plan):
            said.append(
                f"was edited: {manifest.num_images} images are {plan.num_shards} shards, its parts name "
                f"{manifest.num_shards}, or leave a range out"
            )
    return [Finding(kind="manifest", key=MANIFEST_KEY, text=text) for text in said]


def ranges_of(plan: ShardPlan) -> list[tuple[int, int]]:
    """The ranges of a plan, each with its number of shards."""
    starts = range(0, plan.num_shards, SHARDS_PER_PART)
    return [(start // SHARDS_PER_PART, min(SHARDS_PER_PART, plan.num_shards - start)) for start in starts]


def _shards(store: ObjectStore, manifest: GenerationManifest, *, quick: bool) -> Iterator[Finding]:
    with (
        ThreadPool(THREADS) as threads,
        Progress("verifying", manifest.num_shards, "shards") as progress,
    ):
        for part in manifest.parts:
            facts = read_range(store, part, threads, with_records=not quick)
            yield from _records(manifest, part, facts)
            wanted = {index: tar for index in facts.indices if (tar := facts.row(index) or facts.committed(index))}
            for index, fault in tar_faults(store, facts, wanted, threads, quick=quick):
                if fault is not None:
                    kind: Kind = "missing" if fault == "is missing" else "altered"
                    yield Finding(kind=kind, key=wanted[index].key, text=fault, index=index)
                progress.advance(1)
            if not quick:
                yield from _gone(store, manifest, facts)
            if facts.rows is not None or not quick:
                yield from _unnamed(facts, wanted)


def _records(manifest: GenerationManifest, part: PartRecord, facts: RangeFacts) -> Iterator[Finding]:
    """The part, the records, and whether they say the same."""
    if facts.part_fault is not None:
        yield Finding(kind="part", key=part.key, text=facts.part_fault)
    for key, fault in facts.removal_faults.items():
        yield Finding(kind="removal", key=key, text=fault, index=removal_index(key))
    for index, unreadable in facts.record_faults.items():
        yield Finding(kind="record", key=part_key(index), text=unreadable, index=index)
    size, num_images = manifest.spec.shard_size, manifest.num_images
    for index in facts.indices:
        if index in facts.broken:
            continue  # nothing says what the others should be
        row, removed = facts.row(index), facts.removals.get(index)
        if row is not None and removed is not None and row != removed.tar:
            text = "is named by the manifest, though images were removed from it; run jobs/output.py remove again"
            yield Finding(kind="removal", key=row.key, text=text, index=index)
        num_planned = min(size, num_images - index * size)
        original = facts.expected_commit(index)
        if original is not None and original.num_samples != num_planned:
            text = f"says {original.num_samples} images of shard {index}, num_images gives it {num_planned}"
            yield Finding(kind="manifest", key=MANIFEST_KEY, text=f"was edited: its part {text}", index=index)
        disagreement = _disagreement(manifest, facts, index)
        if disagreement is not None:
            yield Finding(kind="record", key=part_key(index), text=disagreement, index=index)


def _disagreement(manifest: GenerationManifest, facts: RangeFacts, index: int) -> str | None:
    """How a record differs from the manifest; None: it does not, or cannot be read."""
    record = facts.records.get(index)
    if record is None:
        return None
    for name, found, expected in (
        ("spec_digest", record.spec_digest, manifest.spec.digest),
        ("model_digest", record.model_digest, manifest.spec.model_digest),
        ("first_id", record.first_id, index * manifest.spec.shard_size),
    ):
        if found != expected:
            return f"disagrees with the manifest: its {name} is {found}, not {expected}"
    tar = facts.expected_commit(index)
    if tar is not None and record.tar != tar:
        return f"disagrees with the manifest: it names {record.key} with {record.num_samples} images, not {tar.key}"
    return None


def _gone(store: ObjectStore, manifest: GenerationManifest, facts: RangeFacts) -> Iterator[Finding]:
    """Removal records that name other images than those that are missing from the tar; few shards have any."""
    size = manifest.spec.shard_size
    for index, removed in facts.removals.items():
        ids = frozenset(range(index * size, min((index + 1) * size, manifest.num_images)))
        found = measure(store, removed.tar.key) if index in facts.indices else None
        if found is not None and found[1] != ids - removed.ids:
            text = f"names other images than those that are missing from {removed.tar.key}"
            yield Finding(kind="removal", key=removal_key(index, len(removed.records) - 1), text=text, index=index)


def _unnamed(facts: RangeFacts, wanted: dict[int, ShardRecord]) -> Iterator[Finding]:
    """Tars of the range that should not be there."""
    named = {tar.key for tar in wanted.values()} | {record.key for record in facts.records.values()}
    gone = {key for removed in facts.removals.values() for key in removed.superseded_keys}
    for key in facts.tars:
        index = tar_index(key)
        if key in gone and (index not in wanted or wanted[index].key != key):
            text = "holds images that were removed; run jobs/output.py remove again"
            yield Finding(kind="removal", key=key, text=text, index=index)
        elif key not in named and index in facts.indices:
            yield Finding(kind="orphan", key=key, text="is named by no record", index=index)


def _strangers(store: ObjectStore) -> Iterator[Finding]:
    for info in store.list():
        own = (tar_index(info.key), part_index(info.key), removal_index(info.key))
        if all(one is None for one in own) and not _OF_A_RUN.fullmatch(info.key):
            yield Finding(kind="stranger", key=info.key, text="belongs to no run")
