"""Figures of merit of images and of noise predictions, each over a stream of images.

Pixels are scaled to [0, 1]; everything that is summed is float64; noise is counter-based, so that a figure does not
depend on how the stream is cut.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ddpm import (
    Estimate,
    Moments,
    Network,
    NoiseSchedule,
    Stream,
    images_to_x_0,
    q_sample,
    random_words,
    simple_loss,
    standard_normal,
)
from pipeline.data.image_stream import LabelledImages, regroup

CHUNK_IMAGES = 4096
"""Images whose pixels are in memory at once as float64."""


def pixels(images: LabelledImages) -> Float64[np.ndarray, "n d"]:
    """Each image as a vector of C H W values in [0, 1], channel by channel as in x_0."""
    return images.images.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float64) / 255


def pixel_moments(stream: Iterable[LabelledImages], num_classes: int | None) -> list[Moments]:
    """Moments of the pixels of each class; of all images as one class when num_classes is None.

    Raises:
        ValueError: If a class has no image.
    """
    moments: list[Moments | None] = [None] * (num_classes or 1)
    for group in regroup(stream, CHUNK_IMAGES):
        values = torch.from_numpy(pixels(group))
        for k in range(len(moments)):
            rows = values if num_classes is None else values[torch.from_numpy(group.labels == k)]
            if len(rows):
                more, so_far = Moments.from_samples(rows), moments[k]
                moments[k] = more if so_far is None else so_far + more
    complete = [of_class for of_class in moments if of_class is not None]
    if len(complete) < len(moments):
        raise ValueError(f"classes: each needs images, got none of class {moments.index(None)}")
    return complete


class PixelClassifier:
    """A support vector machine on raw pixels, fitted to real images: an independent reader of labels."""

    def __init__(self, train: LabelledImages) -> None:
        """Fit.

        Raises:
            ValueError: If there are no labels or fewer than two classes.
        """
        if train.labels is None or len(np.unique(train.labels)) < 2:
            raise ValueError(
                "train: must have labels of at least two classes; a classifier needs something to tell apart"
            )
        from sklearn.svm import SVC  # two seconds, which jobs that do not evaluate should not wait

        self._svm = SVC().fit(pixels(train), train.labels)

    def agreement(self, stream: Iterable[LabelledImages]) -> float:
        """Share of labelled images that are read as what their label says, in [0, 1]."""
        num_right = num_images = 0
        for group in regroup(stream, CHUNK_IMAGES):
            num_right += int(self.is_right(group).sum())
            num_images += len(group)
        return num_right / num_images

    def is_right(self, images: LabelledImages) -> Bool[np.ndarray, " n"]:
        """Whether each image is read as what its label says [N]."""
        right: Bool[np.ndarray, " n"] = self._svm.predict(pixels(images)) == images.labels
        return right


def eps_mse(
    networks: Sequence[Network],
    schedule: NoiseSchedule,
    open_stream: Callable[[], Iterable[LabelledImages]],
    *,
    images_per_t: int,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> list[Estimate]:
    """Mean squared error of predicted noise, equally over all t: L_simple without its randomness.

    Each t gets `images_per_t` images. The images are taken in the order of the stream, again and again if they are too
    few, and which of them a t gets is a fixed shuffle: streams may be sorted by class.

    Args:
        networks: Predictors network(x_t, t, label) -> eps_hat, all measured on the same x_t and noise.
        schedule: The training chain.
        open_stream: Opens the stream of images from its start; not empty.
        images_per_t: Images for each t, at least 2.
        seed: Key of the counter-based noise.
        batch_size: Images per evaluation of a network.
        device: Where the networks are.

    Returns:
        For each network the mean over t, with the standard error from the choice of images and noise within each t.
    """
    T = schedule.num_timesteps
    t_of_slot = _shuffled_timesteps(T, images_per_t, seed).to(device)
    sums = torch.zeros((len(networks), T), dtype=torch.float64)
    squares = torch.zeros_like(sums)
    start = 0
    for group in regroup(_cycle(open_stream, T * images_per_t), batch_size):
        slots = torch.arange(start, start + len(group), device=device)
        start += len(group)
        x_0 = images_to_x_0(torch.from_numpy(group.images).to(device))
        label = None if group.labels is None else torch.from_numpy(group.labels).to(device)
        t = t_of_slot[slots]
        eps = standard_normal(seed, Stream.EVAL_EPS, slots, 0, x_0.shape[1:])
        x_t = q_sample(schedule, x_0, t, eps)
        for i, network in enumerate(networks):
            with torch.no_grad():
                losses = simple_loss(eps, network(x_t, t, label)).to("cpu", torch.float64)
            sums[i].index_add_(0, t.cpu(), losses)
            squares[i].index_add_(0, t.cpu(), losses.square())
    mean = sums / images_per_t
    variance = (squares / images_per_t - mean.square()).clamp(min=0) * images_per_t / (images_per_t - 1)
    return [
        Estimate(value=float(m.mean()), standard_error=math.sqrt(float(v.sum()) / images_per_t) / T)
        for m, v in zip(mean, variance)
    ]


def _shuffled_timesteps(num_timesteps: int, images_per_t: int, seed: int) -> Int64[Tensor, " slots"]:
    """Every t `images_per_t` times, in a fixed random order."""
    slots = torch.arange(num_timesteps * images_per_t)
    words = random_words(seed, Stream.EVAL_EPS, slots, 1, 1)[:, 0]  # draw 1: the noise itself is draw 0
    return words.argsort(stable=True) // images_per_t


def _cycle(open_stream: Callable[[], Iterable[LabelledImages]], num_images: int) -> Iterator[LabelledImages]:
    while num_images > 0:
        for group in open_stream():
            yield group[:num_images]
            num_images -= min(num_images, len(group))
            if num_images == 0:
                return
