"""The Frechet distance of raw pixels to the held-out images, with standard errors, and of as many real images.

The distance is biased upwards by about 1 / N (`FrechetComparison`), so that a figure means something only beside that
of as many real images. Those are disjoint random sets of training images, the same for whoever asks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ddpm import (
    Estimate,
    FrechetComparison,
    Moments,
    Stream,
    random_words,
    stratified_standard_error,
)
from pipeline.data.image_stream import LabelledImages, regroup
from pipeline.measuring.measures import CHUNK_IMAGES, pixel_moments, pixels

MAX_REAL_SETS = 10
"""Sets of real images that stand beside the generated ones, if there are so many."""

OpenStream = Callable[[], Iterable[LabelledImages]]
"""Opens a stream of images from its start: it is read twice."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PixelDistance:
    """Distance of some images to others, and how much each of both moves it."""

    value: float
    """The distance."""
    influence: Float64[Tensor, " n"]
    """First-order influence of each image, in the order of the stream."""
    label: Int[Tensor, " n"] | None
    """Class of each; None without labels."""

    @property
    def standard_error(self) -> float | None:
        """Over images of which each class has a fixed number, the held-out ones being the same; None if unknown."""
        error = stratified_standard_error(self.influence, self.label)
        return error if math.isfinite(error) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RealDistance:
    """Distance of as many real images."""

    distance: Estimate
    """Mean over the sets, and the standard error of one of them, as of a set of generated images."""
    num_images: int
    """Images in each set: fewer than were asked for if there are not so many."""
    num_sets: int
    """Disjoint sets."""


def pixel_distance(open_stream: OpenStream, others: Moments) -> PixelDistance:
    """Distance of the images of a stream, at least two, to others.

    Args:
        open_stream: Opens the stream.
        others: Moments of the others' pixels.
    """
    comparison = FrechetComparison.of(pixel_moments(open_stream(), None)[0], others)
    influences, labels = [], []
    for group in regroup(open_stream(), CHUNK_IMAGES):
        influences.append(comparison.influence(torch.from_numpy(pixels(group))))
        labels.append(group.labels)
    known = [torch.from_numpy(label) for label in labels if label is not None]
    return PixelDistance(
        value=comparison.distance,
        influence=torch.cat(influences),
        label=torch.cat(known) if len(known) == len(labels) else None,
    )


def real_distance(open_train: OpenStream, num_train: int, num_images: int, others: Moments) -> RealDistance:
    """Distance of as many real images, drawn at random from the training images.

    Args:
        open_train: Opens the training images.
        num_train: Their number, at least two.
        num_images: Images in a set.
        others: Moments of the held-out images' pixels.
    """
    size = min(num_images, num_train)
    num_sets = min(MAX_REAL_SETS, num_train // size)
    order = random_words(0, Stream.EVAL_SUBSET, torch.arange(num_train), 0, 1)[:, 0].argsort(stable=True)
    chosen = torch.empty_like(order)
    chosen[order] = torch.arange(num_train) // size  # the rest, num_sets and more, is no set's

    def numbered() -> Iterator[LabelledImages]:
        start = 0
        for group in open_train():
            yield LabelledImages(images=group.images, labels=chosen[start : start + len(group)].numpy())
            start += len(group)

    comparisons = [FrechetComparison.of(of_set, others) for of_set in pixel_moments(numbered(), num_sets)]
    squares = torch.zeros(num_sets, dtype=torch.float64)
    for group in regroup(numbered(), CHUNK_IMAGES):
        values = torch.from_numpy(pixels(group))
        for k, comparison in enumerate(comparisons):
            rows = values[torch.from_numpy(group.labels == k)]
            if len(rows):
                squares[k] += comparison.influence(rows).square().sum()
    variance = float((squares / (size - 1) / size).mean())
    mean = math.fsum(comparison.distance for comparison in comparisons) / num_sets
    return RealDistance(
        distance=Estimate(value=mean, standard_error=math.sqrt(variance)), num_images=size, num_sets=num_sets
    )
