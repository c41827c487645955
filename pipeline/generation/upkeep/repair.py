"""A damaged run, made whole again: to the bytes that were recorded, or not at all.

In this order, so that a repair that is killed can be run again: the manifest, of each range its part and its records,
then the tars that are missing or altered, made again in this process, last the orphans. What cannot be made again to
the recorded bytes stays as it is and is named.
"""

import functools
import hashlib
import json
import platform
import socket
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.pool import ThreadPool
from typing import Any

from pipeline import config_io
from pipeline.data.shard_parts import PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError, ObjectMissingError, PipelineError
from pipeline.generation.making.packing import pack_samples
from pipeline.generation.making.shard_maker import ShardMaker
from pipeline.generation.output.commits import (
    CommitRecord,
    Provenance,
    part_index,
    part_key,
    read_record,
    tar_index,
)
from pipeline.generation.output.inventory import collect_orphans
from pipeline.generation.output.manifest import (
    MANIFEST_KEY,
    GenerationManifest,
    load_generation_manifest,
    replace_manifest,
    write_part,
)
from pipeline.generation.output.removals import read_removals
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.spec.sampling_plan import SamplingSpec, plan_shards
from pipeline.generation.upkeep.range_facts import THREADS, RangeFacts, read_range, tar_faults
from pipeline.generation.upkeep.stored_run import ModelAccess, find_ingredients, require_run, stored_config
from pipeline.generation.upkeep.verify import manifest_faults, ranges_of
from pipeline.progress import Progress, say
from pipeline.stores.object_store import ObjectStore

_NOT_A_PART = "0" * 64
"""Stands for a part that is not known: none has this digest."""


@dataclass(kw_only=True, slots=True)
class Repaired:
    """What a repair has done, and what it could not do."""

    mended: list[str] = field(default_factory=list)
    """Keys that were written again."""
    unmended: list[str] = field(default_factory=list)
    """What stays wrong, a sentence each."""
    num_orphans: int = 0
    """Orphans that were removed."""


def repair(store: ObjectStore, access: ModelAccess, *, use_gpu: bool | None, orphan_age_s: float | None) -> Repaired:
    """Make again what is wrong with a run.

    Args:
        store: The run's prefix.
        access: How models are reached that are not staged beside the run.
        use_gpu: Whether images are made on a GPU; None: as the run's config.toml says.
        orphan_age_s: Age, seconds, from which tars that no record names are removed; None: as config.toml says.

    Raises:
        ConfigError: If no run has finished there, or nothing says any more what it was made of.
        PipelineError: As its subclasses say, of models, inputs and the store.
    """
    require_run(store)
    config, done = stored_config(store), Repaired()
    manifest = _mend_manifest(store, access, done)
    wrong: dict[int, ShardRecord] = {}
    orphans = []
    with ThreadPool(THREADS) as threads, Progress("checking", manifest.num_shards, "shards") as progress:
        for part in manifest.parts:
            facts = read_range(store, part, threads, with_records=True)
            truth = _truth(store, manifest, facts, threads, done)
            for index, fault in tar_faults(store, facts, truth, threads, quick=False):
                if fault is not None:
                    wrong[index] = truth[index]
                progress.advance(1)
            _mend_records(store, manifest, facts, truth, done)
            manifest = _mend_part(store, manifest, part, facts, truth, done)
            named = {tar.key for tar in truth.values()}
            orphans += [info for key, info in facts.tars.items() if key not in named and tar_index(key) in truth]
    if wrong:
        _make_again(store, manifest, wrong, access, use_gpu, done)
    age_s = orphan_age_s if orphan_age_s is not None else 86_400.0 if config is None else config.orphan_age_s
    done.num_orphans = len(collect_orphans(store, orphans, older_than_s=age_s, now_s=time.time()))
    return done


def _mend_manifest(store: ObjectStore, access: ModelAccess, done: Repaired) -> GenerationManifest:
    """The manifest, made again from the records and the spec where it was edited."""
    read = store.read_versioned(MANIFEST_KEY)
    manifest: GenerationManifest | None = None
    try:
        manifest = load_generation_manifest(store)
    except ConfigError:
        said: dict[str, Any] = _as_dict(read.data)
    else:
        assert manifest is not None, "it was there a moment ago"
        said = {name: getattr(manifest, name) for name in ("model_uri", "guide_uri", "class_names")}
    first = _first_record(store, manifest)
    is_sound = manifest is not None and not manifest_faults(store, manifest)
    if manifest is not None and is_sound and _agrees(store, manifest, first):
        return manifest
    if first is None:
        raise PipelineError(f"{store.uri}: neither manifest nor records say what the run is; make it again")
    spec, found = _spec_of(store, manifest, first.spec_digest, access)
    num_images = _num_images(store, manifest, spec)
    known = {} if manifest is None else {part.range_index: part for part in manifest.parts}
    parts = []
    for range_index, num_shards in ranges_of(plan_shards(spec, num_images)):
        part = known.get(range_index)
        if part is None or part.num_shards != num_shards:
            part = PartRecord(key=f"_manifest/{range_index:05d}-{num_shards:05d}-{_NOT_A_PART}.parquet")
        parts.append(part)
    mended = GenerationManifest(
        spec=spec,
        spec_digest=spec.digest,
        model_uri=said.get("model_uri") or found.get("model_uri", ""),
        guide_uri=said.get("guide_uri") or found.get("guide_uri"),
        class_names=tuple(said.get("class_names") or found.get("class_names", ())),
        num_images=num_images,
        parts=tuple(parts),
    )
    if not any(_NOT_A_PART in part.key for part in parts):
        _replace(store, mended)
    done.mended.append(MANIFEST_KEY)
    return mended


