"""From raw images to a verified dataset: WebDataset shards and a manifest.

Each shard is one Ray task: it reads its images, brings them to one size, packs them and writes the tar under a key that
holds its digest. `manifest.json` is created last and once; until then nothing counts as a dataset. The same source and
config give the same bytes, so that an interrupted run is simply run again, and a run over a finished dataset checks it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ray.data

from pipeline.cluster import ClusterConfig, ray_session
from pipeline.config_io import to_json
from pipeline.data.image_input import MAX_PIXELS_LIMIT, ResizeMode
from pipeline.data.image_size import format_image_size, parse_image_size
from pipeline.data.manifest import MANIFEST_KEY, DatasetManifest, Split, load_manifest, write_manifest
from pipeline.data.prepare_shard import ShardResult, ShardTask, make_shard
from pipeline.data.shard_parts import PART_FOLDER, is_part
from pipeline.data.shard_table import ShardRecord
from pipeline.data.sources import DIGITS_IMAGE_SIZE, FolderReader, Source, open_digits, open_folder
from pipeline.errors import DatasetMissingError, OutputExistsError, ShardCorruptError, UndecodableImageError
from pipeline.progress import Progress, format_bytes, say
from pipeline.ray_errors import of_values
from pipeline.redact import redact
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.probe import check_conditions
from pipeline.stores.remover import Remover
from pipeline.stores.storage import check_uris, open_store
from pipeline.stores.waiting import told_of_outages

QUARANTINE_KEY = "quarantine.json"
_SHARD_KEY = re.compile(r"[a-z_]+/\d{9}-[0-9a-f]{16}\.tar")
OWN_SIZE = "own"
"""The image_size that means: as the source has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Which images become a dataset, and how."""

    source: str = "digits"
    """"digits" (scikit-learn's 1,797 scans), or the URI of a folder of images: one sub-folder per class, or none."""
    dataset: str
    """URI of the dataset to make: a local folder or s3://bucket/prefix."""
    name: str = ""
    """Name of the dataset, for people; empty: the last part of the source."""
    image_size: int | str = OWN_SIZE
    """Height x width in pixels, such as 24x40, or one number for a square. "own": the source's, which only digits have
    (8); a folder needs a value."""
    resize_mode: ResizeMode = "crop"
    """How an image gets that shape: "crop" keeps its largest centred part, "pad" the whole of it on white, "squash" the
    whole of it, distorted. Antialiased (Lanczos)."""
    channels: int | None = None
    """1 (grey) or 3 (RGB). None: 1 for digits, 3 for a folder."""
    shard_size: int = 1000
    """Samples per shard; 5,000 to 50,000 small images, or about 50 MiB, suit object storage."""
    held_out_fraction: float | None = None
    """Share of each class kept out of training, 0 to 1 (exclusive). None: 0.1. The digits' split is fixed (297)."""
    seed: int = 0
    """Decides which images of a folder are held out, and their order."""
    max_pixels: int = 50_000_000
    """Larger images (width x height) count as undecodable."""
    min_size: int = 1
    """Images whose shorter side has fewer pixels count as undecodable."""
    exclude: tuple[str, ...] = ()
    """Files of a folder to leave out: globs such as 'annotations' (any file or folder of that name) or 'cat/raw/*' (the
    path below the source; * takes / too). May be given several times."""
    allow_empty_classes: bool = False
    """Take a class folder without any image that is read for a class all the same, instead of an error."""
    anonymous_source: bool = False
    """Read the source without credentials, as a public bucket allows (aws s3 --no-sign-request)."""
    max_quarantined: int = 0
    """Undecodable images to leave out and list before giving up."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        check_uris(self, "source", "dataset")
        if self.source == "digits":
            if self.image_size != OWN_SIZE and parse_image_size(self.image_size) != DIGITS_IMAGE_SIZE:
                raise ValueError(
                    f"image_size: digits have {format_image_size(DIGITS_IMAGE_SIZE)} pixels each way, got "
                    f"{self.image_size}; leave it out"
                )
            if self.channels not in (None, 1):
                raise ValueError(f"channels: digits have 1, got {self.channels}; leave it out")
            if self.held_out_fraction is not None:
                raise ValueError(
                    f"held_out_fraction: the digits' split is fixed, got {self.held_out_fraction}; leave it out"
                )
        elif self.image_size == OWN_SIZE:
            raise ValueError("image_size: a folder of images needs one, got 'own'; give 24x40, say, or 64 for a square")
        else:
            parse_image_size(self.image_size)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels: must be 1 or 3, got {self.channels}; use 3 for colour")
        if self.shard_size < 1:
            raise ValueError(f"shard_size: must be at least 1, got {self.shard_size}; try 1000")
        if not 0 <= (self.held_out_fraction or 0) < 1:
            raise ValueError(f"held_out_fraction: must be in [0, 1), got {self.held_out_fraction}; try 0.1")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise ValueError(f"max_pixels: must be 1 to {MAX_PIXELS_LIMIT}, got {self.max_pixels}; use a smaller limit")
        if self.min_size < 1:
            raise ValueError(f"min_size: must be at least 1, got {self.min_size}; leave it out for none")
        if "" in self.exclude:
            raise ValueError(f"exclude: must not be empty, got {self.exclude}; write a glob such as 'annotations'")
        if self.anonymous_source and not self.source.startswith("s3://"):
            raise ValueError(f"anonymous_source: is for s3:// sources, got it with {self.source!r}; leave it out")
        if self.max_quarantined < 0:
            raise ValueError(f"max_quarantined: must be at least 0, got {self.max_quarantined}; use 0 for none")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the dataset's images, with the source's defaults."""
        size = DIGITS_IMAGE_SIZE if self.image_size == OWN_SIZE else parse_image_size(self.image_size)
        return (*size, self.channels or (1 if self.source == "digits" else 3))


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """The content of `quarantine.json`: the source images that were left out. For people; nothing reads it back."""

    format_version: int = 2
    """Version of this record."""
    reasons: dict[str, str]
    """Why each does not decode, by its name in the source."""


Execute = Callable[[Callable[[ShardTask], ShardResult], Sequence[ShardTask]], Iterable[ShardResult]]
"""Applies a function to every task and yields the results in order, like `map`."""


def describe_plan(config: PrepareConfig) -> list[tuple[str, str]]:
    """What `prepare` would do, as names and values; lists the source, reads no image, starts no cluster.

    Raises:
        UsageError: If the source has no images or cannot be split.
        StorageError: If it cannot be listed.
    """
    source = open_source(config)
    tasks = _plan(source, config.shard_size)
    num_images = sum(len(items) for items in source.splits.values())
    raw_bytes = num_images * math.prod(config.image_shape)
    return [
        ("source", f"{source.uri}: {num_images:,} images, {source.num_ignored:,} other files ignored"),
        ("classes", f"{len(source.class_names):,}" if source.class_names else "none"),
        ("splits", ", ".join(f"{name} {len(items):,}" for name, items in source.splits.items())),
        ("images", f"{' x '.join(map(str, config.image_shape))}, {format_bytes(raw_bytes)} before PNG compression"),
        ("shards", f"{len(tasks):,} of at most {config.shard_size:,} samples"),
        ("dataset", open_store(config.dataset).uri),
        *source.findings,
    ]


def prepare(config: PrepareConfig) -> DatasetManifest:
    """Make a dataset, or check that it is already there.

    Raises:
        UsageError: If the source is missing or unusable, or another dataset is there (OutputExistsError).
        UndecodableImageError: If more than `max_quarantined` images do not decode; no manifest is written then.
        StorageError: If the source cannot be read or the dataset cannot be written.
    """
    source = open_source(config)  # mistakes come to light before a cluster is started
    for name, value in source.findings:
        say(f"{name}: {value}")
    if _find_existing(config, source) is None:
        check_conditions(open_store(config.dataset))
    with ray_session(config.cluster):
        return prepare_source(config, source, run_on_ray)


def prepare_source(config: PrepareConfig, source: Source, execute: Execute) -> DatasetManifest:
    """`prepare` with the source opened, on any executor."""
    store = open_store(config.dataset)
    existing = _find_existing(config, source)
    tasks = _plan(source, config.shard_size)
    reader, publish = source.reader, existing is None

    def work(task: ShardTask) -> ShardResult:
        return make_shard(task, reader, store, publish)

    stores = [store, reader.store] if isinstance(reader, FolderReader) else [store]
    shards: dict[str, list[ShardRecord]] = {split: [] for split in source.splits}
    quarantined: dict[str, str] = {}
    with Progress("prepare", sum(len(task.keys) for task in tasks), "images") as progress:
        for result in told_of_outages(execute(work, tasks), stores, "shard"):
            if result.error:
                raise of_values(result.error, result.message, result.trace)
            quarantined.update(zip(result.quarantined, result.reasons, strict=True))
            if len(quarantined) > config.max_quarantined:
                _give_up(source, quarantined, f"max_quarantined = {config.max_quarantined} allows no more")
            if result.key:
                shards[result.split].append(result.record)
            progress.advance(result.num_images)
    for split in shards:
        if not shards[split]:
            _give_up(source, quarantined, f"the split {split!r} has none left")
    manifest = DatasetManifest(
        name=config.name or source.uri.rstrip("/").rpartition("/")[2],
        source=source.uri,
        image_size=config.image_shape[:2],
        channels=config.image_shape[2],
        class_names=source.class_names,
        splits={split: Split(shards=records) for split, records in shards.items()},
        num_quarantined=len(quarantined),
    )
    if existing is not None:
        return _compare(store, manifest, existing, quarantined)
    return _publish(store, manifest, quarantined)


def run_on_ray(work: Callable[[ShardTask], ShardResult], tasks: Sequence[ShardTask]) -> Iterator[ShardResult]:
    """Apply `work` to every task, one CPU each, as a Ray Data pipeline; results come in order."""

    def on_row(row: dict[str, Any]) -> dict[str, Any]:
        return dataclasses.asdict(work(ShardTask(**row)))

    rows = [dataclasses.asdict(task) for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = True  # which undecodable image is the first, say
    for row in dataset.map(on_row, num_cpus=1).iter_rows():
        yield ShardResult(**row)


def open_source(config: PrepareConfig) -> Source:
    """List and split the configured source.

    Raises:
        UsageError: If it has no images or cannot be split.
        StorageError: If it cannot be listed.
    """
    if config.source == "digits":
        return open_digits()
    return open_folder(
        config.source,
        image_size=config.image_shape[:2],
        channels=config.image_shape[2],
        max_pixels=config.max_pixels,
        held_out_fraction=config.held_out_fraction,
        seed=config.seed,
        min_size=config.min_size,
        resize_mode=config.resize_mode,
        exclude=config.exclude,
        allow_empty_classes=config.allow_empty_classes,
        is_anonymous=config.anonymous_source,
    )


def _plan(source: Source, shard_size: int) -> list[ShardTask]:
    """Consecutive items of a split make a shard."""
    tasks = []
    for split, items in source.splits.items():
        for index, first in enumerate(range(0, len(items), shard_size)):
            part = items[first : first + shard_size]
            labels = [-1 if item.label is None else item.label for item in part]
            keys = [item.key for item in part]
            tasks.append(ShardTask(split=split, index=index, first=first, keys=keys, labels=labels))
    return tasks


def _find_existing(config: PrepareConfig, source: Source) -> DatasetManifest | None:
    """The manifest that is there, None if there is none; refused at once if it obviously is another dataset."""
    store = open_store(config.dataset)
    try:
        existing = load_manifest(store)
    except DatasetMissingError:
        return None
    asked = (config.image_shape, source.class_names, sorted(source.splits))
    found = (existing.image_shape, existing.class_names, sorted(existing.splits))
    for what, a, b in zip(("image shapes", "class names", "splits"), asked, found, strict=True):
        if a != b:
            _refuse_other(store, f"its {what} are {_short(b)}, asked for {_short(a)}")
    return existing


def _compare(
    store: ObjectStore, manifest: DatasetManifest, existing: DatasetManifest, quarantined: dict[str, str]
) -> DatasetManifest:
    if manifest.digest != existing.digest:
        _refuse_other(
            store, f"its digest is {existing.digest[:16]}, this source and config give {manifest.digest[:16]}"
        )
    sizes = {info.key: info.size_bytes for split in existing.splits for info in store.list(f"{split}/")}
    for split in existing.splits.values():
        for shard in split.shards:
            if sizes.get(shard.key) != shard.size_bytes:
                raise ShardCorruptError(
                    f"{store.uri}/{shard.key}: is missing or has another size than the manifest says; delete "
                    f"{MANIFEST_KEY} and prepare again to restore it"
                )
    # whoever published this manifest may have been killed before the list of what it leaves out
    written = "nothing written"
    if quarantined and store.create(QUARANTINE_KEY, to_json(Quarantine(reasons=quarantined))):
        written = f"only {QUARANTINE_KEY} was missing, and is written"
    say(f"{store.uri} already holds this dataset (digest {existing.digest[:16]}): {written}")
    return existing


def _publish(store: ObjectStore, manifest: DatasetManifest, quarantined: dict[str, str]) -> DatasetManifest:
    record = write_manifest(store, manifest)
    if record is None:  # another run finished first
        return _compare(store, manifest, load_manifest(store), quarantined)
    if quarantined:  # not before the manifest: a run that comes second must not replace the list of the first
        store.write(QUARANTINE_KEY, to_json(Quarantine(reasons=quarantined)))
        say(f"{len(quarantined)} images left out, listed in {store.uri}/{QUARANTINE_KEY}")
    named = {shard.key for split in manifest.splits.values() for shard in split.shards}
    named |= {part.key for split in record.splits.values() for part in split.parts}
    # of interrupted runs over other data
    listed = [
        info.key for folder in [*(f"{split}/" for split in manifest.splits), PART_FOLDER] for info in store.list(folder)
    ]
    Remover(store, say).remove(
        key for key in listed if key not in named and (_SHARD_KEY.fullmatch(key) or is_part(key))
    )
    counts = ", ".join(f"{name} {split.num_samples:,}" for name, split in manifest.splits.items())
    num_shards = sum(len(split.shards) for split in manifest.splits.values())
    say(f"prepared {manifest.name}: {counts} samples in {num_shards:,} shards, digest {manifest.digest[:16]}")
    return manifest


def _give_up(source: Source, quarantined: dict[str, str], why: str) -> NoReturn:
    key, reason = next(iter(quarantined.items()))
    raise UndecodableImageError(
        f"{source.uri}/{key}: does not decode: {reason} ({len(quarantined)} so far, {why}); repair or remove "
        "such images, or raise max_quarantined; nothing was published"
    )


def _refuse_other(store: ObjectStore, why: str) -> NoReturn:
    raise OutputExistsError(f"dataset: {store.uri} holds another dataset ({why}); choose an empty place")


def _short(value: object) -> str:
    text = redact(str(value))
    return text if len(text) <= 60 else text[:57] + "..."
