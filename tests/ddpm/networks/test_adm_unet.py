"""The U-Net's improvements by Dhariwal & Nichol: the paper's sizes, and each piece by itself."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm import ModelConfig, UNet, UNetConfig, count_parameters, flops_per_image
from ddpm.networks.layers import AttentionBlock, ResidualBlock
from ddpm.networks.unet import level_resolutions

SMALL = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)


def adm(base_channels: int, multipliers: tuple[int, ...], num_res_blocks: int) -> UNetConfig:
    return UNetConfig(
        base_channels=base_channels,
        channel_multipliers=multipliers,
        num_res_blocks=num_res_blocks,
        attention_resolutions=(32, 16, 8),
        num_head_channels=64,
        adaptive_group_norm=True,
        residual_resampling=True,
        learned_variance=True,
    )


# Dhariwal & Nichol 2021, appendix I: millions of parameters. Gflops, a multiplication and an addition counted as one:
# Karras et al. 2024 (arXiv:2312.02696) for 64 pixels, Peebles & Xie 2023 for 256.
PUBLISHED = {
    64: (adm(192, (1, 2, 3, 4), 3), 296, 110),
    128: (adm(256, (1, 1, 2, 3, 4), 2), 422, None),
    256: (adm(256, (1, 1, 2, 2, 4, 4), 2), 554, 1120),
}


def parameters_from_the_paper(base: int, multipliers: tuple[int, ...], num_res_blocks: int, image_size: int) -> int:
    """Counted off the description: ImageNet's 1000 classes, colour images, learned variance, attention at 32, 16, 8."""

    def layer(inputs: int, outputs: int, area: int = 1) -> int:
        return area * inputs * outputs + outputs

    def res_block(inputs: int, outputs: int) -> int:
        count = 2 * inputs + layer(inputs, outputs, 9)  # norm, convolution
        count += layer(4 * base, 2 * outputs)  # scale and shift
        count += 2 * outputs + layer(outputs, outputs, 9)
        return count + (layer(inputs, outputs) if inputs != outputs else 0)

    def attention(width: int) -> int:
        return 2 * width + layer(width, 3 * width) + layer(width, width)

    count = layer(base, 4 * base) + layer(4 * base, 4 * base) + 1000 * 4 * base  # timestep, class
    count += layer(3, base, 9)
    width, skips = base, [base]
    for level, multiplier in enumerate(multipliers):
        here = attention(multiplier * base) if image_size // 2**level in (32, 16, 8) else 0
        for _ in range(num_res_blocks):
            count += res_block(width, multiplier * base) + here
            width = multiplier * base
            skips.append(width)
        if level < len(multipliers) - 1:
            count += res_block(width, width)  # halves the resolution
            skips.append(width)
    count += 2 * res_block(width, width) + attention(width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        here = attention(multiplier * base) if image_size // 2**level in (32, 16, 8) else 0
        for _ in range(num_res_blocks + 1):
            count += res_block(width + skips.pop(), multiplier * base) + here
            width = multiplier * base
        if level > 0:
            count += res_block(width, width)  # doubles it
    return count + 2 * width + layer(width, 6, 9)


@pytest.mark.parametrize("image_size", PUBLISHED)
def test_the_papers_parameters_and_gflops(image_size: int) -> None:
    unet, published_millions, published_gflops = PUBLISHED[image_size]
    config = ModelConfig(network=unet, image_size=(image_size, image_size), channels=3, num_classes=1000)
    with torch.device("meta"):
        net = UNet(unet, image_size=(image_size, image_size), channels=3, num_classes=1000)
    parameters = count_parameters(net)
    null_label = 4 * unet.base_channels  # one row more than the paper's: the class "no label"
    print(f"ADM {image_size}: {parameters:,} parameters, {null_label} of them for the null label")
    assert parameters - null_label == parameters_from_the_paper(
        unet.base_channels, unet.channel_multipliers, unet.num_res_blocks, image_size
    )
    assert round((parameters - null_label) / 1e6) == round(parameters / 1e6) == published_millions
    if published_gflops is not None:
        assert round(flops_per_image(config) / 2e9) == published_gflops


def test_the_imagenet_64_network_exactly() -> None:
    unet = PUBLISHED[64][0]
    with torch.device("meta"):
        net = UNet(unet, image_size=(64, 64), channels=3, num_classes=1000)
    assert count_parameters(net) == 295_904_454 + 768


def test_without_the_improvements_the_network_is_that_of_ho_et_al() -> None:
    for field in ("num_head_channels", "adaptive_group_norm", "residual_resampling"):
        assert not getattr(UNetConfig(), field)
    torch.manual_seed(0)
    plain = UNet(SMALL, image_size=(8, 8), channels=1, num_classes=None)
    assert not [name for name in plain.state_dict() if "sample" in name and name.split(".")[-2] != "conv"]
    torch.manual_seed(0)
    headed = UNet(dataclasses.replace(SMALL, num_head_channels=8), image_size=(8, 8), channels=1, num_classes=None)
    assert all(torch.equal(tensor, headed.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_all_improvements_train() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        SMALL, num_head_channels=8, adaptive_group_norm=True, residual_resampling=True, dropout=0.0
    )
    net = UNet(config, image_size=(8, 8), channels=1, num_classes=2)
    x_t, t, label = torch.randn(4, 1, 8, 8), torch.tensor([3, 200, 500, 999]), torch.tensor([0, 1, 2, 1])
    assert torch.equal(net(x_t, t, label), torch.zeros_like(x_t))  # as before: every block begins as its shortcut
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x_t, t, label) - x_t).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_adaptive_norm_scales_and_shifts_after_the_norm() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, emb_channels=6, num_groups=2, dropout=0.0, adaptive=True).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    scale, shift = block.emb_projection(F.silu(emb))[:, :, None, None].split(8, dim=1)
    h = block.norm_2(block.conv_1(F.silu(block.norm_1(x))))
    expected = x + block.conv_2(F.silu(h + scale * h + shift))
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_resampling_block_resamples_both_branches_before_the_convolution(resample: Any, width: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, width, emb_channels=6, num_groups=2, dropout=0.0, resample=resample).double()
    x, emb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)

    def resampled(h: torch.Tensor) -> torch.Tensor:
        if resample == "up":
            return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    torch.testing.assert_close(block(x, emb), block.shortcut(resampled(x)))  # the second convolution begins at zero
    nn.init.normal_(block.conv_2.weight)
    h = block.conv_1(resampled(F.silu(block.norm_1(x)))) + block.emb_projection(F.silu(emb))[:, :, None, None]
    expected = block.shortcut(resampled(x)) + block.conv_2(F.silu(block.norm_2(h)))
    torch.testing.assert_close(block(x, emb), expected)


