"""A damaged run, made whole again: to the bytes that were recorded, or not at all.

First it is found out how far the run goes (mend_manifest.py), what was removed of it (mend_removals.py) and which tar
each shard must have (shard_truth.py). Then, of each range, records and part are written again as far as that is proven,
and the tars that are missing or altered are made again in this process; what only such a tar proves is written after
it. Last come the manifest and the orphans. A repair that is killed can be run again. What cannot be made again to the
recorded bytes stays as it is and is named, and of its shard nothing else is changed.
"""

import functools
import hashlib
import platform
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.pool import ThreadPool

from pipeline import config_io
from pipeline.data.shard_parts import PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError, PipelineError, UsageError
from pipeline.generation.output.commits import CommitRecord, Provenance, part_key, tar_index
from pipeline.generation.output.inventory import collect_orphans
from pipeline.generation.output.manifest import (
    MANIFEST_KEY,
    GenerationManifest,
    encode_part,
    load_generation_manifest,
    replace_manifest,
    unknown_part,
)
from pipeline.generation.output.removals import removal_key
from pipeline.generation.spec.sampling_plan import plan_shards
from pipeline.generation.upkeep.making_again import MakingAgain
from pipeline.generation.upkeep.mend_manifest import mend_manifest
from pipeline.generation.upkeep.mend_removals import mend_removals
from pipeline.generation.upkeep.range_facts import THREADS, RangeFacts, read_range, tar_faults
from pipeline.generation.upkeep.repaired import Repaired, put
from pipeline.generation.upkeep.shard_truth import find_truth, restore_part
from pipeline.generation.upkeep.stored_run import ModelAccess, require_run, stored_config
from pipeline.progress import Progress
from pipeline.stores.object_store import ObjectInfo, ObjectStore


def repair(store: ObjectStore, access: ModelAccess, *, use_gpu: bool | None, orphan_age_s: float | None) -> Repaired:
    """Make again what is wrong with a run.

    Args:
        store: The run's prefix.
        access: How models are reached that are not staged beside the run.
        use_gpu: Whether images are made on a GPU; None: as the run's config.toml says.
        orphan_age_s: Age, seconds, from which tars that no record names are removed; None: as config.toml says.

    Raises:
        ConfigError: If no run has finished there.
        PipelineError: If nothing says any more what it was made of or how far it goes; as its subclasses say, of
            models, inputs and the store.
    """
    require_run(store)
    config, done = stored_config(store), Repaired()
    etag = store.read_versioned(MANIFEST_KEY).etag
    manifest = mend_manifest(store, access)
    making = MakingAgain(store, manifest, access, use_gpu)
    parts: list[PartRecord] = []
    orphans: list[ObjectInfo] = []
    with ThreadPool(THREADS) as threads, Progress("checking", manifest.num_shards, "shards") as progress:
        for part in manifest.parts:
            one = _Range(store, manifest, part, threads, making, done)
            parts.append(one.mend(progress))
            orphans += one.orphans
    mended = replace(manifest, parts=tuple(parts))
    is_known = all(part != unknown_part(part.range_index, part.num_shards) for part in parts)
    if is_known and not _stands(store, mended):
        if not replace_manifest(store, mended, etag):
            raise PipelineError(f"{store.uri}/{MANIFEST_KEY}: another has changed it meanwhile; run again")
        done.mended.append(MANIFEST_KEY)
    elif not is_known:
        done.unmended.append(f"{MANIFEST_KEY}: is made again when all shards of its parts are there")
    age_s = orphan_age_s if orphan_age_s is not None else 86_400.0 if config is None else config.orphan_age_s
    done.num_orphans = len(collect_orphans(store, orphans, older_than_s=age_s, now_s=time.time()))
    return done


def _stands(store: ObjectStore, manifest: GenerationManifest) -> bool:
    try:
        return load_generation_manifest(store) == manifest
    except ConfigError:
        return False


@functools.cache
def _mended_by() -> Provenance:
    return Provenance(
        host=socket.gethostname(),
        device="none: the record was written again from the manifest",
        software=f"python {platform.python_version()}",
        started_at_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=0.0,
    )