def _agrees(store: ObjectStore, manifest: GenerationManifest, record: CommitRecord | None) -> bool:
    """Whether the records know the manifest's spec and number of images, as far as there are records."""
    if record is None:
        return True
    return (
        record.spec_digest == manifest.spec.digest
        and _num_images(store, manifest, manifest.spec) == manifest.num_images
    )


def _as_dict(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _first_record(store: ObjectStore, manifest: GenerationManifest | None) -> CommitRecord | None:
    """The first record that can be read and that others of the first few agree with."""
    seen: list[CommitRecord] = []
    for info in store.list("_parts/"):
        index = part_index(info.key)
        if index is None:
            continue
        try:
            seen.append(read_record(store, index))
        except (ConfigError, ObjectMissingError):
            continue
        digests = [record.spec_digest for record in seen]
        for record in seen:
            if digests.count(record.spec_digest) > 1:
                return record
    return seen[0] if seen else None


def _spec_of(
    store: ObjectStore, manifest: GenerationManifest | None, digest: str, access: ModelAccess
) -> tuple[SamplingSpec, dict[str, Any]]:
    """The spec that the records name by its digest: the manifest's, or that of config.toml, with what that says too."""
    if manifest is not None and manifest.spec.digest == digest:
        return manifest.spec, {}
    said = _as_dict(store.read(MANIFEST_KEY)).get("spec")
    if said is not None:  # the record around it is damaged, the spec perhaps not
        try:
            spec = config_io.from_json(SamplingSpec, json.dumps(said).encode(), f"{store.uri}/{MANIFEST_KEY}: spec")
        except ConfigError:
            pass
        else:
            if spec.digest == digest:
                return spec, {}
    config = stored_config(store)
    if config is None:
        raise PipelineError(
            f"{store.uri}: the spec in {MANIFEST_KEY} was edited, and there is no config.toml that could be read to "
            f"make it again; put back the spec of digest {digest}"
        )
    with tempfile.TemporaryDirectory() as nowhere:  # an output in which nothing has to be compared
        tracking = config.tracking
        if access.tracking_uri is not None:
            tracking = replace(tracking, uri=access.tracking_uri)
        job = resolve_job(replace(config, output=nowhere, tracking=tracking, trust_model_code=access.trust_model_code))
    if job.spec.digest != digest:
        raise PipelineError(
            f"{store.uri}: the spec in {MANIFEST_KEY} was edited, and config.toml makes another, {job.spec.digest}; "
            f"put back the spec of digest {digest}"
        )
    guide = None if job.guide is None else job.guide.uri
    return job.spec, {"model_uri": job.model.uri, "guide_uri": guide, "class_names": job.card.class_names}


def _num_images(store: ObjectStore, manifest: GenerationManifest | None, spec: SamplingSpec) -> int:
    """Images of the run: as the last record of the shards that its parts name says, or of all up to a gap."""
    num_shards = 0 if manifest is None else manifest.num_shards
    if not num_shards:
        for info in store.list("_parts/"):
            if part_index(info.key) == num_shards:
                num_shards += 1
    try:
        last = read_record(store, num_shards - 1)
    except (ConfigError, ObjectMissingError):
        agrees = manifest is not None and plan_shards(spec, manifest.num_images).num_shards == num_shards
        return manifest.num_images if manifest is not None and agrees else num_shards * spec.shard_size
    return last.first_id + last.num_samples


def _truth(
    store: ObjectStore, manifest: GenerationManifest, facts: RangeFacts, threads: ThreadPool, done: Repaired
) -> dict[int, ShardRecord]:
    """The tar that each shard must have: of the manifest; of its record where the part is gone, or says otherwise.

    Where the two disagree, the one whose tar is there and whole is right. Images that were removed are in neither.
    """
    truth: dict[int, ShardRecord] = {}
    for index in facts.indices:
        row, committed = facts.row(index), facts.committed(index)
        if row is not None and index not in facts.removals and committed is not None and row != committed:
            whole = {tar.key for tar in (row, committed) if _is_whole(store, tar)}
            row = committed if whole == {committed.key} else row
        tar = facts.removals[index].tar if index in facts.removals else row or committed
        if tar is None:
            done.unmended.append(f"shard {index}: neither part nor record says which bytes it has; delete its tars")
        else:
            truth[index] = tar
    return truth


def _is_whole(store: ObjectStore, tar: ShardRecord) -> bool:
    try:
        return hashlib.sha256(store.read(tar.key)).hexdigest() == tar.sha256
    except ObjectMissingError:
        return False


def _mend_records(
    store: ObjectStore,
    manifest: GenerationManifest,
    facts: RangeFacts,
    truth: dict[int, ShardRecord],
    done: Repaired,
) -> None:
    """Write the records that are missing, damaged, or say otherwise than the manifest."""
    spec = manifest.spec
    for index, tar in truth.items():
        original = facts.removals[index].original if index in facts.removals else tar
        planned = plan_shards(spec, manifest.num_images).shard(index)
        record = CommitRecord(
            index=index,
            first_id=planned.first_id,
            num_samples=original.num_samples,
            key=original.key,
            size_bytes=original.size_bytes,
            sha256=original.sha256,
            model_digest=spec.model_digest,
            spec_digest=spec.digest,
            made=_mended_by(),
        )
        standing = facts.records.get(index)
        if standing is not None and replace(standing, made=record.made) == record:
            continue
        _put(store, part_key(index), config_io.to_json(record))
        done.mended.append(part_key(index))


@functools.cache
def _mended_by() -> Provenance:
    return Provenance(
        host=socket.gethostname(),
        device="none: the record was written again from the manifest",
        software=f"python {platform.python_version()}",
        started_at_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=0.0,
    )


def _put(store: ObjectStore, key: str, data: bytes) -> None:
    """Create an object that is created once, or replace the damaged one that was read."""
    while not store.create(key, data):
        try:
            etag = store.read_versioned(key).etag
        except ObjectMissingError:
            continue
        if store.replace(key, data, etag) is not None:
            return


def _mend_part(
    store: ObjectStore,
    manifest: GenerationManifest,
    part: PartRecord,
    facts: RangeFacts,
    truth: dict[int, ShardRecord],
    done: Repaired,
) -> GenerationManifest:
    """Write the part of a range again if it is gone or says otherwise; the manifest that names it."""
    if len(truth) < len(facts.indices):
        return manifest
    rows = [truth[index] for index in facts.indices]
    if facts.rows is not None and list(facts.rows) == rows:
        return manifest
    if facts.part_fault is not None and _NOT_A_PART not in part.key:
        store.delete(part.key)  # altered bytes under this key would stay: parts are created once
    written = write_part(store, part.range_index, rows)
    done.mended.append(written.key)
    if written == part:
        return manifest
    parts = tuple(written if one.range_index == part.range_index else one for one in manifest.parts)
    mended = replace(manifest, parts=parts)
    if not any(_NOT_A_PART in one.key for one in parts):
        _replace(store, mended)
    return mended


def _replace(store: ObjectStore, manifest: GenerationManifest) -> None:
    if not replace_manifest(store, manifest, store.read_versioned(MANIFEST_KEY).etag):
        raise PipelineError(f"{store.uri}/{MANIFEST_KEY}: another has changed it meanwhile; run again")


def _make_again(
    store: ObjectStore,
    manifest: GenerationManifest,
    wrong: dict[int, ShardRecord],
    access: ModelAccess,
    use_gpu: bool | None,
    done: Repaired,
) -> None:
    """Make tars again in this process, without images that were removed; only the recorded bytes are written."""
    maker = make_maker(store, manifest, access, use_gpu)
    plan = plan_shards(manifest.spec, manifest.num_images)
    removed = {index: one.ids for index, one in read_removals(store).items() if index in wrong}
    with Progress("making again", len(wrong), "shards") as progress:
        for index, tar in wrong.items():
            samples = maker.encode(maker.draw(plan.shard(index)))
            left = [sample for sample in samples if int(sample.key) not in removed.get(index, frozenset())]
            data = pack_samples(manifest.spec, manifest.class_names, left)
            if hashlib.sha256(data).hexdigest() == tar.sha256:
                store.write(tar.key, data)
                done.mended.append(tar.key)
            else:
                done.unmended.append(
                    f"{tar.key}: this machine makes other bytes, so that nothing was changed; run it on hardware and "
                    f"with software as in {part_key(index)}"
                )
            progress.advance(1)


def make_maker(
    store: ObjectStore, manifest: GenerationManifest, access: ModelAccess, use_gpu: bool | None
) -> ShardMaker:
    """What makes the run's shards, in this process, with as many threads as the run had.

    Raises:
        PipelineError: As `find_ingredients` and ShardMaker.
    """
    config = stored_config(store)
    ingredients = find_ingredients(store, manifest, config, access)
    on_gpu = use_gpu if use_gpu is not None else config is not None and config.use_gpu
    say(f"making images of {store.uri} with {manifest.model_uri} on a {'GPU' if on_gpu else 'CPU'}, in this process")
    return ShardMaker(
        ingredients,
        manifest.spec,
        store,
        num_threads=1 if config is None else config.cpus_per_actor,
        device="cuda" if on_gpu else "cpu",
    )
