"""The gallery of a run: a page that shows its images by class and by id, and where each of them comes from.

    index.html              the page; it works from a bucket and from disk, without a server of its own
    gallery/                all that it loads: no request leaves this folder
        gallery.css, icon.svg, data.js, view.js     the page's own files, the same of every run
        contents.js                         last: what the run is, and which blocks there are
        NNNNNN-<16 hex>/                    a block of images, see gallery_blocks.py

It covers the first images of a run and says so if there are more. It is made from the shards alone: making it again
writes equal bytes, and only the blocks whose shards are new; of blocks that are no longer named, such as those that
held an image that was removed since, the files are deleted.
"""

import contextlib
import importlib.resources
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from pipeline.config_io import identity
from pipeline.data.shard_table import ShardRecord
from pipeline.errors import ObjectMissingError
from pipeline.generation.output.manifest import (
    GenerationManifest,
    read_shards,
    require_manifest,
    write_if_changed,
)
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.generation.viewing.gallery_blocks import (
    FOLDER,
    SHEET_COLUMNS,
    SHEET_IMAGES,
    Block,
    BlockReader,
    encode_block,
    encode_sheet,
    parse_script,
    plan_blocks,
    script,
    sheets,
    thumbnail_size,
)
from pipeline.progress import Progress, say
from pipeline.redact import redact
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.remover import Remover

PAGE_KEY = "index.html"
CONTENTS_KEY = f"{FOLDER}contents.js"
_CONTENTS_FORMAT = 1
_PAGE_FILES = {PAGE_KEY: "index.html"} | {
    f"{FOLDER}{name}": name for name in ("gallery.css", "icon.svg", "data.js", "view.js")
}
_THREADS = 8  # sheets of a block are compressed and sent at once: a bucket takes its time for each


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a run's images come from, beside what its spec says."""

    model_uri: str
    """The model, by version or checkpoint."""
    guide_uri: str | None = None
    """The weaker model of autoguidance."""
    run_id: str | None = None
    """The MLflow run that trained the model, where that is known."""
    dataset_digest: str = ""
    """Digest of the dataset that it was trained on; empty: not known."""


def make_gallery(store: ObjectStore, lineage: Lineage, max_images: int, *, must_delete: bool = False) -> None:
    """Make the gallery of the manifest that stands, or what is new of it.

    Who works without a lease, or has lost it, may find that images were removed while the blocks were made: no contents
    name these blocks then, and it begins again with what is left.

    Args:
        store: The output prefix, of a finished run.
        lineage: As `write_gallery`.
        max_images: As `write_gallery`.
        must_delete: As `write_gallery`.

    Raises:
        ShardCorruptError, StorageError: As `write_gallery`.
    """
    num_made = None
    while num_made is None:
        manifest = require_manifest(store)
        num_made = write_gallery(
            store,
            manifest.spec,
            manifest.class_names,
            read_shards(store, manifest.parts),
            lineage,
            num_images=manifest.num_images,
            max_images=max_images,
            still_stands=partial(_is_manifest, store, manifest),
            must_delete=must_delete,
        )


def _is_manifest(store: ObjectStore, manifest: GenerationManifest) -> bool:
    return require_manifest(store) == manifest


def write_gallery(
    store: ObjectStore,
    spec: SamplingSpec,
    class_names: Sequence[str],
    shards: Iterable[ShardRecord],
    lineage: Lineage,
    *,
    num_images: int,
    max_images: int,
    still_stands: Callable[[], bool] = lambda: True,
    must_delete: bool = False,
) -> int | None:
    """Make the gallery of some shards, or what is new of it.

    Args:
        store: The output prefix.
        spec: The run's spec.
        class_names: Names of the classes, by label; empty: their numbers.
        shards: The run's shards in the order of their ids; no more of them are asked for than are needed. Images that
            were removed are not in them.
        lineage: Where the images come from.
        num_images: Images of the whole run.
        max_images: Images that the gallery covers at most; 0: there is none, and one that is there is removed.
        still_stands: Asked when all blocks are there: whether these are still the run's shards.
        must_delete: Whether it is an error if files that are no longer named cannot be deleted; else it is a line.

    Returns:
        How many blocks were made; None: the shards are others by now, and nothing but blocks was written.

    Raises:
        ShardCorruptError: If a shard is not as its record says.
        StorageError: If the store gives no complete answer, or forbids a deletion that must be.
    """
    there = {item.key for item in store.list(FOLDER)}
    delete = store.delete_all if must_delete else Remover(store, say).remove
    if max_images == 0:
        if there:
            delete([PAGE_KEY, *sorted(there)])
        return 0
    known = _known_blocks(store)
    entries: list[dict[str, Any]] = []
    needed, num_made = {CONTENTS_KEY, *_PAGE_FILES}, 0
    total = min(num_images, max_images)
    with Progress("gallery", total, "img") as progress, ThreadPool(_THREADS) as threads:
        reader = BlockReader(store, spec.image_size, spec.channels, threads)
        for block in plan_blocks(shards, spec.shard_size, max_images):
            keys = _keys(block)
            needed |= keys
            entry = known.get(block.name) if keys <= there else None
            if entry is None:
                entry = _write_block(store, spec, block, reader, threads)
                num_made += 1
            entries.append(entry)
            progress.advance(block.num_images)
    if not still_stands():
        return None
    for key, name in _PAGE_FILES.items():
        write_if_changed(store, key, _page_file(name))
    contents = _contents(spec, class_names, lineage, store.uri, num_images, entries)
    write_if_changed(store, CONTENTS_KEY, script("contents.js", contents))
    if stale := sorted(there - needed):
        delete(stale)
    return num_made


