"""The U-Net against the paper's numbers and, piece by piece, against what its parts must do."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from ddpm import UNet, UNetConfig
from ddpm.networks.layers import AttentionBlock, Downsample, TimeEmbedding, Upsample, sinusoidal_embedding
from ddpm.networks.unet import level_resolutions

SMALL = UNetConfig(
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
    num_groups=4,
)


def small_unet(num_classes: int | None = None, config: UNetConfig = SMALL) -> UNet:
    torch.manual_seed(0)
    return UNet(config, image_size=(8, 8), channels=1, num_classes=num_classes)


def train(net: UNet, num_steps: int, num_classes: int | None = None) -> None:
    """A few optimiser steps on random images, ending with fresh gradients."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(num_steps + 1):
        x_t, eps = torch.randn(2, 6, 1, 8, 8, generator=generator)
        t = torch.randint(1000, (6,), generator=generator)
        label = None if num_classes is None else torch.arange(6) % (num_classes + 1)
        optimizer.zero_grad()
        (net(x_t, t, label) - eps).square().mean().backward()
        if step < num_steps:
            optimizer.step()


# --- the whole network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel_multipliers", "image_size", "expected"),
    [((1, 2, 2, 2), 32, 35_746_307), ((1, 1, 2, 2, 4, 4), 256, 113_673_219)],
)
def test_the_papers_parameter_counts(channel_multipliers: tuple[int, ...], image_size: int, expected: int) -> None:
    with torch.device("meta"):
        config = UNetConfig(channel_multipliers=channel_multipliers)
        net = UNet(config, image_size=(image_size, image_size), channels=3, num_classes=None)
        conditional = UNet(config, image_size=(image_size, image_size), channels=3, num_classes=10)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected
    assert not [name for name in net.state_dict() if "label" in name]
    # One vector of 4 x 128 per class, one more for "no label", and nothing else.
    assert sum(parameter.numel() for parameter in conditional.parameters()) == expected + 11 * 512
    assert conditional.null_label == 10
    assert net.null_label is None


def test_a_learned_variance_takes_as_many_channels_again() -> None:
    net = UNet(dataclasses.replace(SMALL, learned_variance=True), image_size=(8, 8), channels=1, num_classes=None)
    assert net(torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).shape == (2, 2, 8, 8)
    plain = {name: parameter.shape for name, parameter in small_unet().named_parameters()}
    wider = {name for name, parameter in net.named_parameters() if parameter.shape != plain[name]}
    assert wider == {"conv_out.weight", "conv_out.bias"}


def test_the_embedding_of_t_is_scaled_with_the_length_of_the_chain() -> None:
    """Step t of 250 has about the noise of step 4 t of 1000, and the same embedding; floats go between the steps."""
    torch.manual_seed(0)
    long, short = (UNet(SMALL, image_size=(8, 8), channels=1, num_classes=None, num_timesteps=T) for T in (1000, 250))
    train(long, 3)
    short.load_state_dict(long.state_dict())
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 70, 249])
    assert torch.equal(short(x_t, t), long(x_t, 4 * t))
    assert not torch.equal(short(x_t, t), long(x_t, t))
    assert torch.equal(long(x_t, t.double()), long(x_t, t))
    between = long(x_t, t.double() + 0.5)
    assert not torch.equal(between, long(x_t, t)) and not torch.equal(between, long(x_t, t + 1))


def test_labels_are_looked_at_on_the_cpu_only() -> None:
    """Elsewhere a look would wait for the device; on "meta" there is nothing to look at."""
    with torch.device("meta"):
        net = UNet(SMALL, image_size=(8, 8), channels=1, num_classes=3)
        label = torch.tensor([0, 3])
        assert net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), label).shape == (2, 1, 8, 8)


def test_first_prediction_is_zero_and_every_block_its_shortcut() -> None:
    net = small_unet(num_classes=3)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.equal(net(x_t, t), torch.zeros_like(x_t))
    block = net.get_submodule("down_levels.0.res_blocks.0")
    h = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(h, torch.randn(2, 64)), h)
    attention = net.get_submodule("middle.attention")
    h = torch.randn(2, 32, 4, 4)
    assert torch.equal(attention(h), h)


