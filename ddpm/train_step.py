"""Algorithm 1 of Ho et al.: noise a batch at random steps and compare the network's prediction with that noise.

Every random number is a function of (seed, sample id, epoch), so a sample is noised alike on whichever rank reads it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ddpm.denoiser import Images, Labels, Network, Steps
from ddpm.diffusion import q_sample
from ddpm.losses import simple_loss
from ddpm.noise import Stream, bernoulli, random_integers, standard_normal
from ddpm.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """What the network sees in a training step, and the answer."""

    x_t: Images
    """Noised images [B, C, H, W]."""
    t: Steps
    """Step index [B] in [0, T-1]."""
    eps: Images
    """The noise to predict, same shape as x_t."""
    label: Labels | None
    """Class [B], where some may be the null label; None for an unconditional network."""


def make_training_batch(
    schedule: NoiseSchedule,
    x_0: Images,
    label: Labels | None,
    *,
    seed: int,
    sample_ids: Int[Tensor, " b"],
    epochs: Int[Tensor, " b"],
    flip: bool,
    label_drop: float,
    null_label: int | None,
) -> TrainingBatch:
    """Draw t, eps, the flip and the label drop of each sample, and noise it.

    Args:
        schedule: The training chain.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        label: Class [B], or None.
        seed: Key of the run, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), on x_0's device.
        epochs: How often each sample was seen before [B], on x_0's device.
        flip: Mirror each image left to right with probability 1/2.
        label_drop: Probability with which a label becomes the null label (classifier-free guidance).
        null_label: The null label; needed when label_drop > 0.

    Raises:
        ValueError: If label_drop is outside [0, 1], or above 0 without a label and a null label; as q_sample.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 1, lines 2-4. Label drop: Ho and Salimans 2022 (arXiv:2207.12598).
    """
    t = random_integers(seed, Stream.TRAIN_T, sample_ids, epochs, schedule.num_timesteps)
    eps = standard_normal(seed, Stream.TRAIN_EPS, sample_ids, epochs, x_0.shape[1:], x_0.dtype)
    if flip:
        flipped = bernoulli(seed, Stream.TRAIN_FLIP, sample_ids, epochs, 0.5)
        x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
    if label_drop != 0:
        if label is None or null_label is None:
            raise ValueError(f"label_drop: needs labels and a null label, got {label_drop} without; set it to 0")
        dropped = bernoulli(seed, Stream.TRAIN_LABEL_DROP, sample_ids, epochs, label_drop)
        label = torch.where(dropped, null_label, label)
    return TrainingBatch(x_t=q_sample(schedule, x_0, t, eps), t=t, eps=eps, label=label)


def per_sample_loss(model: Network, batch: TrainingBatch) -> Float[Tensor, " b"]:
    """L_simple of each sample [B], with gradient; the caller averages over the global batch.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 1, line 5.
    """
    return simple_loss(batch.eps, model(batch.x_t, batch.t, batch.label).to(batch.eps.dtype))


def images_to_x_0(images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1).contiguous()


def x_0_to_images(x_0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
    """The nearest pixels 0..255 [B, H, W, C] of x_0 [B, C, H, W]; what is beyond [-1, 1] is clamped.

    Raises:
        ValueError: If x_0 holds NaN, which no pixel can show.
    """
    if bool(x_0.isnan().any()):
        raise ValueError("x_0: must not hold NaN, got NaN; the network has diverged, choose an earlier checkpoint")
    pixels = ((x_0 + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
