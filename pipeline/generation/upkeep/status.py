"""How far a run is: what is done, what is missing, how fast it goes, and who works there. Reads listings.

Two small objects are read beside them, manifest and lease, and the run's config.toml or first record where there is no
manifest yet.
"""

import time
from dataclasses import dataclass

from pipeline.config_io import read_record
from pipeline.data.shard_parts import SHARDS_PER_PART
from pipeline.errors import ConfigError, ObjectMissingError, UsageError
from pipeline.generation.output import commits
from pipeline.generation.output.commits import part_index
from pipeline.generation.output.manifest import list_parts, load_generation_manifest
from pipeline.generation.upkeep.stored_run import stored_config
from pipeline.progress import format_duration
from pipeline.stores.lease import LEASE_KEY, LeaseRecord
from pipeline.stores.object_store import ObjectStore

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands."""

    is_published: bool
    """Whether there is a manifest of as many images as are wanted."""
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
        rows = [
            ("images", "unknown" if self.num_images is None else f"{self.num_images:,}"),
            ("output shards", f"{shards}, of up to {self.shard_size:,} images"),
            ("manifest", "published" if self.is_published else "not published yet"),
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
        num_images: Images that are wanted; None: as the manifest says, or config.toml.
        now_s: The time, seconds since 1970; None: now.

    Raises:
        ConfigError: If nothing of a run is there, or num_images is not positive.
        FormatVersionError: If manifest or record is of another version.
        StorageError: If the store fails.
    """
    if num_images is not None and num_images < 1:
        raise ConfigError(f"num_images: must be at least 1, got {num_images}; leave it out")
    now_s = time.time() if now_s is None else now_s
    manifest, config = load_generation_manifest(store), stored_config(store)
    done, num_last_hour = set[int](), 0
    for info in store.list("_parts/"):
        index = part_index(info.key)
        if index is not None:
            done.add(index)
            num_last_hour += now_s - info.modified_s <= _HOUR_S
    for part in list_parts(store):
        first = part.range_index * SHARDS_PER_PART
        done |= set(range(first, first + part.num_shards))
    if not done and manifest is None:
        raise ConfigError(f"prefix: must hold a run, got {store.uri} without one; name the folder of 16 digits")
    if manifest is not None:
        shard_size = manifest.spec.shard_size
    elif config is not None:
        shard_size = config.shard_size
    else:
        shard_size = commits.read_record(store, min(done)).num_samples
    wanted = num_images
    if wanted is None and manifest is not None:
        wanted = manifest.num_images
    elif wanted is None and config is not None:
        wanted = config.num_images
    num_shards = None if wanted is None else -(-wanted // shard_size)
    return Status(
        is_published=manifest is not None and wanted is not None and manifest.num_images >= wanted,
        num_images=wanted,
        shard_size=shard_size,
        num_shards_done=sum(num_shards is None or index < num_shards for index in done),
        num_last_hour=num_last_hour,
        holder=_holder(store),
    )


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