def test_initial_weights_are_glorots() -> None:
    torch.manual_seed(0)
    net = UNet(UNetConfig(), image_size=(32, 32), channels=3, num_classes=None)
    num_zero = 0
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        assert module.bias is not None
        assert not module.bias.any(), name
        if name.endswith(("conv_2", "attention.projection")) or ("attentions" in name and name.endswith("projection")):
            assert not module.weight.any(), name
            num_zero += 1
        elif name != "conv_out":
            area = module.weight[0, 0].numel()
            fan_avg = area * (module.weight.shape[0] + module.weight.shape[1]) / 2
            bound = math.sqrt(3 / fan_avg)
            assert module.weight.abs().max() <= bound, name
            # A uniform variable's square has a relative deviation of 0.9: six sigma over the entries.
            assert module.weight.var().item() * fan_avg == pytest.approx(1, abs=6 * 0.9 / module.weight.numel() ** 0.5)
    assert num_zero == 22 + 6  # residual blocks: 8 down, 2 in the middle, 12 up; attention: 2 down, 1 middle, 3 up
    assert not net.conv_out.weight.any()


def test_group_norms_have_the_papers_eps() -> None:
    norms = [module for module in small_unet().modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert {norm.num_groups for norm in norms} == {4}
    # Where a group hardly varies it decides: the variance of this input is 1e-6 as well.
    x = torch.tensor([-1e-3, 1e-3]).repeat(8).reshape(1, 16, 1, 1)
    torch.testing.assert_close(norms[0](x), x * 1e3 / math.sqrt(2))


def test_gradient_reaches_every_parameter_once_the_zeros_are_gone() -> None:
    net = small_unet(num_classes=3)
    train(net, 0, num_classes=3)
    reached = {
        name for name, parameter in net.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached == {"conv_out.weight", "conv_out.bias"}  # zeros stand before everything else
    train(net, 2, num_classes=3)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        largest = parameter.grad.abs().max()
        if name.endswith("key.bias"):  # adds the same to all logits of a query: softmax does not see it
            assert largest < 1e-6, name
        else:
            assert largest > 1e-7, name


def test_labels_act_after_training_and_none_is_the_null_label() -> None:
    net = small_unet(num_classes=3)
    train(net, 3, num_classes=3)
    x_t, t = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 500)
    with torch.no_grad():
        eps_hat = net(x_t, t, torch.arange(4))
        without = net(x_t, t)
    for first in range(4):
        for second in range(first):
            assert (eps_hat[first] - eps_hat[second]).abs().max() > 1e-4
    torch.testing.assert_close(without, eps_hat[3:].expand_as(without), rtol=0, atol=1e-6)


def test_t_acts_after_training() -> None:
    net = small_unet()
    train(net, 3)
    with torch.no_grad():
        eps_hat = net(torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1), torch.tensor([10, 11]))
    assert (eps_hat[0] - eps_hat[1]).abs().max() > 1e-5


def test_dropout_acts_in_training_mode_only() -> None:
    config = UNetConfig(
        base_channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.5,
        num_groups=4,
    )
    net = small_unet(config=config)
    train(net, 3)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert not torch.equal(net(x_t, t), net(x_t, t))
    net.eval()
    assert torch.equal(net(x_t, t), net(x_t, t))


