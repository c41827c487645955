"""Output shards of synthetic pictures, committed by nobody, for tests of the gallery: no model, no Ray."""

import colorsys
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from ddpm import DDIM
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.generation.output.commits import tar_key
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.generation.viewing.gallery import Lineage, write_gallery
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store

SPEC = SamplingSpec(
    model_digest=hashlib.sha256(b"a model").hexdigest(),
    guide_digest=None,
    calibration_digest=None,
    request=None,
    sampler=DDIM(num_steps=50, guidance_scale=1.5),
    sampler_revision=1,
    seed=7,
    num_classes=3,
    shard_size=100,
    batch_size=50,
    image_size=(8, 8),
    channels=1,
    num_levels=256,
)
LINEAGE = Lineage(
    model_uri="models:/shapes/3",
    run_id="5c0b1e0f7c3f4d8f9a1b2c3d4e5f6a7b",
    dataset_digest=hashlib.sha256(b"a dataset").hexdigest(),
)
Draw = Callable[[int, int | None], bytes]
"""The PNG of an image, by id and label."""


def noise(spec: SamplingSpec) -> Draw:
    """Random pixels, a function of the id."""

    def draw(sample_id: int, label: int | None) -> bytes:
        shape = (*spec.image_size, spec.channels)
        return encode_png(np.random.default_rng(sample_id).integers(0, 256, shape, dtype=np.uint8))

    return draw


SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "hexagon", "diamond", "moon", "wave")


def shapes(spec: SamplingSpec) -> Draw:
    """A coloured shape for each class, in colours and places by the id: something to look at."""

    def draw(sample_id: int, label: int | None) -> bytes:
        rng = np.random.default_rng(sample_id)
        height, width = spec.image_size
        side, scale = 4 * min(height, width), 4
        hue = rng.random()
        back = tuple(
            int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.25 + 0.3 * rng.random(), 0.25 + 0.7 * rng.random())
        )
        front = tuple(int(255 * c) for c in colorsys.hsv_to_rgb((hue + 0.4 + 0.2 * rng.random()) % 1, 0.7, 0.95))
        image = PIL.Image.new("RGB", (width * scale, height * scale), back)
        pen = PIL.ImageDraw.Draw(image)
        r = side * (0.22 + 0.12 * rng.random())
        x = image.width / 2 + side * 0.12 * (rng.random() - 0.5)
        y = image.height / 2 + side * 0.12 * (rng.random() - 0.5)
        turn = rng.random() * 6.28
        _draw_shape(pen, SHAPES[(label or 0) % len(SHAPES)], x, y, r, turn, front, back)
        small = np.asarray(image.resize((width, height), PIL.Image.Resampling.LANCZOS))
        noisy = np.clip(small + rng.normal(0, 4, small.shape), 0, 255).astype(np.uint8)
        return encode_png(noisy if spec.channels == 3 else noisy.mean(axis=2, keepdims=True).astype(np.uint8))

    return draw


def _draw_shape(pen, name, x, y, r, turn, front, back) -> None:  # type: ignore[no-untyped-def]
    def polygon(radii: Sequence[float]) -> None:
        angles = [turn + 2 * np.pi * k / len(radii) for k in range(len(radii))]
        pen.polygon([(x + r * q * np.cos(a), y + r * q * np.sin(a)) for q, a in zip(radii, angles)], fill=front)

    box = (x - r, y - r, x + r, y + r)
    if name in ("circle", "ring", "moon"):
        pen.ellipse(box, fill=front)
        if name == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=back)
        if name == "moon":
            dx, dy = r * 0.6 * np.cos(turn), r * 0.6 * np.sin(turn)
            pen.ellipse((x - r + dx, y - r + dy, x + r + dx, y + r + dy), fill=back)
    elif name == "cross":
        for a in (turn, turn + np.pi / 2):
            dx, dy = r * np.cos(a), r * np.sin(a)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=front, width=int(r * 0.6))
    elif name == "wave":
        points = [(x + r * t, y + r * 0.5 * np.sin(5 * t + turn)) for t in np.linspace(-1.2, 1.2, 40)]
        pen.line(points, fill=front, width=int(r * 0.45), joint="curve")
    else:
        polygon({"square": [1] * 4, "triangle": [1] * 3, "hexagon": [1] * 6,
                 "diamond": [1.1, 0.6, 1.1, 0.6], "star": [1, 0.45] * 5}[name])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    """Shards in a folder, and their gallery."""

    store: ObjectStore
    spec: SamplingSpec
    shards: tuple[ShardRecord, ...]
    num_images: int
    class_names: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.store.uri)

    def write(self, max_images: int = 1_000_000, *, shards: Sequence[ShardRecord] | None = None) -> int | None:
        return write_gallery(
            self.store,
            self.spec,
            self.class_names,
            iter(self.shards if shards is None else shards),
            LINEAGE,
            num_images=self.num_images,
            max_images=max_images,
        )


def make_run(
    folder: Path,
    num_images: int,
    *,
    spec: SamplingSpec = SPEC,
    class_names: tuple[str, ...] = ("cat", "dog", "bird"),
    draw: Draw | None = None,
    without: frozenset[int] = frozenset(),
) -> SyntheticRun:
    """Write the shards of a run, less some ids."""
    store = open_store(str(folder))
    spec = replace(spec, num_classes=len(class_names) or None)
    shards = tuple(write_shards(store, spec, num_images, draw or noise(spec), without))
    return SyntheticRun(store=store, spec=spec, shards=shards, num_images=num_images, class_names=class_names)


def write_shards(
    store: ObjectStore, spec: SamplingSpec, num_images: int, draw: Draw, without: frozenset[int]
) -> Iterator[ShardRecord]:
    common = {"seed": spec.seed, "model_digest": spec.model_digest}
    for index in itertools.count():
        first = index * spec.shard_size
        ids = [i for i in range(first, min(first + spec.shard_size, num_images)) if i not in without]
        if first >= num_images:
            return
        if not ids:
            continue  # a shard holds at least one image
        labels = [None if spec.num_classes is None else i % spec.num_classes for i in ids]
        samples = [
            Sample(
                key=f"{i:012d}",
                image=draw(i, label),
                cls=label,
                meta={**common, "sample_id": i, "label": label},
            )
            for i, label in zip(ids, labels)
        ]
        tar = pack_shard(samples)
        sha256 = hashlib.sha256(tar).hexdigest()
        record = ShardRecord(key=tar_key(index, sha256), size_bytes=len(tar), sha256=sha256, num_samples=len(samples))
        store.write(record.key, tar)
        yield record