def gallery_stands(store: ObjectStore, manifest: GenerationManifest, lineage: Lineage, max_images: int) -> bool:
    """Whether the gallery is there as `make_gallery` would leave it; reads no shard, writes nothing.

    Raises:
        ShardCorruptError, StorageError: If a part of the manifest, or what is there, cannot be read.
    """
    there = {item.key for item in store.list(FOLDER)}
    if max_images == 0:
        return not there
    known, needed = _known_blocks(store), {CONTENTS_KEY, *_PAGE_FILES} - {PAGE_KEY}
    entries = []
    for block in plan_blocks(read_shards(store, manifest.parts), manifest.spec.shard_size, max_images):
        needed |= _keys(block)
        if block.name not in known:
            return False
        entries.append(known[block.name])
    if there != needed:
        return False
    contents = _contents(manifest.spec, manifest.class_names, lineage, store.uri, manifest.num_images, entries)
    files = {key: _page_file(name) for key, name in _PAGE_FILES.items()}
    try:
        return all(
            store.read(key) == data for key, data in (files | {CONTENTS_KEY: script("contents.js", contents)}).items()
        )
    except ObjectMissingError:
        return False


def _keys(block: Block) -> set[str]:
    return {block.data_key, *block.sheet_keys}


def _contents(
    spec: SamplingSpec,
    class_names: Sequence[str],
    lineage: Lineage,
    uri: str,
    num_images: int,
    entries: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What the page reads first: the run, and its blocks."""
    return {
        "format": _CONTENTS_FORMAT,
        "lineage": _describe(spec, lineage, uri),
        "command": f"python jobs/output.py remake {shlex.quote(redact(uri))} --ids ",
        "classes": _class_names(spec, class_names),
        "num_images": num_images,
        "image_size": list(spec.image_size),
        "thumbnail_size": list(thumbnail_size(spec.image_size)),
        "sheet_columns": SHEET_COLUMNS,
        "sheet_images": SHEET_IMAGES,
        "blocks": entries,
    }


def _known_blocks(store: ObjectStore) -> dict[str, dict[str, Any]]:
    """What the contents that are there say of each block, by its name; nothing if there are none of this form."""
    with contextlib.suppress(ObjectMissingError, ValueError, KeyError, TypeError):
        contents = parse_script(store.read(CONTENTS_KEY))
        if contents["format"] == _CONTENTS_FORMAT:
            return {entry["name"]: entry for entry in contents["blocks"]}
    return {}


def _write_block(
    store: ObjectStore, spec: SamplingSpec, block: Block, reader: BlockReader, threads: ThreadPool
) -> dict[str, Any]:
    """Make a block's files, its data last; what the contents say of it."""
    images = reader.read(block)
    lossless = thumbnail_size(spec.image_size) == spec.image_size

    def write(key_and_thumbnails: tuple[str, Any]) -> None:
        key, thumbnails = key_and_thumbnails
        store.write(key, encode_sheet(thumbnails, lossless=lossless))

    threads.map(write, zip(block.sheet_keys, sheets(images), strict=True))
    store.write(block.data_key, encode_block(block, images))
    counts = None
    if images.labels is not None:
        counts = np.bincount(images.labels, minlength=spec.num_classes or 0).tolist()
    return {
        "name": block.name,
        "first": images.ids[0],
        "last": images.ids[-1],
        "count": len(images.ids),
        "counts": counts,
    }


def _page_file(name: str) -> bytes:
    return (importlib.resources.files("pipeline.generation.viewing") / "gallery_page" / name).read_bytes()


def _class_names(spec: SamplingSpec, names: Sequence[str]) -> list[str]:
    return [names[k] if k < len(names) else str(k) for k in range(spec.num_classes or 0)]


def _describe(spec: SamplingSpec, lineage: Lineage, uri: str) -> list[list[str]]:
    """What is true of all images of the run, as names and values in the order that the page shows them in."""
    sampler = spec.sampler
    told = ("name", "num_steps", "guidance_scale")
    options = {name: value for name, value in identity(sampler).items() if name not in told}
    rows = [
        ("Model", redact(lineage.model_uri)),
        ("Model digest", spec.model_digest),
        ("MLflow run", lineage.run_id),
        ("Dataset digest", lineage.dataset_digest),
        ("Guide model", None if lineage.guide_uri is None else redact(lineage.guide_uri)),
        ("Guide digest", spec.guide_digest),
        ("Calibration digest", spec.calibration_digest),
        ("Edit", None if spec.request is None else _join(identity(spec.request))),
        ("Sampler", f"{sampler.name}, {sampler.num_steps} steps, revision {spec.sampler_revision}"),
        ("Guidance scale", f"{sampler.guidance_scale:g}"),
        ("Sampler options", _join(options)),
        ("Seed", str(spec.seed)),
        ("Spec digest", spec.digest),
        ("Output", redact(uri)),
    ]
    return [[name, value] for name, value in rows if value]


def _join(options: dict[str, Any]) -> str:
    """Options as people read them; what is left out is not told."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
