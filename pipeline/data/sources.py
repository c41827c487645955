"""Where a dataset's images come from: scikit-learn's digits, or a folder of image files (local or S3).

Opening a source lists its items and splits them without reading any. Its reader, which is small and picklable, fetches
and decodes single items in Ray tasks. Which items are held out, and the order of all, depends on the items' names and
the seed only: not on the machine, and not on a library's generator (the digits' split is fixed by theirs). The order is
shuffled, so that every shard holds a mixture of the classes.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.folder_listing import HELD_OUT, TRAIN, FolderImages, list_folder
from pipeline.data.image_input import ResizeMode, load_image
from pipeline.errors import ConfigError
from pipeline.stores.storage import ObjectStore, open_store

DIGITS_IMAGE_SIZE = (8, 8)
HELD_OUT_FRACTION = 0.1
"""What is held out of a folder unless something else is asked for."""
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
            UnusableImage: If it makes no image; the message is the reason. A ValueError.
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
    findings: tuple[tuple[str, str], ...] = ()
    """What to say of it before it is read, as names and values."""


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
    """Larger images are not used."""
    min_size: int = 1
    """Images with a shorter side are not used, in pixels."""
    resize_mode: ResizeMode = "crop"
    """How images get that size."""

    def fetch(self, key: str) -> bytes:
        """See Reader.fetch."""
        return self.store.read(key)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """See Reader.decode."""
        return load_image(
            data,
            image_size=self.image_size,
            channels=self.channels,
            max_pixels=self.max_pixels,
            min_size=self.min_size,
            resize_mode=self.resize_mode,
        )


def open_folder(
    uri: str,
    *,
    image_size: tuple[int, int],
    channels: int,
    max_pixels: int,
    held_out_fraction: float | None,
    seed: int,
    min_size: int = 1,
    resize_mode: ResizeMode = "crop",
    exclude: Sequence[str] = (),
    allow_empty_classes: bool = False,
    is_anonymous: bool = False,
) -> Source:
    """List a folder; folder_listing.py has the rules of what is an image, a class and a split.

    Args:
        uri: The folder.
        image_size: As of load_image.
        channels: As of load_image.
        max_pixels: As of load_image.
        held_out_fraction: Share of each class that is held out; None: 0.1, and must be None where folders are splits.
        seed: Decides which images are held out, and the order of all.
        min_size: As of load_image.
        resize_mode: As of load_image.
        exclude: As of list_folder.
        allow_empty_classes: As of list_folder.
        is_anonymous: Read without credentials.

    Raises:
        DatasetMissingError: If there is no folder, or no image in it.
        ConfigError: If the folder breaks one of the rules, or a split would be empty.
        StorageAccessError: If the folder cannot be listed.
    """
    store = open_store(uri, is_anonymous=is_anonymous)
    listing = list_folder(store, exclude=exclude, allow_empty_classes=allow_empty_classes)
    if HELD_OUT in listing.images and held_out_fraction is not None:
        raise ConfigError(
            f"held_out_fraction: {store.uri} has a folder of held-out images, got {held_out_fraction}; leave it out"
        )
    if HELD_OUT in listing.images:
        splits = {name: tuple(_shuffled(_items(images), seed)) for name, images in listing.images.items() if name}
    else:
        (images,) = listing.images.values()
        splits = _split(_items(images), HELD_OUT_FRACTION if held_out_fraction is None else held_out_fraction, seed)
    return Source(
        uri=store.uri,
        reader=FolderReader(
            store=store,
            image_size=image_size,
            channels=channels,
            max_pixels=max_pixels,
            min_size=min_size,
            resize_mode=resize_mode,
        ),
        class_names=listing.class_names,
        splits={name: splits[name] for name in (TRAIN, HELD_OUT) if name in splits},
        num_ignored=listing.num_ignored,
        findings=listing.findings,
    )


def _items(images: FolderImages) -> list[SourceItem]:
    return [
        SourceItem(key=key, label=None if label < 0 else label)
        for key, label in zip(images.keys, images.labels, strict=True)
    ]


def _shuffled(items: list[SourceItem], seed: int) -> list[SourceItem]:
    """An order that depends on names and seed alone, and mixes the classes."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item.key}".encode()).digest())


def _split(items: list[SourceItem], held_out_fraction: float, seed: int) -> dict[str, tuple[SourceItem, ...]]:
    """Hold out the same share of every class (rounded); both parts in an order that mixes the classes."""
    shuffled = _shuffled(items, seed)
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
