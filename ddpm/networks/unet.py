"""The U-Net of Ho et al. 2020, predicting the noise eps, or x_0 or v, from x_t; optionally told the class of the image.

With base_channels 128, multipliers (1, 2, 2, 2) and attention at 16 it is the paper's CIFAR-10 network: 35,746,307
parameters for 32-pixel colour images; with (1, 1, 2, 2, 4, 4) its 256-pixel network: 113,673,219. Without classes there
are no label parameters. Labels are not in the paper: one vector per class, added to the embedding of the timestep.
Heads in attention, adaptive group norm and resampling inside residual blocks are those of Dhariwal & Nichol 2021, off
unless asked for; so are the initial weights, the eps of group norm and the frequencies of the embedding of t that their
code has. `imagenet64` in pipeline/presets.py is their network with all of it.

The first base_channels wide convolution, each block and each downsampling on the way down are concatenated, last first,
to the inputs of the blocks on the way up.

Not here: the noise schedule, clipping of x_0 and guidance, which wrap a network.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddpm.added_field import added_field
from ddpm.networks.layers import (
    AttentionBlock,
    Downsample,
    EmbeddingDivisor,
    InitialWeights,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    conv,
)
from ddpm.networks.network_config import ImageSize, NetworkConfig, check_one_of
from ddpm.networks.network_inputs import check_images, checked_label, scaled_times
from ddpm.networks.unet_levels import DownLevel, Middle, UpLevel
from ddpm.shapes import Images, Labels, Times


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig(NetworkConfig):
    """Shape of the U-Net; the defaults are the CIFAR-10 network of Ho et al. 2020."""

    name: Literal["unet"] = "unet"
    """The U-Net of Ho et al., or of Dhariwal & Nichol."""
    base_channels: int = 128
    """Channels at the full resolution; even, and a multiple of num_groups."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level in units of base_channels; every level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; there is one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Resolutions (pixels, the shorter side's) of the levels with attention after each residual block; the middle
    always has it."""
    dropout: float = 0.1
    """Probability of dropping an activation before a block's last convolution, in training only."""
    num_groups: int = 32
    """Groups of every group norm; divides base_channels."""
    num_head_channels: int | None = None
    """Channels of an attention head; divides the width of each level with attention and of the last. None: one head."""
    adaptive_group_norm: bool = False
    """Let timestep and class scale and shift what a block's second group norm gives, instead of adding before it."""
    residual_resampling: bool = False
    """Halve and double the resolution inside residual blocks, as in BigGAN, instead of by lone convolutions."""
    initial_weights: InitialWeights = added_field(default="glorot", pin="glorot")
    """glorot: Ho's, Glorot's uniform and zero biases. torch: PyTorch's default, which is Dhariwal & Nichol's. With both
    the last layer of each block and of the network starts at zero."""
    group_norm_eps: float = added_field(default=1e-6, pin=1e-6)
    """Added to the variance in every group norm: Ho's 1e-6; PyTorch's, and Dhariwal & Nichol's, is 1e-5."""
    embedding_divisor: EmbeddingDivisor = added_field(default="half_minus_1", pin="half_minus_1")
    """Frequencies of the embedding of t. half_minus_1: Ho's, from 1 down to 1/10000. half: Dhariwal & Nichol's."""

    def check(self) -> None:
        """See NetworkConfig.check; `level_resolutions` has the rules that depend on the size of the images."""
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(f"base_channels: must be even and at least 4, got {self.base_channels}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                "channel_multipliers: must be one positive integer per level, "
                f"got {self.channel_multipliers}; the paper's CIFAR-10 network has (1, 2, 2, 2)"
            )
        if self.num_res_blocks < 1:
            raise ValueError(f"num_res_blocks: must be at least 1, got {self.num_res_blocks}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: must be at least 0 and below 1, got {self.dropout}")
        if self.num_groups < 1 or self.base_channels % self.num_groups:
            raise ValueError(
                f"num_groups: must divide base_channels ({self.base_channels}), got {self.num_groups}; choose a divisor"
            )
        if self.num_head_channels is not None and self.num_head_channels < 1:
            raise ValueError(
                f"num_head_channels: must be at least 1, got {self.num_head_channels}; leave it out for one head"
            )
        check_one_of("initial_weights", self.initial_weights, InitialWeights)
        check_one_of("embedding_divisor", self.embedding_divisor, EmbeddingDivisor)
        if not 0 < self.group_norm_eps < 1:
            raise ValueError(f"group_norm_eps: must be in (0, 1), got {self.group_norm_eps}; 1e-6 or 1e-5 is usual")

    def check_fits(self, image_size: ImageSize) -> None:
        """See NetworkConfig.check_fits."""
        level_resolutions(self, image_size)

    def build(self, *, image_size: ImageSize, channels: int, num_classes: int | None, num_timesteps: int) -> nn.Module:
        """See NetworkConfig.build."""
        return UNet(
            self, image_size=image_size, channels=channels, num_classes=num_classes, num_timesteps=num_timesteps
        )