def test_heads_attend_by_themselves() -> None:
    """Three heads of four channels are three attentions over four channels each."""
    torch.manual_seed(0)
    block = AttentionBlock(12, num_groups=3, num_head_channels=4).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    pixels = block.norm(x).permute(0, 2, 3, 1).reshape(2, 9, 12)
    heads = []
    for head in range(3):
        query, key, value = (
            layer(pixels)[..., 4 * head : 4 * head + 4] for layer in (block.query, block.key, block.value)
        )
        heads.append(torch.softmax(query @ key.mT / math.sqrt(4), dim=-1) @ value)
    out = block.projection(torch.cat(heads, dim=-1)).reshape(2, 3, 3, 12).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x + out, rtol=1e-12, atol=1e-12)


def test_heads_must_divide_the_widths_that_they_attend_to() -> None:
    with pytest.raises(ValueError, match=r"^num_head_channels: must be at least 1, got 0"):
        UNetConfig(num_head_channels=0)
    config = dataclasses.replace(SMALL, base_channels=24, channel_multipliers=(1, 2, 4), num_head_channels=32)
    assert level_resolutions(dataclasses.replace(config, attention_resolutions=()), (16, 16)) == (16, 8, 4)
    with pytest.raises(
        ValueError, match=r"^network.num_head_channels: must divide 24, the width of a level .*, got 32"
    ):
        level_resolutions(dataclasses.replace(config, attention_resolutions=(16, 8)), (16, 16))
    with pytest.raises(
        ValueError, match=r"^network.num_head_channels: must divide 96, the width of a level .*, got 64"
    ):
        level_resolutions(dataclasses.replace(config, num_head_channels=64, attention_resolutions=()), (16, 16))