class _Range:
    """One range of a run while it is mended."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: GenerationManifest,
        part: PartRecord,
        threads: ThreadPool,
        making: MakingAgain,
        done: Repaired,
    ) -> None:
        """Find out what is there, and what must be; of what is wrong only removal records and the part are written."""
        self._store, self._spec, self._part, self._threads = store, manifest.spec, part, threads
        self._making, self._done = making, done
        self._plan = plan_shards(manifest.spec, manifest.num_images)
        self._before = self._facts = self._read()
        num_mended = len(done.mended)
        unclear = mend_removals(store, self._facts, self._plan, done)
        if len(done.mended) > num_mended:
            self._facts = self._read()
        self._truth = find_truth(store, self._facts, self._plan, threads, done, unclear=unclear)
        self._whole = set[int]()

    def _read(self) -> RangeFacts:
        facts = read_range(self._store, self._part, self._threads, with_records=True)
        return restore_part(self._store, self._part, facts, self._done)

    @property
    def orphans(self) -> list[ObjectInfo]:
        """Tars that nothing named, neither before nor after, of shards that are whole now."""
        facts = self._before
        named = {tar.key for tar in self._truth.values()} | {record.key for record in facts.records.values()}
        named |= {row.key for row in facts.rows or ()}
        return [info for key, info in facts.tars.items() if key not in named and tar_index(key) in self._whole]

    def mend(self, progress: Progress) -> PartRecord:
        """Write what is proven, make tars again, write what those prove.

        Returns:
            The part that the manifest must name.
        """
        wrong: list[int] = []
        for index, fault in tar_faults(self._store, self._facts, self._truth, self._threads, quick=False):
            if fault is None:
                self._whole.add(index)
            else:
                wrong.append(index)
            progress.advance(1)
        waiting = [index for index in self._truth if not self._mend_record(index)]
        for index in wrong:
            removed = self._facts.removals.get(index)
            without = frozenset[int]() if removed is None else removed.ids
            if self._making.put_back(index, self._truth[index], without, self._done):
                self._whole.add(index)
        for index in waiting:
            self._mend_record(index)
        return self._mend_part()

    def _mend_record(self, index: int) -> bool:
        """Write a commit record that is missing, damaged, or says otherwise; False: what it must say is not proven."""
        tar, standing = self._truth[index], self._facts.records.get(index)
        removed = self._facts.removals.get(index)
        original = tar if removed is None else removed.original
        record = self._record(index, original)
        if standing is not None and replace(standing, made=record.made) == record:
            return True
        if removed is not None:
            if standing is not None and _differ(standing.tar, original):
                return self._judge(index, standing, record)
        elif index not in self._whole:
            is_other = standing is not None and standing.key != tar.key
            if is_other or self._facts.row(index) != tar:
                return False
        put(self._store, part_key(index), config_io.to_json(record))
        self._done.mended.append(part_key(index))
        return True

    def _record(self, index: int, tar: ShardRecord) -> CommitRecord:
        return CommitRecord(
            index=index,
            first_id=self._plan.shard(index).first_id,
            num_samples=tar.num_samples,
            key=tar.key,
            size_bytes=tar.size_bytes,
            sha256=tar.sha256,
            model_digest=self._spec.model_digest,
            spec_digest=self._spec.digest,
            made=_mended_by(),
        )

    def _judge(self, index: int, standing: CommitRecord, record: CommitRecord) -> bool:
        """Of a tar that is gone, commit record and removal record say different things: it is made again to tell."""
        try:
            data = self._making.pack(index)
        except UsageError:
            raise
        except PipelineError as error:
            self._done.unmended.append(f"{part_key(index)}: disagrees with what was removed ({error})")
            return True
        made = (hashlib.sha256(data).hexdigest(), len(data))
        removal = self._facts.removals[index].records[0]
        if made == (record.sha256, record.size_bytes):
            key, text = part_key(index), config_io.to_json(record)
        elif made == (standing.sha256, standing.size_bytes):
            key = removal_key(index, 0)
            text = config_io.to_json(
                replace(removal, old_key=standing.key, old_sha256=standing.sha256, old_size_bytes=standing.size_bytes)
            )
        else:
            self._done.unmended.append(
                f"{part_key(index)}: disagrees with {removal_key(index, 0)} about the tar that both name, and this "
                "machine makes other bytes; nothing was changed"
            )
            return True
        put(self._store, key, text)
        self._done.mended.append(key)
        return True

    def _mend_part(self) -> PartRecord:
        """Write the part of the range again if it is gone, or says otherwise than what is proven."""
        facts = self._facts
        if facts.rows is None and not self._whole.issuperset(facts.indices):
            return self._part
        rows = [self._truth[i] if i in self._whole else facts.row(i) for i in facts.indices]
        shards = [row for row in rows if row is not None]
        if facts.rows is not None and list(facts.rows) == shards:
            return self._part
        written, data = encode_part(self._part.range_index, shards)
        put(self._store, written.key, data)
        self._done.mended.append(written.key)
        if facts.part_fault is not None and written != self._part:
            self._store.delete(self._part.key)  # altered bytes under this key would stay: parts are created once
        return written


def _differ(one: ShardRecord, other: ShardRecord) -> bool:
    return (one.key, one.size_bytes) != (other.key, other.size_bytes)
