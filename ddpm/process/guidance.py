"""Guidance: a network that exaggerates in what another network's answer differs from a weaker one's.

    guided = weak + scale (network - weak)

Without a guide the weak answer is the network's own without the label (classifier-free guidance): one call with a batch
twice as large. With a guide it is that of a second, less able network, told the same label (autoguidance): one call of
each. One wrapper around a network, so that every sampler can be guided. Without rescaling it does not matter whether
eps, x_0 or v is predicted, since each is an affine function of another and the two weights sum to 1; a guide that
predicts another of them is converted. Rescaling keeps the standard deviation of what the network predicts, as in Lin et
al., and does differ: that of eps, of x_0 and of v are three things. Clipping follows, in the denoiser.

Source:
    Ho and Salimans 2022 (arXiv:2207.12598), whose w is our scale - 1. Karras et al. 2024 (arXiv:2406.02507) for
    autoguidance, whose w is our scale. Kynkäänniemi et al. 2024 (arXiv:2404.07724) for the interval. Lin et al. 2023
    (arXiv:2305.08891), section 3.4, for the rescaling.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from ddpm.process.denoiser import MovesT, Network
from ddpm.process.prediction import PredictionType, check_prediction_type, predict_x_0_and_eps, prediction_target
from ddpm.process.schedules import NoiseSchedule
from ddpm.shapes import Images, Labels, Times


@runtime_checkable
class Guide(Protocol):
    """A model to lead away from: smaller, or trained for less long, than the one that is guided, on the same data."""

    @property
    def network(self) -> Network:
        """Its network, for the same images and classes."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of its training chain, which must be that of the network that is guided."""

    @property
    def prediction_type(self) -> PredictionType:
        """What it predicts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedNetwork:
    """A network with guidance; itself a network."""

    network: Network
    """The network, trained with and without labels if there is no guide; a variance that it predicts is not guided."""
    schedule: NoiseSchedule
    """The schedule of the training chain."""
    null_label: int | None = None
    """The label that means "no label"; without a guide it is needed, with one it is not used."""
    guide: Guide | None = None
    """The weaker model; None leads away from "no label" instead."""
    prediction_type: PredictionType = "eps"
    """What the network predicts, and so what a guide's answer is converted to."""
    scale: float
    """weak + scale (network - weak): 1 is no guidance, 0 the weak answer."""
    interval: tuple[float, float] | None = None
    """Guide where low < sigma <= high, sigma = sqrt((1 - alpha_bar) / alpha_bar); elsewhere the scale is 1."""
    rescale: float = 0.0
    """Share in [0, 1] by which each guided prediction is brought back to the network's own standard deviation."""

    def __post_init__(self) -> None:
        """Refuse impossible values, and a guide that knows another chain."""
        check_guidance(self.scale, self.interval, self.rescale)
        if self.guide is None:
            if self.null_label is None:
                raise ValueError(
                    f"guidance_scale: needs a network trained with a null label, got {self.scale} without; set it to "
                    "1, train with label_drop, or give a guide"
                )
            return
        check_prediction_type(self.guide.prediction_type, self.schedule)
        ours, theirs = self.schedule.alpha_bar, self.guide.schedule.alpha_bar
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise ValueError(
                f"guide: must be trained on the network's noise schedule ({_describe(ours)}), got {_describe(theirs)}; "
                "choose another guide"
            )

    def __call__(self, x_t: Images, t: Times, label: Labels | None) -> Tensor:
        """Predict with guidance.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Step index [B] in [0, T-1] of the training chain, or places between its steps; where the network takes
                it, which may be the CPU: there nothing waits to see whether it is in the interval.
            label: Class [B]; with a guide, None where the networks take none.

        Returns:
            The network's kind of answer: [B, C, H, W], or [B, 2C, H, W] with a learned variance, which is the
            network's own with the label.

        Raises:
            ValueError: If there is neither a label nor a guide, or the guide answers with another shape.
        """
        if label is None and self.guide is None:
            raise ValueError("label: guidance needs one class per image, got None; give labels or set the scale to 1")
        guided = self._is_guided(t)
        # A sampler's t is on the CPU: to look at it does not stall an accelerator.
        if self.scale == 1.0 or (guided is not None and not bool(guided.any())):
            return self.network(x_t, t, label)
        answer, weak = self._two_answers(x_t, t, label)
        channels = x_t.shape[1]
        prediction, exaggerated = answer[:, :channels], weak[:, :channels]
        exaggerated = exaggerated + self.scale * (prediction - exaggerated)
        if self.rescale > 0:
            deviation = _standard_deviation(exaggerated).clamp(min=torch.finfo(x_t.dtype).tiny)  # 0 before training
            ratio = _standard_deviation(prediction) / deviation
            exaggerated = (self.rescale * ratio + 1 - self.rescale) * exaggerated
        if guided is not None:
            inside = guided.to(x_t.device, non_blocking=True)[:, None, None, None]
            exaggerated = torch.where(inside, exaggerated, prediction)
        return torch.cat((exaggerated, answer[:, channels:]), dim=1)

    def _two_answers(self, x_t: Images, t: Times, label: Labels | None) -> tuple[Tensor, Tensor]:
        """The network's answer and the weak one, of the same kind, in x_t's dtype."""
        if self.guide is None:
            assert label is not None and self.null_label is not None
            labels = torch.cat((label, torch.full_like(label, self.null_label)))
            both = self.network(torch.cat((x_t, x_t)), torch.cat((t, t)), labels).to(x_t.dtype)
            answer, weak = both.chunk(2)
            return answer, weak
        answer = self.network(x_t, t, label).to(x_t.dtype)
        weak = MovesT(self.guide.network)(x_t, t, label).to(x_t.dtype)
        weak = weak[:, : x_t.shape[1]]  # its variance, if any, left out
        if weak.shape != x_t.shape:
            raise ValueError(
                f"guide: must predict {self.guide.prediction_type} of shape {list(x_t.shape)}, got {list(weak.shape)}; "
                "choose one for the same images"
            )
        if self.guide.prediction_type != self.prediction_type:
            x_0_hat, eps_hat = predict_x_0_and_eps(self.schedule, x_t, t, weak, self.guide.prediction_type)
            weak = prediction_target(self.schedule, x_0_hat, t, eps_hat, self.prediction_type)
        return answer, weak

    def _is_guided(self, t: Times) -> Bool[Tensor, " b"] | None:
        """Whether each t is within the interval; None where there is none."""
        if self.interval is None:
            return None
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


def _describe(alpha_bar: Tensor) -> str:
    """A schedule in a few words, for a message."""
    return f"{len(alpha_bar)} steps, alpha_bar {float(alpha_bar[0]):.6g} to {float(alpha_bar[-1]):.3g}"


def _standard_deviation(images: Images) -> Tensor:
    """Of each image over channels and pixels, [B, 1, 1, 1]."""
    return images.std(dim=(1, 2, 3), keepdim=True)
