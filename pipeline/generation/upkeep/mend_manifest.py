"""The manifest of a damaged run, from what else tells of it: the spec, the parts, and how many images there are.

What was edited is outvoted. The spec must have the digest that the records, the prefix and the manifest name; parts are
believed where the digest in their key is right; the number of images follows from parts, commit record and manifest.
Where those contradict each other without a majority, nothing is changed. A run is never made shorter because a record
is gone.
"""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pipeline import config_io
from pipeline.data.shard_parts import SHARDS_PER_PART, PartRecord
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ConfigError, ObjectMissingError, PipelineError, ShardCorruptError
from pipeline.generation.output.commits import CommitRecord, part_index, part_key, read_record, tar_index
from pipeline.generation.output.manifest import (
    MANIFEST_KEY,
    GenerationManifest,
    list_parts,
    load_generation_manifest,
    read_part,
    unknown_part,
)
from pipeline.generation.output.removals import fault_of_removals, look_at_removals, num_planned, sound_removals
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.spec.sampling_plan import MAX_IMAGES, SamplingSpec, plan_shards
from pipeline.generation.upkeep.range_facts import measure
from pipeline.generation.upkeep.stored_run import ModelAccess, stored_config
from pipeline.generation.upkeep.verify import PREFIX_NAME, ranges_of
from pipeline.stores.object_store import ObjectStore

_NUM_ASKED = 5  # records that are asked for the digest of their spec
_AGAIN = "or delete manifest.json and run jobs/sample.py again, which makes only what is missing"


def mend_manifest(store: ObjectStore, access: ModelAccess) -> GenerationManifest:
    """The manifest as it must be, with a part of `unknown_part` where none is known; nothing is written.

    Args:
        store: The run's prefix.
        access: How models are reached that are not staged beside the run.

    Raises:
        FormatVersionError: If manifest or records are of another version.
        PipelineError: If nothing says what the run is, or what says it contradicts itself.
        StorageError: If the store fails.
    """
    manifest: GenerationManifest | None = None
    said = _as_dict(store.read(MANIFEST_KEY))
    with contextlib.suppress(ConfigError):  # what can be read of it tells all the same
        manifest = load_generation_manifest(store)
    spec, found = _find_spec(store, manifest, said, access)
    parts, num_images = _find_parts(store, spec, said)
    if manifest is not None:
        return replace(manifest, spec=spec, spec_digest=spec.digest, num_images=num_images, parts=tuple(parts))
    names = said.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        found = found or _spec_of_config(store, spec.digest, access)[1]
        names = found["class_names"]
    uris = {
        name: uri if isinstance(uri := said.get(name), str) and uri else found.get(name)
        for name in ("model_uri", "guide_uri")
    }
    return GenerationManifest(
        spec=spec,
        spec_digest=spec.digest,
        model_uri=uris["model_uri"] or "",
        guide_uri=uris["guide_uri"],
        class_names=tuple(names),
        num_images=num_images,
        parts=tuple(parts),
    )


