"""Where a dataset's images come from: scikit-learn's digits, or a folder of image files (local or S3).

Opening a source lists its items and splits them without reading any. Its reader, which is small and picklable, fetches
and decodes single items in Ray tasks. Which items are held out, and the order of all, depends on the items' names and
the seed only: not on the machine, and not on a library's generator (the digits' split is fixed by theirs). The order is
shuffled, so that every shard holds a mixture of the classes.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.image_input import load_image
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.stores.storage import ObjectStore, open_store

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TRAIN, HELD_OUT = "train", "held_out"
DIGITS_IMAGE_SIZE = (8, 8)
_DIGITS_TRAIN_IMAGES = 1500


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem:
    """One image before it is read."""

    key: str
    """Name within the source."""
    label: int | None
    """Class number, None without classes."""


class Reader(Protocol):
    """Reads single items, in any process."""

    def fetch(self, key: str) -> bytes:
        """The item's bytes as they are stored; thread-safe.

        Raises:
            StorageError: If they cannot be read.
        """

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Pixels of a fetched item: uint8 [*image_size, channels]; not thread-safe.

        Raises:
            ValueError: If the image does not decode; the message is the reason.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A listed source."""

    uri: str
    """Where it is, for people."""
    reader: Reader
    """Reads its items."""
    class_names: tuple[str, ...]
    """Name of each label; empty without classes."""
    splits: dict[str, tuple[SourceItem, ...]]
    """Items by split, in the order in which they are stored."""
    num_ignored: int = 0
    """Files that are no images by their names."""


class DigitsReader:
    """Reads scikit-learn's 8 x 8 scans with 17 grey levels v; pixels are round(v * 255 / 16). A key is a row number."""

    def fetch(self, key: str) -> bytes:
        """See Reader.fetch."""
        levels: NDArray[np.float64] = _digits_table().images[int(key)]
        return np.rint(levels * 255 / 16).astype(np.uint8).tobytes()

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """See Reader.decode."""
        return np.frombuffer(data, np.uint8).reshape(*DIGITS_IMAGE_SIZE, 1)


@functools.cache
def _digits_table() -> Any:
    from sklearn.datasets import load_digits  # a second of import time

    return load_digits()


def open_digits() -> Source:
    """List the 1,797 digits: the first 1,500 of a fixed permutation to train, 297 held out."""
    labels = [int(label) for label in _digits_table().target]
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    items = tuple(SourceItem(key=str(row), label=labels[row]) for row in order)
    return Source(
        uri="digits",
        reader=DigitsReader(),
        class_names=tuple("0123456789"),
        splits={TRAIN: items[:_DIGITS_TRAIN_IMAGES], HELD_OUT: items[_DIGITS_TRAIN_IMAGES:]},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderReader:
    """Reads image files of a store."""

    store: ObjectStore
    """The folder."""
    image_size: tuple[int, int]
    """Height and width of the result in pixels."""
    channels: int
    """1 or 3."""
    max_pixels: int
    """Larger images count as undecodable."""

    def fetch(self, key: str) -> bytes:
        """See Reader.fetch."""
        return self.store.read(key)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """See Reader.decode."""
        return load_image(data, image_size=self.image_size, channels=self.channels, max_pixels=self.max_pixels)


def open_folder(
    uri: str, *, image_size: tuple[int, int], channels: int, max_pixels: int, held_out_fraction: float, seed: int
) -> Source:
    """List a folder: one sub-folder per class (files may lie deeper in it), or no sub-folders at all.

    Hidden files and folders are skipped; files that are no images by their names are counted.

    Raises:
        DatasetMissingError: If there is no folder, or no image in it.
        ConfigError: If images lie beside sub-folders, a name is not UTF-8, or a split would be empty.
        StorageAccessError: If the folder cannot be listed.
    """
    store = open_store(uri)
    keys: list[str] = []
    num_ignored = 0
    for info in store.list():
        if any(part.startswith(".") for part in info.key.split("/")):
            continue
        if info.key.lower().endswith(IMAGE_EXTENSIONS):
            keys.append(_check_name(info.key, store.uri))
        else:
            num_ignored += 1
    if not keys:
        found = f"{num_ignored} files, none of them {' '.join(IMAGE_EXTENSIONS)}" if num_ignored else "nothing there"
        raise DatasetMissingError(f"source: no images at {store.uri} ({found}); name a folder or s3://bucket/prefix")
    class_names = _class_names(keys, store.uri)
    labels = {name: label for label, name in enumerate(class_names)}
    items = [SourceItem(key=key, label=labels.get(key.split("/", 1)[0])) for key in keys]
    return Source(
        uri=store.uri,
        reader=FolderReader(store=store, image_size=image_size, channels=channels, max_pixels=max_pixels),
        class_names=class_names,
        splits=_split(items, held_out_fraction, seed),
        num_ignored=num_ignored,
    )


def _check_name(key: str, uri: str) -> str:
    if not key.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in key):
        raise ConfigError(f"source: {uri} has a file whose name is not UTF-8: {key!r}; rename it")
    return key


def _class_names(keys: list[str], uri: str) -> tuple[str, ...]:
    """Top-level folders; none if there are none."""
    direct = [key for key in keys if "/" not in key]
    folders = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
    if direct and folders:
        raise ConfigError(
            f"source: {uri} has {len(direct)} images directly in it (first: {direct[0]}) beside sub-folders (first: "
            f"{folders[0]}/); sub-folders are classes: move these images into one, or the sub-folders elsewhere"
        )
    return tuple(folders)


def _split(items: list[SourceItem], held_out_fraction: float, seed: int) -> dict[str, tuple[SourceItem, ...]]:
    """Hold out the same share of every class (rounded); both parts in an order that mixes the classes."""
    shuffled = sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item.key}".encode()).digest())
    by_label: dict[int | None, list[SourceItem]] = {}
    for item in shuffled:
        by_label.setdefault(item.label, []).append(item)
    held_out: set[str] = set()
    for group in by_label.values():
        held_out.update(item.key for item in group[: int(len(group) * held_out_fraction + 0.5)])
    splits = {
        TRAIN: tuple(item for item in shuffled if item.key not in held_out),
        HELD_OUT: tuple(item for item in shuffled if item.key in held_out),
    }
    if not splits[TRAIN] or (held_out_fraction > 0 and not splits[HELD_OUT]):
        empty = HELD_OUT if splits[TRAIN] else TRAIN
        raise ConfigError(
            f"held_out_fraction: {held_out_fraction} of {len(items)} images leaves the split {empty!r} empty; "
            "change the fraction or add images"
        )
    return {name: split for name, split in splits.items() if split}
