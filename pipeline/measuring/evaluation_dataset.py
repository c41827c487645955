"""The real images that a model is measured against."""

import math
from collections.abc import Iterator

from pipeline.data.image_stream import LabelledImages, read_images, spread_shards
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.shards import check_levels
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.models.model_files import ModelCard
from pipeline.stores.storage import open_store

_MAX_KEPT_BYTES = 256 << 20  # of decoded images


# Covariances of pixels: 4096 values per image take 128 MiB.
_MAX_PIXELS = 4096


class EvaluationDataset:
    """The dataset's splits as streams of images; what is small is read once and kept."""

    def __init__(self, uri: str) -> None:
        """Read the manifest.

        Raises:
            DatasetMissingError: If there is no dataset, or it has no held-out split.
            DatasetError: If its pixels have more levels than can be read.
        """
        self._store = open_store(uri)
        self.manifest = load_manifest(self._store)
        check_levels(self.manifest, self._store.uri)
        held_out = self.manifest.splits.get("held_out")
        if held_out is None or not held_out.shards:
            raise DatasetMissingError(
                f"{uri}: the dataset has no held-out split to measure on; prepare it with held_out_fraction"
            )
        self._shards = {"train": self.manifest.splits["train"].shards, "held_out": held_out.shards}
        self._kept: dict[str, LabelledImages] = {}
        self._bytes_left = _MAX_KEPT_BYTES

    def stream(self, split: str, num_images: int | None = None) -> Iterator[LabelledImages]:
        """A split's images, or about `num_images` of them, spread evenly over the split: it may be sorted by class."""
        shards = self._shards[split]
        if num_images is not None:
            shards = spread_shards(shards, num_images)
        every = 1 if num_images is None else max(1, sum(shard.num_samples for shard in shards) // num_images)
        for shard in shards:
            images = self._kept.get(shard.key) or read_images(self._store, [shard])
            if shard.key not in self._kept and images.images.nbytes <= self._bytes_left:
                self._kept[shard.key] = images
                self._bytes_left -= images.images.nbytes
            yield images[::every]

    @property
    def too_large_for_pixels(self) -> str | None:
        """Why statistics of raw pixels cannot be taken, if so: the covariance of large images fits in no memory."""
        num_values = math.prod(self.manifest.image_shape)
        if num_values <= _MAX_PIXELS:
            return None
        return f"images of {num_values:,} values are too large for pixel statistics, which take at most {_MAX_PIXELS:,}"

    def check_pixel_statistics(self) -> None:
        """Refuse images that are too large for statistics of raw pixels.

        Raises:
            ConfigError: Names the dataset and its images' size.
        """
        if self.too_large_for_pixels:
            raise ConfigError(f"dataset: {self._store.uri}: {self.too_large_for_pixels}; prepare smaller images")

    def check_fits(self, card: ModelCard, uri: str) -> tuple[str, ...]:
        """Refuse a model of other images or of other classes; see `check_fits`."""
        return check_fits(self.manifest, card, self._store.uri, uri)


def check_fits(manifest: DatasetManifest, card: ModelCard, dataset_uri: str, model_uri: str) -> tuple[str, ...]:
    """Refuse a model of other images or classes than a dataset's, and say what may make its figures wrong.

    A model knows its classes' names and the digest of the manifest that it was trained on, which covers the images,
    their order and their splits. Labels that mean something else are certainly wrong. Of another manifest nothing is
    certain: it may hold the same images, split in another way or not.

    Returns:
        Warnings for the terminal and the report, one line each; none where the manifest is the one of the training.

    Raises:
        ConfigError: Names both, and what differs.
    """
    network = card.config
    ours = (manifest.image_size, manifest.channels, manifest.num_levels, network.num_classes and manifest.num_classes)
    theirs = (network.image_size, network.channels, network.num_levels, network.num_classes)
    if ours != theirs:
        raise ConfigError(
            f"dataset: {dataset_uri} holds {_describe(*ours[:3], manifest.num_classes)}; {model_uri} makes "
            f"{_describe(*theirs)}; name the dataset that it was trained on"
        )
    if network.num_classes is not None and card.class_names and card.class_names != manifest.class_names:
        label = next(k for k, name in enumerate(card.class_names) if name != manifest.class_names[k])
        here, there = manifest.class_names[label], card.class_names[label]
        same = sorted(card.class_names) == sorted(manifest.class_names)
        raise ConfigError(
            f"dataset: {dataset_uri} has {'the same classes in another order' if same else 'other classes'} than "
            f"{model_uri}: label {label} is {here!r} here, {there!r} there; name the dataset that it was trained on"
        )
    if not card.dataset_digest:
        return (
            f"{model_uri} does not say what it was trained on: images of {dataset_uri} that are called held-out may be "
            "among it",
        )
    if card.dataset_digest != manifest.digest:
        return (
            f"{model_uri} was trained on another dataset, or another split of it, ({card.dataset_digest[:16]}) than "
            f"{dataset_uri} ({manifest.digest[:16]}): it may have seen images that are called held-out here",
        )
    return ()


def _describe(image_size: tuple[int, int], channels: int, num_levels: int, num_classes: int | None) -> str:
    height, width = image_size
    classes = f"{num_classes} classes" if num_classes else "no classes"
    return f"images of {height} x {width} pixels (height x width), {channels} channels, {num_levels} levels, {classes}"