def _as_dict(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _find_spec(
    store: ObjectStore, manifest: GenerationManifest | None, said: dict[str, Any], access: ModelAccess
) -> tuple[SamplingSpec, dict[str, Any]]:
    """The spec of the digest that most name: the manifest's, or that of config.toml, with what that says too."""
    spec = None if manifest is None else manifest.spec
    if spec is None and said.get("spec") is not None:  # the record around it is damaged, the spec perhaps not
        try:
            text = json.dumps(said["spec"]).encode()
            spec = config_io.from_json(SamplingSpec, text, f"{store.uri}/{MANIFEST_KEY}: spec")
        except ConfigError:
            pass
    records = _some_records(store)
    if spec is None and not records and not isinstance(said.get("spec_digest"), str):
        raise PipelineError(f"{store.uri}: neither manifest nor records say what the run is; make it again")
    votes = Counter(record.spec_digest for record in records)
    if isinstance(said.get("spec_digest"), str):
        votes[said["spec_digest"]] += 1
    if spec is not None:
        votes[spec.digest] += 1
    place = store.uri.rpartition("/")[2]
    fits = [one for one in votes if one[:16] == place] if PREFIX_NAME.fullmatch(place) else []
    digest = max(fits or votes, key=lambda one: votes[one])
    if spec is not None and spec.digest == digest:
        return spec, {}
    return _spec_of_config(store, digest, access)


def _some_records(store: ObjectStore) -> list[CommitRecord]:
    """A few records that can be read."""
    records: list[CommitRecord] = []
    for index in islice((part_index(info.key) for info in store.list("_parts/")), 4 * _NUM_ASKED):
        if index is not None and len(records) < _NUM_ASKED and (record := _record(store, index)) is not None:
            records.append(record)
    return records


def _record(store: ObjectStore, index: int) -> CommitRecord | None:
    try:
        return read_record(store, index)
    except (ConfigError, ObjectMissingError):
        return None


def _spec_of_config(store: ObjectStore, digest: str, access: ModelAccess) -> tuple[SamplingSpec, dict[str, Any]]:
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


def _find_parts(store: ObjectStore, spec: SamplingSpec, said: dict[str, Any]) -> tuple[list[PartRecord], int]:
    """The parts of the run, as far as they are known, and its number of images."""
    ends = _Ends(store, spec, said)
    num_shards = ends.num_shards()
    ends.check_not_shorter(num_shards)
    num_images = (num_shards - 1) * spec.shard_size + ends.num_in_last(num_shards)
    ranges = ranges_of(plan_shards(spec, num_images))
    return [ends.part_of(range_index, number) for range_index, number in ranges], num_images


@dataclass(frozen=True, slots=True)
class _Readable:
    part: PartRecord
    rows: Sequence[ShardRecord]


class _Ends:
    """How far a run goes, by all that tells of it."""

    def __init__(self, store: ObjectStore, spec: SamplingSpec, said: dict[str, Any]) -> None:
        self._store, self._size = store, spec.shard_size
        self._said_parts = _said_parts(said)
        images = said.get("num_images")
        self._said_images = images if type(images) is int and 1 <= images <= MAX_IMAGES else None
        self._num_named = sum(part.num_shards for part in self._said_parts) or None
        self._listed = list_parts(store)
        self._read: dict[str, _Readable | None] = {}
        found = look_at_removals(store)
        self._unclear = {index for index, of_shard in found.items() if fault_of_removals(of_shard) is not None}
        self._removals = {
            index: sound_removals(of_shard) for index, of_shard in found.items() if index not in self._unclear
        }

    def num_shards(self) -> int:
        """Output shards of the run.

        Raises:
            PipelineError: If nothing, or more than one thing, says it.
        """
        named = self._num_named
        by_images = None if self._said_images is None else -(-self._said_images // self._size)
        if named is not None and (named == by_images or self._last_part(named) is not None):
            return named
        recorded = self._num_recorded()
        if named is None and by_images is None:  # no manifest at all: the longest run that has its parts
            number = self._num_listed() or recorded
        elif recorded is not None and recorded in (named, by_images):
            number = recorded
        else:
            number = by_images if by_images is not None and self._last_part(by_images) is not None else None
        if number is not None:
            return number
        raise PipelineError(
            f"{self._store.uri}: how many shards the run has is not clear: {MANIFEST_KEY} names {named} in its parts "
            f"and {by_images} by num_images, and the commit records are {recorded or 'not complete'}; nothing was "
            f"changed; put {MANIFEST_KEY} back, {_AGAIN}"
        )

    def check_not_shorter(self, num_shards: int) -> None:
        """Refuse to leave out what is committed, where it is not the manifest's parts that end before it.

        Raises:
            PipelineError: If the next shard has a record.
        """
        if num_shards != self._num_named and self._store.stat(part_key(num_shards)) is not None:
            raise PipelineError(
                f"{self._store.uri}: how many images the run has is not clear: there is a part of {num_shards} shards, "
                f"and the parts in {MANIFEST_KEY} do not say so, and there are records of more; nothing was changed; "
                f"put {MANIFEST_KEY} back, {_AGAIN}"
            )

    def num_in_last(self, num_shards: int) -> int:
        """Images that the last shard was made with.

        Raises:
            PipelineError: If that is not clear.
        """
        index = num_shards - 1
        votes: list[int] = []
        last, record = self._last_part(num_shards), _record(self._store, index)
        if last is not None:
            row, is_removed = last.rows[-1], index in self._removals
            if index not in self._unclear and (is_removed or record is None or record.key == row.key):
                votes.append(num_planned([row], index, self._removals))
                votes += [] if is_removed or record is None else votes  # by its digest, and no removal is lost
        if record is not None:
            votes.append(record.num_samples)
            if last is None and (found := measure(self._store, record.key)) is not None:
                votes.append(found[0].num_samples)
        if self._said_images is not None:
            votes.append(self._said_images - index * self._size)
        counted = Counter(vote for vote in votes if 1 <= vote <= self._size).most_common()
        if counted and (len(counted) == 1 or counted[0][1] > counted[1][1]):
            return counted[0][0]
        raise PipelineError(
            f"{self._store.uri}: how many images the run has is not clear: {MANIFEST_KEY}, its last part and the "
            f"commit record of shard {index} give that shard {' or '.join(map(str, sorted(set(votes)))) or 'none'}; "
            f"nothing was changed; put one of them back, {_AGAIN}"
        )

    def part_of(self, range_index: int, number: int) -> PartRecord:
        """The part of a range: the one that the manifest names if it is there, else one that is, else none that is."""
        fits = [one for one in self._said_parts if (one.range_index, one.num_shards) == (range_index, number)]
        there = [one for one in self._listed if (one.range_index, one.num_shards) == (range_index, number)]
        if fits and (fits[0] in there or not there):
            return fits[0]
        readable = [found for part in there if (found := self._readable(part)) is not None]
        first = range_index * SHARDS_PER_PART
        for found in readable:
            if all(self._stands(index, row) for index, row in enumerate(found.rows, start=first)):
                return found.part
        return readable[0].part if readable else unknown_part(range_index, number)

    def _stands(self, index: int, row: ShardRecord) -> bool:
        return index not in self._removals or row == self._removals[index].tar

    def _num_listed(self) -> int | None:
        """Shards of the parts that are there, up to the first range without one."""
        most: dict[int, int] = {}
        for part in self._listed:
            most[part.range_index] = max(part.num_shards, most.get(part.range_index, 0))
        number = 0
        for range_index in range(len(most)):
            number += most.get(range_index, 0)
            if most.get(range_index) != SHARDS_PER_PART:
                break
        return number or None

    def _num_recorded(self) -> int | None:
        """Commit records, if none is missing before the last of them, and no tar is beyond."""
        number = 0
        for info in self._store.list("_parts/"):
            if (index := part_index(info.key)) is not None:
                if index != number:
                    return None
                number += 1
        beyond = any((tar_index(info.key) or 0) >= number for info in self._store.list())
        return None if beyond else number or None

    def _last_part(self, num_shards: int) -> _Readable | None:
        """A part that ends with the last of so many shards, if one can be read."""
        range_index, last = divmod(num_shards - 1, SHARDS_PER_PART)
        part = self.part_of(range_index, last + 1)
        return self._readable(part)

    def _readable(self, part: PartRecord) -> _Readable | None:
        if part.key not in self._read:
            try:
                self._read[part.key] = _Readable(part, read_part(self._store, part))
            except (ObjectMissingError, ShardCorruptError):
                self._read[part.key] = None
        return self._read[part.key]


def _said_parts(said: dict[str, Any]) -> list[PartRecord]:
    """The parts that a manifest names, perhaps a damaged one: as far as they are one range after the other."""
    parts: list[PartRecord] = []
    entries = said.get("parts")
    for entry in entries if isinstance(entries, list) else ():
        try:
            part = PartRecord(key=entry["key"])
        except (KeyError, TypeError, ValueError):
            break
        if part.range_index != len(parts) or (parts and parts[-1].num_shards != SHARDS_PER_PART):
            break
        parts.append(part)
    return parts
