"""Pixels and what the process works on: the L levels of a pixel lie equally spaced in [-1, 1]."""

from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ddpm.shapes import check_precision

NumLevels = Literal[256, 65536]
"""Values of a pixel, stored in 8 or in 16 bits."""


def images_to_x_0(images: Integer[Tensor, "b h w c"], num_levels: NumLevels = 256) -> Float[Tensor, "b c h w"]:
    """Pixels 0 .. num_levels - 1 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).to(torch.float32) / ((num_levels - 1) / 2) - 1).contiguous()


def x_0_to_images(x_0: Float[Tensor, "b c h w"], num_levels: NumLevels = 256) -> Integer[Tensor, "b h w c"]:
    """The nearest pixels [B, H, W, C] of x_0 [B, C, H, W], uint8 or uint16; what is beyond [-1, 1] is clamped.

    Raises:
        ValueError: If x_0 holds NaN, which no pixel can show, or is neither float32 nor float64.
    """
    check_precision("x_0", x_0)
    if bool(x_0.isnan().any()):
        raise ValueError("x_0: must not hold NaN, got NaN; the network has diverged, choose an earlier checkpoint")
    pixels = ((x_0 + 1) * ((num_levels - 1) / 2)).round().clamp(0, num_levels - 1)
    return pixels.to(torch.uint8 if num_levels == 256 else torch.uint16).permute(0, 2, 3, 1).contiguous()
