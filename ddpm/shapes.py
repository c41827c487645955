"""Names for the tensors that the functions of this package take and return."""

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
