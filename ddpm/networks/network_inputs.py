"""What every network of ours is called with, checked: x_t [B, C, H, W], t [B], label [B] or None."""

import torch
from torch import Tensor


def check_images(x_t: Tensor, t: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Compare the shapes of x_t and t with what the network was made for.

    Raises:
        ValueError: If x_t is not [B, *image_shape], or t not [B].
    """
    if tuple(x_t.shape[1:]) != image_shape:
        raise ValueError(f"x_t: must be [B, {', '.join(map(str, image_shape))}], got {list(x_t.shape)}")
    if t.shape != x_t.shape[:1]:
        raise ValueError(f"t: must be [B] with B = {x_t.shape[0]}, got {list(t.shape)}")


def scaled_times(t: Tensor, num_timesteps: int) -> Tensor:
    """1000 t / T, which is what is embedded: about the same noise for every length T of the chain."""
    return t if num_timesteps == 1000 else t * (1000 / num_timesteps)


def checked_label(label: Tensor | None, t: Tensor, num_classes: int | None) -> Tensor | None:
    """The label to embed.

    Args:
        label: Classes [B] in [0, num_classes], or None.
        t: The timesteps [B], for shape and device.
        num_classes: Number of classes, which is also the null label; None for a network without classes.

    Returns:
        Labels [B], the null label for None; None for a network without classes.

    Raises:
        ValueError: If the label has another shape, is given to a network without classes, or is on the CPU and out of
            range (to look at it would stall an accelerator; there the embedding fails).
    """
    if num_classes is None:
        if label is not None:
            raise ValueError("label: this network has no classes (num_classes is None), pass label=None")
        return None
    if label is None:
        return torch.full(t.shape, num_classes, dtype=torch.int64, device=t.device)
    if label.shape != t.shape:
        raise ValueError(f"label: must be [B] with B = {t.shape[0]}, got {list(label.shape)}")
    if label.device.type == "cpu" and not torch.compiler.is_compiling() and label.numel():
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > num_classes:
            raise ValueError(
                f"label: must be in [0, {num_classes}] ({num_classes} is the null label), "
                f"got {low if low < 0 else high}"
            )
    return label
