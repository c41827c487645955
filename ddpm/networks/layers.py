"""Building blocks of the U-Net of Ho et al. 2020: each a small module, nothing that knows the whole network.

Heads, adaptive group norm and resampling in residual blocks are of Dhariwal & Nichol 2021 (arXiv:2105.05233).

Conventions: images are [B, C, H, W]; `emb` [B, D] is the embedding of the timestep, to which that of a label may have
been added; the activation is swish (SiLU).

Three things differ between the authors' codes, and are options here (pipeline/presets.md says who has which):

- Initial weights. "glorot": as in Ho's code, variance scaling (fan_avg, uniform, scale 1), which is Glorot's uniform,
  and zero biases. "torch": PyTorch's default, as Dhariwal & Nichol have it, with variance 1 / (3 fan_in), three times
  less where a layer keeps its width, and biases that are not zero. Learning rates were chosen for one or the other.
- The eps of group norm: 1e-6 is Ho's (TensorFlow's default), 1e-5 PyTorch's default and Dhariwal & Nichol's.
- The last frequency of the embedding of t, see `sinusoidal_embedding`.

With either initial weights the last convolution of every residual block, the projection of every attention block and
the network's last convolution start at zero (Ho scales their variance by 1e-10, which is the same in effect): every
block begins as its shortcut, and the first eps_hat is 0.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

InitialWeights = Literal["glorot", "torch"]
EmbeddingDivisor = Literal["half_minus_1", "half"]
GROUP_NORM_EPS = 1e-6


def sinusoidal_embedding(
    t: Shaped[Tensor, "b"], num_channels: int, divisor: EmbeddingDivisor = "half_minus_1"
) -> Float[Tensor, "b c"]:
    """Embedding of timesteps by sines and cosines of geometrically spaced frequencies, from 1 down to about 1/10000.

    Args:
        t: Timesteps [B], integers or floats, 0-based.
        num_channels: Width of the embedding, even, at least 4.
        divisor: Frequency k of half = num_channels / 2 is 10000^(-k / divisor). half_minus_1, Ho's, ends at 1/10000;
            half, that of Vaswani et al., Dhariwal & Nichol and Peebles & Xie, one place before.

    Returns:
        Float32 [B, num_channels]: the sines of all frequencies, then the cosines. This is Ho's order; other code puts
        the cosines first, which a linear layer behind it cannot tell apart before it is trained.

    Raises:
        ValueError: If num_channels is odd or below 4.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), appendix B; Vaswani et al. 2017, section 3.5.
    """
    if num_channels < 4 or num_channels % 2:
        raise ValueError(f"num_channels: must be even and at least 4, got {num_channels}")
    half = num_channels // 2
    # float32 on purpose: published weights were trained with these roundings, and at t = 999 they reach 6e-5.
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device)
    exponent = exponent / (half - 1 if divisor == "half_minus_1" else half)
    phase = t.to(torch.float32)[:, None] * torch.exp(exponent)[None, :]
    return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    initial_weights: InitialWeights = "glorot",
    zero: bool = False,
) -> nn.Conv2d:
    """Convolution; keeps the resolution when stride is 1, pads nothing otherwise. Starts at zero where asked."""
    padding = kernel_size // 2 if stride == 1 else 0
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
    _initialise(layer, initial_weights, zero=zero)
    return layer


def linear(
    in_features: int,
    out_features: int,
    *,
    initial_weights: InitialWeights = "glorot",
    gain: float = 1.0,
    zero: bool = False,
) -> nn.Linear:
    """Linear layer; "glorot" weights are scaled by `gain`. Starts at zero where asked."""
    layer = nn.Linear(in_features, out_features)
    _initialise(layer, initial_weights, gain=gain, zero=zero)
    return layer


def _initialise(
    layer: nn.Conv2d | nn.Linear, initial_weights: InitialWeights, *, gain: float = 1.0, zero: bool = False
) -> None:
    """Changes the weights that PyTorch has given the layer, unless those are asked for."""
    assert layer.bias is not None
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    elif initial_weights == "glorot":
        nn.init.xavier_uniform_(layer.weight, gain=gain)
        nn.init.zeros_(layer.bias)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t followed by two linear layers with a swish between them."""

    def __init__(
        self,
        num_channels: int,
        out_channels: int,
        *,
        divisor: EmbeddingDivisor = "half_minus_1",
        initial_weights: InitialWeights = "glorot",
    ) -> None:
        super().__init__()
        self.num_channels, self.divisor = num_channels, divisor
        self.linear_1 = linear(num_channels, out_channels, initial_weights=initial_weights)
        self.linear_2 = linear(out_channels, out_channels, initial_weights=initial_weights)

    def forward(self, t: Shaped[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embedding [B, out_channels] of the timesteps [B]."""
        sines = sinusoidal_embedding(t, self.num_channels, self.divisor).to(self.linear_1.weight.dtype)
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
        initial_weights: Of all layers but the last, which starts at zero.
        group_norm_eps: Of both group norms.

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
        initial_weights: InitialWeights = "glorot",
        group_norm_eps: float = GROUP_NORM_EPS,
    ) -> None:
        super().__init__()
        self.adaptive, self.resample = adaptive, resample
        self.norm_1 = nn.GroupNorm(num_groups, in_channels, eps=group_norm_eps)
        self.conv_1 = conv(in_channels, out_channels, 3, initial_weights=initial_weights)
        emb_width = out_channels * (2 if adaptive else 1)
        self.emb_projection = linear(emb_channels, emb_width, initial_weights=initial_weights)
        self.norm_2 = nn.GroupNorm(num_groups, out_channels, eps=group_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(out_channels, out_channels, 3, zero=True)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else conv(in_channels, out_channels, 1, initial_weights=initial_weights)
        )

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
        initial_weights: Of query, key and value; the projection starts at zero.
        group_norm_eps: Of the group norm.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        num_groups: int,
        num_head_channels: int | None = None,
        initial_weights: InitialWeights = "glorot",
        group_norm_eps: float = GROUP_NORM_EPS,
    ) -> None:
        super().__init__()
        self.num_heads = 1 if num_head_channels is None else num_channels // num_head_channels
        self.norm = nn.GroupNorm(num_groups, num_channels, eps=group_norm_eps)
        self.query = linear(num_channels, num_channels, initial_weights=initial_weights)
        self.key = linear(num_channels, num_channels, initial_weights=initial_weights)
        self.value = linear(num_channels, num_channels, initial_weights=initial_weights)
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

    def __init__(self, num_channels: int, initial_weights: InitialWeights = "glorot") -> None:
        super().__init__()
        self.conv = conv(num_channels, num_channels, 3, stride=2, initial_weights=initial_weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Images of half the resolution.

        Zeros are added at the right and at the bottom only, as TensorFlow's "SAME" does for an even size; PyTorch's
        `padding=1` would add them on all sides and shift the result by one pixel.
        """
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """Doubles the resolution: each pixel becomes 2x2 equal ones, then a 3x3 convolution."""

    def __init__(self, num_channels: int, initial_weights: InitialWeights = "glorot") -> None:
        super().__init__()
        self.conv = conv(num_channels, num_channels, 3, initial_weights=initial_weights)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Images of twice the resolution."""
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h
