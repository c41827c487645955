"""What a sampler sees of a network: a denoiser, which answers with x_0_hat and the eps_hat that belongs to it.

A network predicts one thing (here eps); samplers need x_0_hat and eps_hat. The wrapper converts and clips, so that each
sampler is a few lines over this contract, and a later wrapper (guidance, another prediction) serves all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from ddpm.schedules import NoiseSchedule, gather

Images = Float[Tensor, "b c h w"]
Steps = Int[Tensor, " b"]
Labels = Int[Tensor, " b"]

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x_t [B, C, H, W], t int64 [B], label int64 [B] or None) -> eps_hat [B, C, H, W]."""


def predict_x_0_from_eps(schedule: NoiseSchedule, x_t: Images, t: Steps, eps: Images) -> Images:
    """The clean images that x_t and its noise imply: q_sample solved for x_0.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 4, reparametrised as in section 3.2.
    """
    alpha_bar = schedule.alpha_bar
    return gather(alpha_bar.rsqrt(), t, x_t) * x_t - gather((1 / alpha_bar - 1).sqrt(), t, x_t) * eps


def predict_eps_from_x_0(schedule: NoiseSchedule, x_t: Images, t: Steps, x_0: Images) -> Images:
    """The noise that x_t and its clean images imply: q_sample solved for eps."""
    alpha_bar = schedule.alpha_bar
    return (x_t - gather(alpha_bar.sqrt(), t, x_t) * x_0) * gather((1 - alpha_bar).rsqrt(), t, x_t)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A denoiser's answer; x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat holds between the two."""

    x_0_hat: Images
    """Predicted clean images [B, C, H, W]."""
    eps_hat: Images
    """Predicted noise, same shape."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the clean images behind x_t."""

    def __call__(self, x_t: Images, t: Steps, label: Labels | None) -> Prediction:
        """Predict; t [B] is the index in the *training* chain."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EpsDenoiser:
    """A denoiser around a network that predicts eps."""

    network: Network
    """Any callable network(x_t, t, label) -> eps_hat."""
    schedule: NoiseSchedule
    """The schedule of the training chain."""
    clip_x_0: bool = True
    """Clip x_0_hat to [-1, 1], the range of images, and re-derive eps_hat from it."""

    def __call__(self, x_t: Images, t: Steps, label: Labels | None) -> Prediction:
        """Predict the clean images and the noise.

        Re-deriving eps_hat keeps the pair consistent with x_t; without it, few-step samplers drift off the images.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Step index [B] in [0, T-1] of the training chain.
            label: Class [B], or None.

        Returns:
            x_0_hat and eps_hat in x_t's dtype, whatever the network computes in.

        Raises:
            ValueError: If the network answers with another shape than x_t's.
        """
        eps_hat = self.network(x_t, t, label).to(x_t.dtype)
        if eps_hat.shape != x_t.shape:
            raise ValueError(
                f"network: must predict eps of shape {list(x_t.shape)}, got {list(eps_hat.shape)}; check its channels"
            )
        x_0_hat = predict_x_0_from_eps(self.schedule, x_t, t, eps_hat)
        if self.clip_x_0:
            x_0_hat = x_0_hat.clamp(-1, 1)
            eps_hat = predict_eps_from_x_0(self.schedule, x_t, t, x_0_hat)
        return Prediction(x_0_hat=x_0_hat, eps_hat=eps_hat)
