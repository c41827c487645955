"""The levels of the U-Net: everything at one resolution on the way down, in the middle, and on the way up.

Each runs its blocks one by one, and keeps only their inputs where `recompute` says so (see gradient_checkpointing).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ddpm.networks.gradient_checkpointing import run_block
from ddpm.networks.layers import AttentionBlock, ResidualBlock

MakeResidualBlock = Callable[[int, int], ResidualBlock]  # (in_channels, out_channels)
MakeAttentionBlock = Callable[[int], AttentionBlock]  # (num_channels)
MakeResampling = Callable[[int], nn.Module]  # (num_channels)


class DownLevel(nn.Module):
    """Residual blocks of one resolution on the way down, with attention after each where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        res_block: MakeResidualBlock,
        attention: MakeAttentionBlock | None,
        downsample: MakeResampling | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res_blocks = nn.ModuleList(res_block(*pair) for pair in itertools.pairwise(widths))
        self.attentions = nn.ModuleList(attention(out_channels) for _ in range(num_blocks) if attention is not None)
        self.downsample = None if downsample is None else downsample(out_channels)

    def forward(self, h: Tensor, emb: Tensor, *, recompute: bool) -> list[Tensor]:
        """The output of each block, and of the downsampling if there is one: what the way up will concatenate."""
        outputs = []
        for index in range(len(self.res_blocks)):
            h = run_block(partial(self._block, index), h, emb, recompute=recompute)
            outputs.append(h)
        if self.downsample is not None:
            outputs.append(run_block(partial(_resample, self.downsample), h, emb, recompute=recompute))
        return outputs

    def _block(self, index: int, h: Tensor, emb: Tensor) -> Tensor:
        h = self.res_blocks[index](h, emb)
        return self.attentions[index](h) if self.attentions else h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, num_channels: int, *, res_block: MakeResidualBlock, attention: MakeAttentionBlock) -> None:
        super().__init__()
        self.res_block_1 = res_block(num_channels, num_channels)
        self.attention = attention(num_channels)
        self.res_block_2 = res_block(num_channels, num_channels)

    def forward(self, h: Tensor, emb: Tensor, *, recompute: bool) -> Tensor:
        """Images of the same shape."""
        return run_block(self._blocks, h, emb, recompute=recompute)

    def _blocks(self, h: Tensor, emb: Tensor) -> Tensor:
        return cast(Tensor, self.res_block_2(self.attention(self.res_block_1(h, emb)), emb))


class UpLevel(nn.Module):
    """Residual blocks of one resolution on the way up, each fed what a block on the way down made as well."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        *,
        res_block: MakeResidualBlock,
        attention: MakeAttentionBlock | None,
        upsample: MakeResampling | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.res_blocks = nn.ModuleList(
            res_block(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(attention(out_channels) for _ in skip_channels if attention is not None)
        self.upsample = None if upsample is None else upsample(out_channels)

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor, *, recompute: bool) -> Tensor:
        """Consumes `skips` from its end, one per block; twice the resolution if there is an upsampling."""
        for index in range(len(self.res_blocks)):
            h = run_block(partial(self._block, index), h, skips.pop(), emb, recompute=recompute)
        return h if self.upsample is None else run_block(partial(_resample, self.upsample), h, emb, recompute=recompute)

    def _block(self, index: int, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        h = self.res_blocks[index](torch.cat([h, skip], dim=1), emb)
        return self.attentions[index](h) if self.attentions else h


def _resample(resampling: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    """A residual block is told the embedding, a lone convolution is not."""
    return cast(Tensor, resampling(h, emb) if isinstance(resampling, ResidualBlock) else resampling(h))
