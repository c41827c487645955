"""Names for the tensors that the functions of this package take and return, and the precision that measuring needs."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "b c h w"]
"""Images, noise, or a network's prediction of either, [B, C, H, W]."""
PerSample = Float[Tensor, "b 1 1 1"]
"""One number per image, shaped to multiply images."""
Steps = Int[Tensor, " b"]
"""Index into a chain's tables, 0-based: t = 0 is the paper's t = 1."""
Times = Int[Tensor, " b"] | Float[Tensor, " b"]
"""Index into the training chain, or a place between two of its steps (float64)."""
Labels = Int[Tensor, " b"]
"""Class of each image."""


def check_precision(name: str, tensor: Tensor) -> None:
    """Refuse numbers with so few digits that what is measured of them would be wrong.

    A level of 8 bits and the noise at t = 0 are both near 0.01, and bfloat16 leaves 0.004 between two numbers near 1:
    bits per dimension come out wrong in the second digit. What was rounded away no cast brings back.

    Raises:
        ValueError: If the tensor is neither float32 nor float64.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        given = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: must be float32 or float64, got {given}; keep images in float32, the network may compute in less"
        )