def level_resolutions(config: UNetConfig, image_size: ImageSize) -> tuple[int, ...]:
    """Resolution in pixels of every level, the full one first.

    Args:
        config: Shape of the network.
        image_size: Height and width of the images in pixels.

    Returns:
        The shorter side of the images at each entry of channel_multipliers.

    Raises:
        ValueError: If a side cannot be halved that often, attention is asked for where there is no level, or its
            heads do not divide a level's width.
    """
    num_halvings = len(config.channel_multipliers) - 1
    for side in image_size:
        if side < 1 or side % 2**num_halvings:
            raise ValueError(
                f"image_size: must be a multiple of {2**num_halvings} for {num_halvings + 1} levels, got {side}; "
                "resize the images or give fewer channel_multipliers"
            )
    resolutions = tuple(min(image_size) // 2**level for level in range(num_halvings + 1))
    strangers = sorted(set(config.attention_resolutions) - set(resolutions))
    if strangers:
        raise ValueError(
            f"network.attention_resolutions: must be among {list(resolutions)}, the levels of {min(image_size)}-pixel "
            f"images, got {strangers[0]}; choose among them, or none for attention in the middle only"
        )
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    attentive = {width for width, here in zip(widths, resolutions) if here in config.attention_resolutions}
    undivided = [width for width in sorted({*attentive, widths[-1]}) if width % (config.num_head_channels or width)]
    if undivided:
        raise ValueError(
            f"network.num_head_channels: must divide {undivided[0]}, the width of a level with attention, "
            f"got {config.num_head_channels}; choose a divisor, or leave it out for one head"
        )
    return resolutions


class UNet(nn.Module):
    """The network eps_theta(x_t, t, label).

    Args:
        config: Shape of the network.
        image_size: Height and width of the images in pixels.
        channels: Channels of the images.
        num_classes: Number of classes, or None for a network without label parameters. With classes there is one more
            embedding, the last, for "no label": see `null_label`.
        num_timesteps: Length T of the training chain; 1000 t / T is embedded: about the same noise for every T.

    Raises:
        ValueError: If the images do not fit the config (see `level_resolutions`).

    Initial weights come from PyTorch's global generator, as in every `nn.Module`; `build_model` seeds them.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        image_size: ImageSize,
        channels: int,
        num_classes: int | None,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        resolutions = level_resolutions(config, image_size)
        self.image_shape = (channels, *image_size)
        self.num_classes, self.num_timesteps = num_classes, num_timesteps
        self.gradient_checkpointing = False
        emb_channels = 4 * config.base_channels
        initial, eps = config.initial_weights, config.group_norm_eps
        res_block = partial(
            ResidualBlock,
            emb_channels=emb_channels,
            num_groups=config.num_groups,
            dropout=config.dropout,
            adaptive=config.adaptive_group_norm,
            initial_weights=initial,
            group_norm_eps=eps,
        )
        conv_down, conv_up = (partial(kind, initial_weights=initial) for kind in (Downsample, Upsample))
        down = (lambda width: res_block(width, width, resample="down")) if config.residual_resampling else conv_down
        up = (lambda width: res_block(width, width, resample="up")) if config.residual_resampling else conv_up
        attention = partial(
            AttentionBlock,
            num_groups=config.num_groups,
            num_head_channels=config.num_head_channels,
            initial_weights=initial,
            group_norm_eps=eps,
        )
        attention_at = [attention if here in config.attention_resolutions else None for here in resolutions]
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1

        self.time_embedding = TimeEmbedding(
            config.base_channels, emb_channels, divisor=config.embedding_divisor, initial_weights=initial
        )
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, emb_channels)
        self.conv_in = conv(channels, config.base_channels, 3, initial_weights=initial)
        self.down_levels = nn.ModuleList()
        skip_widths = [config.base_channels]  # of everything that the way down hands to the way up
        for level, width in enumerate(widths):
            down_level = DownLevel(
                skip_widths[-1],
                width,
                config.num_res_blocks,
                res_block=res_block,
                attention=attention_at[level],
                downsample=down if level < last else None,
            )
            self.down_levels.append(down_level)
            skip_widths += [width] * (config.num_res_blocks + (level < last))
        self.middle = Middle(widths[-1], res_block=res_block, attention=attention)
        self.up_levels = nn.ModuleList()  # the lowest resolution first: the order in which they run
        below = widths[-1]
        for level in reversed(range(len(widths))):
            up_level = UpLevel(
                below,
                [skip_widths.pop() for _ in range(config.num_res_blocks + 1)],
                widths[level],
                res_block=res_block,
                attention=attention_at[level],
                upsample=up if level > 0 else None,
            )
            self.up_levels.append(up_level)
            below = widths[level]
        self.norm_out = nn.GroupNorm(config.num_groups, below, eps=eps)
        self.conv_out = conv(below, channels * (2 if config.learned_variance else 1), 3, zero=True)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label" (index num_classes), or None for a network without classes."""
        return self.num_classes

    def forward(self, x_t: Images, t: Times, label: Labels | None = None) -> Float[Tensor, "b c_out h w"]:
        """Predicts the noise in x_t, or whatever else it is trained to predict.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Index in the training chain [B], 0-based (t = 0 is the paper's t = 1), or floats between two of them.
            label: Classes [B] in [0, num_classes]; num_classes is the null label, and None means that for every image.

        Returns:
            eps_hat [B, C, H, W]; [B, 2C, H, W] with a learned variance.

        Raises:
            ValueError: If x_t, t or label has another shape, a label is given to a network without classes, or a label
                on the CPU is out of range (to look at it would stall an accelerator; there the embedding fails).
        """
        check_images(x_t, t, self.image_shape)
        recompute = self.gradient_checkpointing
        emb: Tensor = self._embedding(t, label)
        h = self.conv_in(x_t)
        skips = [h]
        for down_level in self.down_levels:
            skips += down_level(skips[-1], emb, recompute=recompute)
        h = self.middle(skips[-1], emb, recompute=recompute)
        for up_level in self.up_levels:
            h = up_level(h, skips, emb, recompute=recompute)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))

    def _embedding(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Embedding of the timestep plus, in a network with classes, of the label."""
        emb: Tensor = self.time_embedding(scaled_times(t, self.num_timesteps))
        label = checked_label(label, t, self.num_classes)
        return emb if self.label_embedding is None else emb + cast(Tensor, self.label_embedding(label))
