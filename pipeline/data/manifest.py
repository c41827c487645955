"""The dataset manifest: which shards a dataset consists of, and what is in them.

`manifest.json` in the dataset's root is published last and once: readers trust only shards that it names.
A sample's id is its row number in manifest order within its split, 0..N-1, for ever.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pipeline.config_io import digest, read_record
from pipeline.errors import ConfigError, DatasetError, DatasetMissingError, ObjectMissingError
from pipeline.stores.object_store import ObjectStore

MANIFEST_KEY = "manifest.json"
_REMEDY = "prepare the dataset again into an empty place"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard: enough to verify it before use."""

    key: str
    """Key in the dataset's store."""
    size_bytes: int
    """Size of the tar in bytes."""
    sha256: str
    """SHA-256 of the tar, 64 hexadecimal digits."""
    num_samples: int
    """Samples in the tar."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError(f"sha256: must be 64 hexadecimal digits, got {self.sha256!r}; the manifest is damaged")
        if self.num_samples < 1 or self.size_bytes < 1:
            raise ValueError(f"num_samples: a shard must hold at least 1, got {self.num_samples} in {self.key!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The shards of one split, in the order that gives samples their ids."""

    shards: tuple[ShardRecord, ...]
    """Shards in id order."""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """What a dataset is. Images are uint8 [*image_size, channels]."""

    format_version: int = 2
    """Version of this record."""
    name: str
    """Name of the dataset, for people."""
    source: str
    """Where the images came from, for people."""
    image_size: tuple[int, int]
    """Height and width in pixels."""
    num_levels: Literal[256, 65536] = 256
    """Levels of a pixel's value: 8 or 16 bits. Only datasets of 256 are made and read so far."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    class_names: tuple[str, ...]
    """Name of each label 0..; empty: the images have no labels."""
    splits: dict[str, Split]
    """Splits by name: "train", and "held_out" if there is one."""
    num_quarantined: int
    """Source images left out because they do not decode; `quarantine.json` lists them."""

    def __post_init__(self) -> None:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size: must be at least 1 pixel each way, got {self.image_size}; this is damaged")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: must be 1 or 3, got {self.channels}; the manifest is damaged")
        if not self.splits.get("train", Split(shards=())).shards:
            raise ValueError(f"splits: needs a 'train' split with shards, got {sorted(self.splits)}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return (*self.image_size, self.channels)

    @property
    def num_classes(self) -> int | None:
        """Number of labels, None without labels."""
        return len(self.class_names) or None

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a reader can see; the same images prepared elsewhere have the same digest."""
        return digest(dataclasses.replace(self, name="", source=""))


def load_manifest(store: ObjectStore) -> DatasetManifest:
    """Read a dataset's manifest.

    Raises:
        DatasetMissingError: If there is none.
        DatasetError: If it is damaged.
        FormatVersionError: If it is of another version.
        StorageAccessError: If access is refused.
    """
    where = f"{store.uri}/{MANIFEST_KEY}"
    try:
        data = store.read(MANIFEST_KEY)
    except ObjectMissingError:
        raise DatasetMissingError(f"{where}: no dataset here; make one with jobs/prepare_data.py") from None
    try:
        return read_record(DatasetManifest, data, where, remedy=_REMEDY)
    except ConfigError as error:
        raise DatasetError(f"{error}; {_REMEDY}") from None
