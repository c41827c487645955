"""Building blocks of the U-Net of Ho et al. 2020: each a small module, nothing that knows the whole network.

Heads, adaptive group norm and resampling in residual blocks are of Dhariwal & Nichol 2021 (arXiv:2105.05233).

Conventions: images are [B, C, H, W]; `emb` [B, D] is the embedding of the timestep, to which that of a label may have
been added; group norm has eps 1e-6, the activation is swish (SiLU).

Weights start as in Ho's code: variance scaling (fan_avg, uniform, scale 1), which is Glorot's uniform, and zero biases.
PyTorch's default for both layers has variance 1 / (3 fan_in), three times less, and biases that are not zero; the
paper's learning rates were chosen for the former. The last convolution of every residual block, the projection of every
attention block and the network's last convolution start at zero (Ho scales their variance by 1e-10, which is the same
in effect): every block begins as its shortcut, and the first eps_hat is 0.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

GROUP_NORM_EPS = 1e-6  # Ho's; PyTorch's default is 1e-5


def sinusoidal_embedding(t: Shaped[Tensor, "b"], num_channels: int) -> Float[Tensor, "b c"]:
    """Embedding of timesteps by sines and cosines of geometrically spaced frequencies, from 1 down to 1/10000.

    Args:
        t: Timesteps [B], integers or floats, 0-based.
        num_channels: Width of the embedding, even, at least 4.

    Returns:
        Float32 [B, num_channels]: the sines of all frequencies, then the cosines. Both the order and the divisor
        `half - 1` (the last frequency is 1/10000) are Ho's; other code puts cosines first and divides by `half`.

    Raises:
        ValueError: If num_channels is odd or below 4.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), appendix B; Vaswani et al. 2017, section 3.5.
    """
    if num_channels < 4 or num_channels % 2:
        raise ValueError(f"num_channels: must be even and at least 4, got {num_channels}")
    half = num_channels // 2
    # float32 on purpose: published weights were trained with these roundings, and at t = 999 they reach 6e-5.
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    phase = t.to(torch.float32)[:, None] * torch.exp(exponent)[None, :]
    return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


def group_norm(num_groups: int, num_channels: int) -> nn.GroupNorm:
    """Group norm with Ho's eps."""
    return nn.GroupNorm(num_groups, num_channels, eps=GROUP_NORM_EPS)


def conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, zero: bool = False) -> nn.Conv2d:
    """Convolution with Ho's initial weights; keeps the resolution when stride is 1, pads nothing otherwise."""
    padding = kernel_size // 2 if stride == 1 else 0
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
    _initialise(layer, zero=zero)
    return layer


def linear(in_features: int, out_features: int, *, zero: bool = False) -> nn.Linear:
    """Linear layer with Ho's initial weights."""
    layer = nn.Linear(in_features, out_features)
    _initialise(layer, zero=zero)
    return layer


def _initialise(layer: nn.Conv2d | nn.Linear, *, zero: bool) -> None:
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t followed by two linear layers with a swish between them."""

    def __init__(self, num_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.linear_1 = linear(num_channels, out_channels)
        self.linear_2 = linear(out_channels, out_channels)

    def forward(self, t: Shaped[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embedding [B, out_channels] of the timesteps [B]."""
        sines = sinusoidal_embedding(t, self.num_channels).to(self.linear_1.weight.dtype)
        emb: Tensor = self.linear_2(F.silu(self.linear_1(sines)))
        return emb


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding let in between them, beside a shortcut (1x1 when the width changes).

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        emb_channels: Width of the embedding.
        num_groups: Groups of both group norms; divides both widths.
        dropout: Probability of dropping an activation before the second convolution, in training only.
        adaptive: Let the embedding scale and shift what the second group norm gives, h (1 + scale) + shift, instead of
            adding it before that norm.
        resample: Halve or double the resolution of both branches, before the first convolution: by the mean of 2x2
            pixels, or by repeating them.

    Source:
        Ho et al. 2020; Dhariwal & Nichol 2021, section 3 (adaptive group norm; resampling after BigGAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        num_groups: int,
        dropout: float,
        adaptive: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.adaptive, self.resample = adaptive, resample
        self.norm_1 = group_norm(num_groups, in_channels)
        self.conv_1 = conv(in_channels, out_channels, 3)
        self.emb_projection = linear(emb_channels, out_channels * (2 if adaptive else 1))
        self.norm_2 = group_norm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(out_channels, out_channels, 3, zero=True)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c_in h w"], emb: Float[Tensor, "b d"]) -> Float[Tensor, "b c_out h2 w2"]:
        """Images out_channels wide, of the same resolution unless the block resamples."""
        h: Tensor = self.conv_1(self._resampled(F.silu(self.norm_1(x))))
        from_emb: Tensor = self.emb_projection(F.silu(emb))[:, :, None, None]
        if self.adaptive:
            scale, shift = from_emb.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + from_emb)
        h = self.conv_2(self.dropout(F.silu(h)))
        shortcut: Tensor = self.shortcut(self._resampled(x))
        return shortcut + h

    def _resampled(self, x: Tensor) -> Tensor:
        match self.resample:
            case "down":
                return F.avg_pool2d(x, 2)
            case "up":
                return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, added to its input.

    Args:
        num_channels: Width of the images.
        num_groups: Groups of the group norm before it.
        num_head_channels: Width of a head, a divisor of num_channels; None for one head as wide as the images.
    """

    def __init__(self, num_channels: int, *, num_groups: int, num_head_channels: int | None = None) -> None:
        super().__init__()
        self.num_heads = 1 if num_head_channels is None else num_channels // num_head_channels
        self.norm = group_norm(num_groups, num_channels)
        self.query = linear(num_channels, num_channels)
        self.key = linear(num_channels, num_channels)
        self.value = linear(num_channels, num_channels)
        self.projection = linear(num_channels, num_channels, zero=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Images of the same shape."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H * W, C]
        h = attend(self.query(pixels), self.key(pixels), self.value(pixels), self.num_heads)
        h = self.projection(h).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + h
        return out


def attend(
    query: Float[Tensor, "b n c"], key: Float[Tensor, "b n c"], value: Float[Tensor, "b n c"], num_heads: int
) -> Float[Tensor, "b n c"]:
    """Attention of N positions to each other, in num_heads heads: consecutive channels make up a head."""
    batch, length, width = query.shape
    by_head = (batch, length, num_heads, width // num_heads)
    query, key, value = (one.reshape(by_head).transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """Halves the resolution by a 3x3 convolution of stride 2."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = conv(num_channels, num_channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Images of half the resolution.

        Zeros are added at the right and at the bottom only, as TensorFlow's "SAME" does for an even size; PyTorch's
        `padding=1` would add them on all sides and shift the result by one pixel.
        """
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """Doubles the resolution: each pixel becomes 2x2 equal ones, then a 3x3 convolution."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = conv(num_channels, num_channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Images of twice the resolution."""
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h