def test_skips_reach_the_way_up_in_reverse_order() -> None:
    """Widths 8, 16, 24: only the right order gives blocks of the right width, and each skip is used once."""
    config = UNetConfig(
        base_channels=8, channel_multipliers=(1, 2, 3), num_res_blocks=2, attention_resolutions=(), num_groups=8
    )
    with torch.device("meta"):
        net = UNet(config, image_size=(8, 8), channels=2, num_classes=None)
        out = net(torch.zeros(3, 2, 8, 8), torch.zeros(3, dtype=torch.int64))
    assert out.shape == (3, 2, 8, 8)
    in_channels = [
        [conv.in_channels for name, conv in level.named_modules() if name.endswith("conv_1")] for level in net.up_levels
    ]
    assert in_channels == [[24 + 24, 24 + 24, 24 + 16], [24 + 16, 16 + 16, 16 + 8], [16 + 8, 8 + 8, 8 + 8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_t": torch.zeros(2, 1, 8, 4)}, r"^x_t: must be \[B, 1, 8, 8\], got \[2, 1, 8, 4\]"),
        ({"x_t": torch.zeros(2, 3, 8, 8)}, r"^x_t: "),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"^t: must be \[B\] with B = 2, got \[3\]"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"^label: must be \[B\] with B = 2, got \[3\]"),
        ({"label": torch.tensor([0, 4])}, r"^label: must be in \[0, 3\] \(3 is the null label\), got 4"),
        ({"label": torch.tensor([-1, 0])}, r"^label: .* got -1"),
    ],
)
def test_wrong_inputs_are_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x_t": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2, dtype=torch.int64), "label": None}
    with pytest.raises(ValueError, match=message):
        small_unet(num_classes=3)(**{**good, **arguments})


