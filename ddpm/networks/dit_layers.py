"""Building blocks of the DiT: patches and back, where a patch is, the block with adaLN-Zero, the final layer.

Conventions: tokens are [B, N, D], one per patch, row by row from the top left; `emb` [B, D] is the embedding of the
timestep, to which that of a label may have been added. Layer norms have eps 1e-6 and no weights of their own: scale and
shift come from `emb`, through a linear layer that starts at zero.

Source:
    Peebles & Xie 2023 (arXiv:2212.09748), section 3.2 and figure 3; places as in Vaswani et al. 2017, section 3.5, one
    half of the channels for each coordinate.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddpm.networks.layers import attend, linear

Tokens = Float[Tensor, "b n d"]
Embedding = Float[Tensor, "b d"]


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n p"]:
    """Patches [B, N, C * patch_size^2] of images whose sides are multiples of patch_size; `unpatchify` undoes it."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch_size**2)


def unpatchify(patches: Float[Tensor, "b n p"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "b c h w"]:
    """The images [B, C, H, W] that patches [B, N, C * patch_size^2] make up, grid[0] down and grid[1] across."""
    down, across = grid
    cut = patches.reshape(len(patches), down, across, -1, patch_size, patch_size)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, down * patch_size, across * patch_size)


def position_embedding(grid: tuple[int, int], width: int) -> Float[Tensor, "n d"]:
    """Fixed embedding of the places in a grid.

    Args:
        grid: Patches down and across.
        width: Width of a token, a multiple of 4.

    Returns:
        Float32 [N, width], row by row: the sines then the cosines of the column, then those of the row, at
        width / 4 frequencies from 1 down to almost 1/10000.
    """
    quarter = width // 4
    frequencies = torch.exp(-math.log(10_000) / quarter * torch.arange(quarter, dtype=torch.float64))
    down, across = grid
    phases = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([torch.sin(phases), torch.cos(phases)], dim=1)  # [the longer side, width / 2]
    columns, rows = line[:across].repeat(down, 1), line[:down].repeat_interleave(across, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class AdaptiveLayerNorm(nn.Module):
    """Layer norm without weights, then h (1 + scale) + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def forward(self, tokens: Tokens, shift: Embedding, scale: Embedding) -> Tokens:
        """Tokens of the same shape."""
        return cast(Tensor, self.norm(tokens)) * (1 + scale[:, None]) + shift[:, None]


# The authors draw query, key and value as one matrix of D to 3 D, so that Glorot's variance is 2 / (D + 3 D): half that
# of three square matrices, 2 / (D + D).
_QKV_GAIN = math.sqrt(1 / 2)


class SelfAttention(nn.Module):
    """Attention of the tokens to each other."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = linear(width, width, gain=_QKV_GAIN)
        self.key = linear(width, width, gain=_QKV_GAIN)
        self.value = linear(width, width, gain=_QKV_GAIN)
        self.projection = linear(width, width)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens of the same shape."""
        h = attend(self.query(tokens), self.key(tokens), self.value(tokens), self.num_heads)
        return cast(Tensor, self.projection(h))


class DiTBlock(nn.Module):
    """Attention, then two linear layers with a GELU between them; each normed, gated and added to its input."""

    def __init__(self, width: int, *, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.emb_projection = linear(width, 6 * width, zero=True)
        self.norm_1 = AdaptiveLayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.norm_2 = AdaptiveLayerNorm(width)
        self.mlp_1 = linear(width, mlp_width)
        self.mlp_2 = linear(mlp_width, width)

    def forward(self, tokens: Tokens, emb: Embedding) -> Tokens:
        """Tokens of the same shape; the same tokens as long as the gates are zero."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.emb_projection(F.silu(emb)).chunk(6, dim=1)
        tokens = tokens + gate_1[:, None] * self.attention(self.norm_1(tokens, shift_1, scale_1))
        h = F.gelu(self.mlp_1(self.norm_2(tokens, shift_2, scale_2)), approximate="tanh")
        return tokens + cast(Tensor, gate_2[:, None] * self.mlp_2(h))


class FinalLayer(nn.Module):
    """From tokens to patches of the prediction: an adaptive layer norm and a linear layer that starts at zero."""

    def __init__(self, width: int, patch_width: int) -> None:
        super().__init__()
        self.emb_projection = linear(width, 2 * width, zero=True)
        self.norm = AdaptiveLayerNorm(width)
        self.projection = linear(width, patch_width, zero=True)

    def forward(self, tokens: Tokens, emb: Embedding) -> Float[Tensor, "b n p"]:
        """Patches [B, N, patch_width]."""
        shift, scale = self.emb_projection(F.silu(emb)).chunk(2, dim=1)
        return cast(Tensor, self.projection(self.norm(tokens, shift, scale)))
