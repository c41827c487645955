"""Our U-Net and diffusers' `UNet2DModel` with the same weights: the same names, the same shapes, the same output."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm import DiT, DiTConfig, UNet, UNetConfig
from ddpm.interop.diffusers_weights import diffusers_config, diffusers_name, from_diffusers, to_diffusers
from ddpm.networks.network_config import ImageSize

UNet2DModel: Any = diffusers.UNet2DModel  # its constructor is not typed
TIMESTEPS = torch.tensor([0, 1, 250, 500, 999])
# The paper's two networks, narrow: what matters is which block has which width, attention and resampling.
CIFAR10 = UNetConfig(base_channels=32, num_groups=32)
PIXELS_256 = UNetConfig(base_channels=8, channel_multipliers=(1, 1, 2, 2, 4, 4), num_groups=4)
# That of Dhariwal & Nichol for 64 pixels, a twelfth as wide.
ADM_64 = UNetConfig(
    base_channels=16,
    channel_multipliers=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_groups=4,
    num_head_channels=8,
    adaptive_group_norm=True,
    residual_resampling=True,
)
# Its authors' frequencies, and an eps that would be seen.
ADM_AUTHORS = replace(ADM_64, embedding_divisor="half", group_norm_eps=1e-3)
# Attention at 12 pixels of the shorter side, 20 of the longer one.
RECTANGLE = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_resolutions=(12,), num_groups=4
)


def randomise(net: nn.Module) -> None:
    """Weights with which every layer matters: no zeros, biases and scales off their defaults."""
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        (CIFAR10, (32, 32)),
        (PIXELS_256, (256, 256)),
        (ADM_64, (64, 64)),
        (ADM_AUTHORS, (64, 64)),
        (RECTANGLE, (24, 40)),
        (RECTANGLE, (40, 24)),
    ],
    ids=["cifar10", "256px", "adm", "adm's options", "24x40", "40x24"],
)
def test_outputs_equal_diffusers(config: UNetConfig, image_size: ImageSize, num_classes: int | None) -> None:
    net = UNet(config, image_size=image_size, channels=3, num_classes=num_classes).eval()
    randomise(net)
    keywords = diffusers_config(config, image_size=image_size, channels=3, num_classes=num_classes)
    oracle = UNet2DModel(**keywords).eval()
    oracle.load_state_dict(to_diffusers(net.state_dict()), strict=True)
    x_t = torch.randn(5, 3, *image_size, generator=torch.Generator().manual_seed(2))
    label = None if num_classes is None else torch.tensor([0, 3, 9, 10, 5])  # 10 is the null label
    with torch.no_grad():
        ours = net(x_t, TIMESTEPS, label)
        theirs = oracle(x_t, TIMESTEPS, class_labels=label).sample
    assert ours.std() > 0.3  # a network of zeros would agree as well
    assert (ours - theirs).abs().max() <= 1e-5


@st.composite
def shapes(draw: st.DrawFn) -> tuple[UNetConfig, ImageSize, int | None]:
    num_groups = draw(st.sampled_from([1, 2, 4]))
    multipliers = (1, *draw(st.lists(st.integers(1, 3), max_size=3)))
    smallest = 2 ** (len(multipliers) - 1)
    image_size = (smallest * draw(st.integers(1, 3)), smallest * draw(st.integers(1, 3)))
    resolutions = [min(image_size) // 2**level for level in range(len(multipliers))]
    config = UNetConfig(
        base_channels=num_groups * draw(st.sampled_from([4, 8])),
        channel_multipliers=multipliers,
        num_res_blocks=draw(st.integers(1, 3)),
        attention_resolutions=tuple(draw(st.sets(st.sampled_from(resolutions)))),
        num_groups=num_groups,
        num_head_channels=draw(st.sampled_from([None, 2, 4])),
        adaptive_group_norm=draw(st.booleans()),
        residual_resampling=draw(st.booleans()),
        learned_variance=draw(st.booleans()),
    )
    return config, image_size, draw(st.sampled_from([None, 1, 7]))


@settings(max_examples=25, deadline=None)
@given(shapes())
def test_names_and_shapes_for_any_config(shape: tuple[UNetConfig, ImageSize, int | None]) -> None:
    config, image_size, num_classes = shape
    with torch.device("meta"):
        ours = UNet(config, image_size=image_size, channels=2, num_classes=num_classes).state_dict()
        keywords = diffusers_config(config, image_size=image_size, channels=2, num_classes=num_classes)
        theirs = UNet2DModel(**keywords).state_dict()
    exported = to_diffusers(ours)
    assert {name: tensor.shape for name, tensor in exported.items()} == {n: t.shape for n, t in theirs.items()}
    imported = from_diffusers(theirs, ours)
    assert {name: tensor.shape for name, tensor in imported.items()} == {n: t.shape for n, t in ours.items()}


def test_import_undoes_export_and_reads_old_names() -> None:
    net = UNet(CIFAR10, image_size=(32, 32), channels=3, num_classes=4)
    randomise(net)
    weights = net.state_dict()
    exported = to_diffusers(weights)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    written_long_ago = {}
    for name, tensor in exported.items():
        if ".attentions." in name:
            for new_name, old_name in old.items():
                name = name.replace(new_name, old_name)
        written_long_ago[name] = tensor
    assert set(written_long_ago) != set(exported)
    for source in (exported, written_long_ago):
        imported = from_diffusers(source, weights)
        assert set(imported) == set(weights)
        assert all(imported[name] is weights[name] for name in weights)


def test_diffusers_itself_agrees_on_the_old_names() -> None:
    """Its own renaming of old files gives the names that ours gives."""
    keywords = diffusers_config(CIFAR10, image_size=(32, 32), channels=3, num_classes=None)
    with torch.device("meta"):
        oracle = UNet2DModel(**keywords)
        names = UNet(CIFAR10, image_size=(32, 32), channels=3, num_classes=None).state_dict()
    weights = {name: torch.empty(0) for name in oracle.state_dict()}
    renamed = {
        name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn")
        for name in weights
    }
    old = {name: torch.empty(0) for name in renamed}
    assert set(from_diffusers(old, names)) == set(names)
    oracle._fix_state_dict_keys_on_load(old)
    assert set(old) == set(weights)


def test_weights_of_another_network_are_refused() -> None:
    with torch.device("meta"):
        ours = UNet(CIFAR10, image_size=(32, 32), channels=3, num_classes=None).state_dict()
        conditional = UNet(CIFAR10, image_size=(32, 32), channels=3, num_classes=4).state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: .* 'class_embedding.weight' is missing \(1 missing, 0 left"):
        from_diffusers(to_diffusers(ours), conditional)
    with pytest.raises(ValueError, match=r"'class_embedding.weight' has no place \(0 missing, 1 left over\)"):
        from_diffusers(to_diffusers(conditional), ours)
    with pytest.raises(ValueError, match=r"^name: .* 'middle.conv_1.weight'"):
        diffusers_name("middle.conv_1.weight")
    dit = DiT(DiTConfig(depth=1), image_size=(8, 8), channels=3, num_classes=None)
    with pytest.raises(ValueError, match=r"^name: no tensor of the U-Net is called 'patch_embedding.weight'; no other"):
        to_diffusers(dit.state_dict())


def test_a_learned_variance_is_carried_over() -> None:
    config = replace(CIFAR10, learned_variance=True)
    net = UNet(config, image_size=(32, 32), channels=3, num_classes=None).eval()
    randomise(net)
    keywords = diffusers_config(config, image_size=(32, 32), channels=3, num_classes=None)
    oracle = UNet2DModel(**keywords).eval()
    oracle.load_state_dict(to_diffusers(net.state_dict()), strict=True)
    x_t, t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.tensor([250])
    with torch.no_grad():
        ours, theirs = net(x_t, t), oracle(x_t, t).sample
    assert ours.shape == (1, 6, 32, 32)
    assert (ours - theirs).abs().max() <= 1e-5


def test_the_sample_size_is_one_number_for_squares() -> None:
    """As diffusers' own configs have it; height and width of a rectangle."""
    sizes: list[ImageSize] = [(24, 24), (24, 40)]
    keywords = [diffusers_config(RECTANGLE, image_size=size, channels=3, num_classes=None) for size in sizes]
    assert [one["sample_size"] for one in keywords] == [24, (24, 40)]


def test_what_diffusers_cannot_express_is_refused() -> None:
    config = UNetConfig(channel_multipliers=(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"^channel_multipliers: must begin with 1 for diffusers, got \(2, 2, 2, 2\)"):
        diffusers_config(config, image_size=(32, 32), channels=3, num_classes=None)