def test_a_label_for_a_network_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^label: this network has no classes"):
        small_unet()(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_channels": 2}, r"^base_channels: must be even and at least 4, got 2"),
        ({"base_channels": 33, "num_groups": 1}, r"^base_channels: .* got 33"),
        ({"channel_multipliers": ()}, r"^channel_multipliers: .* got \(\)"),
        ({"channel_multipliers": (1, 0)}, r"^channel_multipliers: .* got \(1, 0\)"),
        ({"num_res_blocks": 0}, r"^num_res_blocks: must be at least 1, got 0"),
        ({"dropout": 1.0}, r"^dropout: must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, r"^dropout: "),
        ({"dropout": math.nan}, r"^dropout: "),
        ({"base_channels": 48}, r"^num_groups: must divide base_channels \(48\), got 32"),
        ({"num_groups": 0}, r"^num_groups: "),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


def test_level_resolutions() -> None:
    assert level_resolutions(UNetConfig(), (32, 32)) == (32, 16, 8, 4)
    assert level_resolutions(UNetConfig(attention_resolutions=()), (8, 8)) == (8, 4, 2, 1)
    with pytest.raises(ValueError, match=r"^image_size: must be a multiple of 8 for 4 levels, got 28"):
        level_resolutions(UNetConfig(), (28, 28))
    with pytest.raises(ValueError, match=r"^network.attention_resolutions: must be among \[48, 24, 12, 6\].* got 16"):
        level_resolutions(UNetConfig(), (48, 48))


# --- rectangles -------------------------------------------------------------------------------------------------------


THREE_LEVELS = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_resolutions=(12,), num_groups=4
)


def rectangular(image_size: tuple[int, int]) -> UNet:
    torch.manual_seed(0)
    net = UNet(THREE_LEVELS, image_size=image_size, channels=2, num_classes=None).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return net


def test_levels_go_by_the_shorter_side() -> None:
    seen = list[tuple[int, ...]]()

    def note(block: nn.Module, inputs: Any, h: torch.Tensor) -> None:
        seen.append(tuple(h.shape[2:]))

    for image_size in ((24, 40), (40, 24)):
        assert level_resolutions(THREE_LEVELS, image_size) == (24, 12, 6)
        net = rectangular(image_size)
        seen.clear()
        for level in net.down_levels:
            level.get_submodule("res_blocks.0").register_forward_hook(note)
        for levels, expected in ((net.down_levels, [0, 1, 0]), (net.up_levels, [0, 2, 0])):
            assert [len(list(level.get_submodule("attentions").children())) for level in levels] == expected
        with torch.no_grad():
            assert net(torch.zeros(2, 2, *image_size), torch.tensor([3, 700])).shape == (2, 2, *image_size)
        assert seen == [(image_size[0] // n, image_size[1] // n) for n in (1, 2, 4)]
    with pytest.raises(
        ValueError, match=r"^network.attention_resolutions: must be among \[24, 12, 6\], .*24-pixel.* got 20"
    ):
        level_resolutions(dataclasses.replace(THREE_LEVELS, attention_resolutions=(20,)), (24, 40))


@pytest.mark.parametrize(("image_size", "side"), [((24, 42), 42), ((42, 24), 42), ((26, 40), 26), ((24, 0), 0)])
def test_a_side_that_does_not_fit_is_named(image_size: tuple[int, int], side: int) -> None:
    for check in (lambda: level_resolutions(THREE_LEVELS, image_size), lambda: THREE_LEVELS.check_fits(image_size)):
        with pytest.raises(ValueError, match=rf"^image_size: must be a multiple of 4 for 3 levels, got {side}; "):
            check()


def test_rows_and_columns_are_treated_alike_and_not_confused() -> None:
    """With its kernels turned, the network of turned images gives turned predictions."""
    net, other = rectangular((24, 40)), rectangular((40, 24))
    x_t, t = torch.randn(2, 2, 24, 40), torch.tensor([10, 700])
    with torch.no_grad():
        expected = net(x_t, t)
        assert expected.std() > 0.3
        assert (other(x_t.mT, t).mT - expected).abs().max() > 0.1  # the same weights, and another function
        other.load_state_dict({k: w.mT if w.ndim == 4 else w for k, w in net.state_dict().items()})
        torch.testing.assert_close(other(x_t.mT, t).mT, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^x_t: must be \[B, 2, 24, 40\], got \[2, 2, 40, 24\]"):
        net(x_t.mT, t)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_embedding_has_sines_first_and_ends_at_one_in_ten_thousand() -> None:
    emb = sinusoidal_embedding(torch.tensor([0, 1, 999]), 8)
    assert emb.dtype == torch.float32
    assert torch.equal(emb[0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))  # sin(0), then cos(0)
    frequencies = [10_000 ** (-i / 3) for i in range(4)]  # half - 1 = 3: the last is exactly 1e-4
    for row, t in ((1, 1), (2, 999)):
        expected = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
        assert emb[row].tolist() == pytest.approx(expected, abs=1e-4)  # float32 phases up to 999: 6e-5
    assert emb[1, 3].item() == pytest.approx(1e-4, rel=1e-6)
    with pytest.raises(ValueError, match=r"^num_channels: must be even and at least 4, got 2"):
        sinusoidal_embedding(torch.tensor([0]), 2)


def test_time_embedding_is_linear_swish_linear() -> None:
    embedding = TimeEmbedding(8, 16)
    t = torch.tensor([5, 900])
    h = sinusoidal_embedding(t, 8) @ embedding.linear_1.weight.T
    expected = (h / (1 + torch.exp(-h))) @ embedding.linear_2.weight.T
    torch.testing.assert_close(embedding(t), expected)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 1), (2, 2), (0, 2)])
def test_downsampling_pads_right_and_bottom_only(row: int, column: int) -> None:
    """A kernel with a single one picks x[2i + row, 2j + column], and zero beyond the last pixel."""
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()
        down.conv.weight[0, 0, row, column] = 1
    x = torch.arange(1.0, 37.0).reshape(1, 1, 6, 6)
    padded = torch.zeros(1, 1, 7, 7)
    padded[..., :6, :6] = x
    assert torch.equal(down(x), padded[..., row : row + 5 : 2, column : column + 5 : 2])


def test_upsampling_repeats_pixels_then_convolves() -> None:
    up = Upsample(1)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[0, 0, 1, 1] = 1
    x = torch.randn(2, 1, 3, 3)
    assert torch.equal(up(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    with torch.no_grad():
        up.conv.weight[0, 0] = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert torch.equal(up(x)[..., :-1], x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[..., 1:])


def test_attention_is_one_head_over_all_pixels() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(8, num_groups=2)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 3, 3)
    pixels = block.norm(x).permute(0, 2, 3, 1).reshape(2, 9, 8)
    query, key, value = (layer(pixels) for layer in (block.query, block.key, block.value))
    weights = torch.softmax(torch.einsum("bic,bjc->bij", query, key) / math.sqrt(8), dim=-1)
    out = block.projection(torch.einsum("bij,bjc->bic", weights, value))
    torch.testing.assert_close(block(x), x + out.reshape(2, 3, 3, 8).permute(0, 3, 1, 2))
