"""The real images that a model is measured against."""

from collections.abc import Iterator

from pipeline.data.image_stream import LabelledImages, read_images, spread_shards
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.shards import check_levels
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.models.model_files import ModelCard
from pipeline.stores.storage import open_store

_MAX_KEPT_BYTES = 256 << 20  # of decoded images


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

    def check_fits(self, card: ModelCard, uri: str) -> None:
        """Refuse a model of other images, or of other classes.

        Raises:
            ConfigError: If the model makes other images than the dataset holds.
        """
        check_fits(self.manifest, card, self._store.uri, uri)


def check_fits(manifest: DatasetManifest, card: ModelCard, dataset_uri: str, model_uri: str) -> None:
    """Refuse a model of other images or classes than a dataset's.

    Raises:
        ConfigError: Names both.
    """
    network = card.config
    ours = (manifest.image_size, manifest.channels, manifest.num_levels, network.num_classes and manifest.num_classes)
    theirs = (network.image_size, network.channels, network.num_levels, network.num_classes)
    if ours != theirs:
        raise ConfigError(
            f"dataset: {dataset_uri} holds {_describe(*ours[:3], manifest.num_classes)}; {model_uri} makes "
            f"{_describe(*theirs)}; name the dataset that it was trained on"
        )


def _describe(image_size: tuple[int, int], channels: int, num_levels: int, num_classes: int | None) -> str:
    height, width = image_size
    classes = f"{num_classes} classes" if num_classes else "no classes"
    return f"images of {height} x {width} pixels (height x width), {channels} channels, {num_levels} levels, {classes}"
