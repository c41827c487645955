"""How far a run is: what is done, what is missing, how fast it goes, and who works there. Reads listings.

A range of 10,000 shards that has a part is not looked into, unless the part is younger than an hour: its records are
older than it. Of other ranges the records are listed, some at once, and counted as they come. Three small objects are
read beside that, manifest, plan and lease, and the first record where neither manifest nor plan is there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from pipeline.config_io import read_record
from pipeline.data.shard_parts import SHARDS_PER_PART
from pipeline.errors import ConfigError, ObjectMissingError, UsageError
from pipeline.generation.output import commits
from pipeline.generation.output.commits import part_index
from pipeline.generation.output.manifest import GenerationManifest, list_parts_with_times, load_generation_manifest
from pipeline.generation.output.plan_record import PlanRecord, read_plan
from pipeline.progress import format_duration
from pipeline.stores.lease import LEASE_KEY, LeaseRecord
from pipeline.stores.object_store import ObjectStore

_HOUR_S = 3600.0
_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands."""

    num_published: int
    """Images that the manifest names; 0: there is none."""
    num_images: int | None
    """Images that are wanted; None: nothing says how many."""
    shard_size: int
    """Images per shard."""
    num_shards_done: int
    """Shards that are committed, of those that are wanted."""
    num_last_hour: int
    """Of those, shards that were committed in the last hour."""
    holder: str | None
    """Who holds the lease; None: nobody, or nobody that can be read."""

    @property
    def is_published(self) -> bool:
        """Whether there is a manifest of as many images as are wanted."""
        return self.num_images is not None and self.num_published >= self.num_images

    @property
    def num_shards(self) -> int | None:
        """Shards that are wanted."""
        return None if self.num_images is None else -(-self.num_images // self.shard_size)

    def rows(self) -> list[tuple[str, str]]:
        """As names and values."""
        total, done = self.num_shards, self.num_shards_done
        if total is None:
            shards = f"{done:,} done; of how many, --num-images says"
        else:
            shards = f"{done:,} of {total:,} done, {total - done:,} missing"
        rate = self.num_last_hour * self.shard_size
        if self.is_published:
            manifest = "published"
        elif self.num_published:
            manifest = f"published with {self.num_published:,} images, the others not yet"
        else:
            manifest = "not published yet"
        rows = [
            ("images", "unknown" if self.num_images is None else f"{self.num_images:,}"),
            ("output shards", f"{shards}, of up to {self.shard_size:,} images"),
            ("manifest", manifest),
            ("last hour", f"{self.num_last_hour:,} shards, about {rate:,} images"),
            ("lease", self.holder or "nobody holds one"),
        ]
        if total is not None and self.num_last_hour and done < total:
            left_s = (total - done) / self.num_last_hour * _HOUR_S
            rows.insert(4, ("time left", f"about {format_duration(left_s)} at that rate"))
        return rows


def read_status(store: ObjectStore, *, num_images: int | None = None, now_s: float | None = None) -> Status:
    """Look how far a run is; nothing is written.

    Args:
        store: The run's prefix.
        num_images: Images that are wanted; None: as plan.json says, or the manifest, whichever says more.
        now_s: The time, seconds since 1970; None: now.

    Raises:
        ConfigError: If nothing of a run is there, or num_images is not positive.
        FormatVersionError: If manifest or record is of another version.
        StorageError: If the store fails.
    """
    if num_images is not None and num_images < 1:
        raise ConfigError(f"num_images: must be at least 1, got {num_images}; leave it out")
    now_s = time.time() if now_s is None else now_s
    manifest, plan = load_generation_manifest(store), _plan(store)
    shard_size = _shard_size(store, manifest, plan)
    wanted = num_images or max((one.num_images for one in (manifest, plan) if one is not None), default=None)
    done, num_last_hour = _count(store, None if wanted is None else -(-wanted // shard_size), now_s)
    return Status(
        num_published=0 if manifest is None else manifest.num_images,
        num_images=wanted,
        shard_size=shard_size,
        num_shards_done=done,
        num_last_hour=num_last_hour,
        holder=_holder(store),
    )


def _plan(store: ObjectStore) -> PlanRecord | None:
    """None, too, for one that cannot be read: the manifest may say enough."""
    try:
        return read_plan(store)
    except UsageError:
        return None


def _shard_size(store: ObjectStore, manifest: GenerationManifest | None, plan: PlanRecord | None) -> int:
    if manifest is not None:
        return manifest.spec.shard_size
    if plan is not None:
        return plan.shard_size
    for info in store.list("_parts/"):
        if (index := part_index(info.key)) is not None:
            return commits.read_record(store, index).num_samples
    raise ConfigError(f"prefix: must hold a run, got {store.uri} without one; name the folder of 16 digits")


def _count(store: ObjectStore, num_shards: int | None, now_s: float) -> tuple[int, int]:
    """Shards that are committed, and those of the last hour; of the first `num_shards`, or of all."""
    in_parts: dict[int, int] = {}
    young = set()
    for part, written_s in list_parts_with_times(store):
        in_parts[part.range_index] = max(part.num_shards, in_parts.get(part.range_index, 0))
        if now_s - written_s <= _HOUR_S:
            young.add(part.range_index)

    def wanted_of(range_index: int) -> int:
        return SHARDS_PER_PART if num_shards is None else num_shards - range_index * SHARDS_PER_PART

    def count(prefix: str) -> tuple[int, int]:
        num_new = num_last_hour = 0
        for info in store.list(f"_parts/{prefix}"):
            if (index := part_index(info.key)) is None:
                continue
            range_index, place = divmod(index, SHARDS_PER_PART)
            if place < wanted_of(range_index):
                num_new += place >= in_parts.get(range_index, 0)
                num_last_hour += now_s - info.modified_s <= _HOUR_S
        return num_new, num_last_hour

    prefixes: Sequence[str] = [""]  # one after the other, where nothing says how many there are
    if num_shards is not None:
        ranges = range(-(-num_shards // SHARDS_PER_PART))
        of_range = {one: min(SHARDS_PER_PART, wanted_of(one)) for one in ranges}
        prefixes = [f"{one:05d}" for one in ranges if one in young or in_parts.get(one, 0) < of_range[one]]
    num_done = sum(max(0, min(number, wanted_of(index))) for index, number in in_parts.items())
    num_last_hour = 0
    with ThreadPool(max(1, min(_THREADS, len(prefixes)))) as threads:
        for num_new, num_young in threads.imap_unordered(count, prefixes):
            num_done, num_last_hour = num_done + num_new, num_last_hour + num_young
    return num_done, num_last_hour


def _holder(store: ObjectStore) -> str | None:
    try:
        data = store.read(LEASE_KEY)
    except ObjectMissingError:
        return None
    try:
        record = read_record(LeaseRecord, data, f"{store.uri}/{LEASE_KEY}", remedy="wait until it has ended")
    except UsageError:
        return "somebody, whose record cannot be read"
    if record.released:
        return None
    return f"{record.holder}, unless it has died (then it is free {record.duration_s:.0f} s after its last renewal)"
