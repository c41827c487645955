"""Images of a finished run, taken down for good: their shard is packed again without them, and never made otherwise.

In this order, of which each step is found done by whoever runs it again after a kill: the new tar, the removal record,
the part and the manifest that name it, contact sheet and gallery, and last the old part and the old tar. Nothing is
computed anew.
"""

import contextlib
import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pipeline import config_io
from pipeline.data.shard_parts import SHARDS_PER_PART
from pipeline.data.shards import read_shard
from pipeline.errors import ConfigError, ObjectMissingError, PipelineError
from pipeline.generation.making.packing import pack_samples
from pipeline.generation.output.commits import tar_key
from pipeline.generation.output.manifest import (
    MANIFEST_KEY,
    GenerationManifest,
    list_parts,
    read_part,
    replace_manifest,
    write_part,
)
from pipeline.generation.output.removals import (
    RemovalRecord,
    Removals,
    read_removals,
    removal_key,
    without_removed,
)
from pipeline.generation.upkeep.ids import by_shard
from pipeline.generation.upkeep.remake import find_tar
from pipeline.generation.upkeep.stored_run import load_run, stored_config
from pipeline.generation.viewing.contact_sheet import CONTACT_SHEET_KEY, write_contact_sheet
from pipeline.generation.viewing.gallery import CONTENTS_KEY, Lineage, make_gallery
from pipeline.generation.viewing.gallery_blocks import parse_script
from pipeline.stores.object_store import ObjectStore

_COLUMNS, _GALLERY_IMAGES = 10, 1_000_000  # the defaults, for a run without config.toml


@dataclass(frozen=True, kw_only=True, slots=True)
class Removed:
    """What a removal came to."""

    num_removed: int
    """Images that were removed now."""
    num_gone: int
    """Images that were asked for and had been removed before."""


def remove(store: ObjectStore, ids: tuple[int, ...], reason: str) -> Removed:
    """Take images down for good; safe to repeat.

    Args:
        store: The run's prefix.
        ids: Sample ids, ascending.
        reason: Why; stored.

    Raises:
        ConfigError: If the run has no such image, or no reason is given; before anything is changed.
        ShardCorruptError, ObjectMissingError: If a shard or a part is not as it was made: repair it first.
        PipelineError: If somebody else removes images of the same shard; run it again.
        StorageError: If the store fails, or forbids to delete.
    """
    if not reason.strip():
        raise ConfigError(f"reason: must say why, got {reason!r}; it is kept beside the run")
    manifest = load_run(store)
    shards, removals = by_shard(manifest, ids), read_removals(store)
    num_removed = 0
    for index, wanted in shards.items():
        num_removed += _remove_from(store, manifest, index, wanted, removals, reason)
    _settle(store)
    return Removed(num_removed=num_removed, num_gone=len(ids) - num_removed)


def _remove_from(
    store: ObjectStore,
    manifest: GenerationManifest,
    index: int,
    wanted: tuple[int, ...],
    removals: dict[int, Removals],
    reason: str,
) -> int:
    """Pack a shard without some images and record it; how many of them it still had."""
    before = removals.get(index)
    gone = frozenset() if before is None else before.ids
    ids = tuple(one for one in wanted if one not in gone)
    if not ids:
        return 0
    old = find_tar(store, manifest, index, removals)
    data = pack_samples(manifest.spec, manifest.class_names, read_shard(store, old), ids)
    sha256 = hashlib.sha256(data).hexdigest()
    record = RemovalRecord(
        index=index,
        sequence=0 if before is None else len(before.records),
        ids=ids,
        reason=reason,
        old_key=old.key,
        old_sha256=old.sha256,
        old_size_bytes=old.size_bytes,
        key=tar_key(index, sha256, manifest.spec.suffix),
        sha256=sha256,
        size_bytes=len(data),
        num_samples=old.num_samples - len(ids),
        removed_at_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.write(record.key, data)
    key = removal_key(index, record.sequence)
    if not store.create(key, config_io.to_json(record)):
        raise PipelineError(f"{store.uri}/{key}: somebody else removes images of shard {index} too; run it again")
    return len(ids)


def _settle(store: ObjectStore) -> None:
    """Bring everything else up to the removal records, the deletions last."""
    removals = read_removals(store)
    old_parts = _replace_parts(store, removals)
    _show_without(store)
    for key in old_parts:
        store.delete(key)
    for removed in removals.values():
        for key in removed.superseded_keys - {removed.tar.key}:
            if store.stat(key) is not None:
                store.delete(key)


def _replace_parts(store: ObjectStore, removals: dict[int, Removals]) -> list[str]:
    """Parts, and a manifest, that name the tars that stand; the keys of the parts that do not."""
    touched = {index // SHARDS_PER_PART for index in removals}
    while True:
        etag = store.read_versioned(MANIFEST_KEY).etag
        manifest = load_run(store)
        renamed = {}
        for part in dict.fromkeys([*manifest.parts, *list_parts(store)]):  # of a longer run under way too
            if part.range_index not in touched:
                continue
            rows = read_part(store, part)
            standing = without_removed(rows, part.range_index * SHARDS_PER_PART, removals)
            if standing != rows:
                renamed[part.key] = write_part(store, part.range_index, standing)
        parts = tuple(renamed.get(part.key, part) for part in manifest.parts)
        if parts == manifest.parts or replace_manifest(store, replace(manifest, parts=parts), etag):
            return list(renamed)


def _show_without(store: ObjectStore) -> None:
    """Contact sheet and gallery again, where there are any, with the images that are left.

    Of a gallery that was never finished all files go: whoever samples again makes it.
    """
    manifest, config = load_run(store), stored_config(store)
    if store.stat(CONTACT_SHEET_KEY) is not None:
        write_contact_sheet(store, None, _COLUMNS if config is None else config.contact_sheet_columns)
    max_images = _GALLERY_IMAGES if config is None else config.gallery_images
    lineage: dict[str, str] = {}
    try:
        contents = store.read(CONTENTS_KEY)
    except ObjectMissingError:
        max_images = 0
    else:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            lineage = dict(parse_script(contents)["lineage"])
    make_gallery(
        store,
        Lineage(
            model_uri=manifest.model_uri,
            guide_uri=manifest.guide_uri,
            run_id=lineage.get("MLflow run"),
            dataset_digest=lineage.get("Dataset digest", ""),
        ),
        max_images,
        must_delete=True,
    )
