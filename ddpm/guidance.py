"""Classifier-free guidance: a network that exaggerates what the label changes in another network's answer.

One wrapper around a network, so that every sampler can be guided: the conditional and the unconditional prediction come
from one call with a batch twice as large. Whether eps, x_0 or v is predicted does not matter, since each is an affine
function of another and the two weights sum to 1. Clipping follows, in the denoiser.

Source:
    Ho and Salimans 2022 (arXiv:2207.12598), whose w is our scale - 1. Kynkäänniemi et al. 2024 (arXiv:2404.07724) for
    the interval. Lin et al. 2023 (arXiv:2305.08891), section 3.4, for the rescaling.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ddpm.denoiser import Network
from ddpm.schedules import NoiseSchedule
from ddpm.shapes import Images, Labels, Times


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedNetwork:
    """A network with classifier-free guidance; itself a network."""

    network: Network
    """The network, trained with and without labels; it may predict a variance too, which is not guided."""
    schedule: NoiseSchedule
    """The schedule of the training chain."""
    null_label: int
    """The label that means "no label"."""
    scale: float
    """unconditional + scale (conditional - unconditional): 1 is no guidance, 0 no label."""
    interval: tuple[float, float] | None = None
    """Guide where low < sigma <= high, sigma = sqrt((1 - alpha_bar) / alpha_bar); elsewhere the scale is 1."""
    rescale: float = 0.0
    """Share in [0, 1] by which each guided prediction is brought back to the conditional one's standard deviation."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_guidance(self.scale, self.interval, self.rescale)

    def __call__(self, x_t: Images, t: Times, label: Labels | None) -> Tensor:
        """Predict with guidance, in one call of the network.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Step index [B] in [0, T-1] of the training chain, or places between its steps.
            label: Class [B].

        Returns:
            The network's kind of answer: [B, C, H, W], or [B, 2C, H, W] with a learned variance, which is the
            conditional one's.

        Raises:
            ValueError: If there is no label.
        """
        if label is None:
            raise ValueError("label: guidance needs one class per image, got None; give labels or set the scale to 1")
        guided = self._is_guided(t)
        # Without an interval nobody looks at the values of a tensor, which would stall an accelerator.
        if self.scale == 1.0 or (self.interval is not None and not bool(guided.any())):
            return self.network(x_t, t, label)
        labels = torch.cat((label, torch.full_like(label, self.null_label)))
        answer = self.network(torch.cat((x_t, x_t)), torch.cat((t, t)), labels).to(x_t.dtype)
        conditional, unconditional = answer.chunk(2)
        channels = x_t.shape[1]
        prediction = conditional[:, :channels]
        exaggerated = unconditional[:, :channels]
        exaggerated = exaggerated + self.scale * (prediction - exaggerated)
        if self.rescale > 0:
            deviation = _standard_deviation(exaggerated).clamp(min=torch.finfo(x_t.dtype).tiny)  # 0 before training
            ratio = _standard_deviation(prediction) / deviation
            exaggerated = (self.rescale * ratio + 1 - self.rescale) * exaggerated
        prediction = torch.where(guided[:, None, None, None], exaggerated, prediction)
        return torch.cat((prediction, conditional[:, channels:]), dim=1)

    def _is_guided(self, t: Times) -> Bool[Tensor, " b"]:
        """Whether each t is within the interval."""
        if self.interval is None:
            return torch.ones_like(t, dtype=torch.bool)
        sigma = self.schedule.sigma(t)
        return (sigma > self.interval[0]) & (sigma <= self.interval[1])


def check_guidance(scale: float, interval: tuple[float, float] | None, rescale: float) -> None:
    """Refuse impossible guidance.

    Raises:
        ValueError: If the scale is negative, the interval is not ascending from at least 0, or rescale leaves [0, 1].
    """
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"guidance_scale: must be at least 0, got {scale}; 1 is no guidance")
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance_interval: must be two ascending sigmas from 0 up, got {interval}; try 0.3 and 3")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance_rescale: must be in [0, 1], got {rescale}; 0.7 is a good start")


def _standard_deviation(images: Images) -> Tensor:
    """Of each image over channels and pixels, [B, 1, 1, 1]."""
    return images.std(dim=(1, 2, 3), keepdim=True)
