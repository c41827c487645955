"""What a sampler sees of a network: a denoiser, which answers with x_0_hat and the eps_hat that belongs to it.

A network predicts one thing (eps, x_0 or v); samplers need x_0_hat and eps_hat. The wrapper converts and limits x_0_hat
to the range of images, so that each sampler is a few lines over this contract.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ddpm.process.prediction import (
    PredictionType,
    check_prediction_type,
    predict_eps_from_x_0,
    predict_x_0_and_eps,
)
from ddpm.process.schedules import NoiseSchedule
from ddpm.shapes import Images, Labels, Times

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x_t [B, C, H, W], t [B], label int64 [B] or None) -> prediction [B, C, H, W], or [B, 2C, H, W] with a learned
variance. t is int64, and float64 only where a sampler is asked to visit places between two steps."""


@dataclass(frozen=True, slots=True)
class MovesT:
    """A network for callers whose t may be on the CPU, as a sampler's is, wherever x_t is; itself a network."""

    network: Network
    """The network, which takes t where x_t is."""

    def __call__(self, x_t: Images, t: Times, label: Labels | None) -> Tensor:
        """The network's answer; nothing waits for the device."""
        return self.network(x_t, t.to(x_t.device, non_blocking=True), label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A denoiser's answer; x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat holds between the two."""

    x_0_hat: Images
    """Predicted clean images [B, C, H, W]."""
    eps_hat: Images
    """Predicted noise, same shape."""
    variance_fraction: Images | None = None
    """Where between its bounds the log-variance of a step lies, same shape; 1 is beta. None: not predicted."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the clean images behind x_t."""

    def __call__(self, x_t: Images, t: Times, label: Labels | None) -> Prediction:
        """Predict; t [B], on x_t's device or the CPU, is the index in the *training* chain, or a place between two."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkDenoiser:
    """A denoiser around a network."""

    network: Network
    """Any callable network(x_t, t, label) -> prediction."""
    schedule: NoiseSchedule
    """The schedule of the training chain."""
    prediction_type: PredictionType = "eps"
    """What the network predicts."""
    learned_variance: bool = False
    """The network answers with 2C channels: the prediction, then v in about [-1, 1] for the variance of a step."""
    clip_x_0: bool = True
    """Limit x_0_hat to [-1, 1], the range of images, and re-derive eps_hat from it."""
    dynamic_threshold: float | None = None
    """Quantile of |x_0_hat| by which an image that exceeds 1 is divided, instead of clipping at 1; None: clip at 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be converted or limited."""
        check_prediction_type(self.prediction_type, self.schedule)
        if self.dynamic_threshold is not None:
            check_dynamic_threshold(self.dynamic_threshold, clip_x_0=self.clip_x_0)

    def __call__(self, x_t: Images, t: Times, label: Labels | None) -> Prediction:
        """Predict the clean images and the noise.

        Re-deriving eps_hat keeps the pair consistent with x_t; without it, few-step samplers drift off the images.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Step index [B] in [0, T-1] of the training chain, or places between its steps; where the network takes
                it, which for one of DiffusionModel.denoiser may be the CPU.
            label: Class [B], or None.

        Returns:
            x_0_hat and eps_hat in x_t's dtype, whatever the network computes in; with a learned variance its fraction
            (v + 1) / 2 too.

        Raises:
            ValueError: If the network's answer has another shape.

        Source:
            Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 15, for the fraction.
        """
        output = self.network(x_t, t, label).to(x_t.dtype)
        channels = x_t.shape[1] * (2 if self.learned_variance else 1)
        expected = (len(x_t), channels, *x_t.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"network: must predict {self.prediction_type} of shape {list(expected)}, got {list(output.shape)}; "
                "check its channels and learned_variance"
            )
        fraction: Tensor | None = None
        if self.learned_variance:
            output, v = output.chunk(2, dim=1)
            fraction = (v + 1) / 2
        x_0_hat, eps_hat = predict_x_0_and_eps(self.schedule, x_t, t, output, self.prediction_type)
        if self.clip_x_0:
            if self.dynamic_threshold is None:
                x_0_hat = x_0_hat.clamp(-1, 1)
            else:
                x_0_hat = threshold_dynamically(x_0_hat, self.dynamic_threshold)
            eps_hat = predict_eps_from_x_0(self.schedule, x_t, t, x_0_hat)
        return Prediction(x_0_hat=x_0_hat, eps_hat=eps_hat, variance_fraction=fraction)


def threshold_dynamically(x_0: Images, quantile: float) -> Images:
    """Clip each image at a quantile of its own magnitudes and divide by it, where that quantile exceeds 1.

    Strong guidance makes many pixels exceed 1; clipping them all at 1 saturates the image, dividing keeps its contrast.

    Args:
        x_0: Predicted clean images [B, C, H, W].
        quantile: In (0, 1], interpolated linearly between the two nearest magnitudes.

    Returns:
        Images in [-1, 1], same shape; an image whose quantile is at most 1 is clipped at 1.

    Source:
        Saharia et al. 2022 (arXiv:2205.11487), section 2.3.
    """
    # Not torch.quantile, which refuses more than 16 million numbers: 128 colour images of 256 pixels are 25 million.
    magnitudes = x_0.abs().flatten(1).sort(dim=1).values
    place = quantile * (magnitudes.shape[1] - 1)
    below, above = magnitudes[:, int(place)], magnitudes[:, min(int(place) + 1, magnitudes.shape[1] - 1)]
    limit = torch.lerp(below, above, place % 1).clamp(min=1)[:, None, None, None]
    return x_0.clamp(-limit, limit) / limit


def check_dynamic_threshold(quantile: float, *, clip_x_0: bool) -> None:
    """Refuse an impossible quantile.

    Raises:
        ValueError: If quantile is outside (0, 1], or x_0_hat is not to be limited at all.
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"dynamic_threshold: must be in (0, 1], got {quantile}; 0.995 is a good start")
    if not clip_x_0:
        raise ValueError(f"dynamic_threshold: limits x_0_hat, got {quantile} with clip_x_0 off; turn clip_x_0 on")
