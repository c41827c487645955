"""Model config, the network built from it, networks of the user's own, and the FLOP count."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import (
    DiT,
    DiTConfig,
    ModelConfig,
    ScheduleConfig,
    UNet,
    UNetConfig,
    build_model,
    count_parameters,
    flops_per_image,
)

CIFAR10 = ModelConfig(image_size=32, channels=3)
SMALL_UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)

OWN_NETWORK = """
import torch

class Affine(torch.nn.Module):
    def __init__(self, image_size, channels, num_classes, width):
        super().__init__()
        self.shape = (channels, image_size, image_size)
        self.lift = torch.nn.Conv2d(channels, width, 1)
        self.head = torch.nn.Conv2d(width, channels, 1)

    def forward(self, x_t, t, label):
        assert x_t.shape[1:] == self.shape
        return self.head(self.lift(x_t))

class LooksAtValues(Affine):
    def forward(self, x_t, t, label):
        if float(t.max()) > 500:  # impossible without values
            return x_t
        return super().forward(x_t, t, label)

class Attends(LooksAtValues):
    def forward(self, x_t, t, label):
        pixels = x_t.flatten(2).transpose(1, 2)[:, None].contiguous()  # the fused kernel wants it so
        torch.nn.functional.scaled_dot_product_attention(pixels, pixels, pixels)
        return super().forward(x_t, t, label)

class Box:
    factory = Affine

def no_module(image_size, channels, num_classes):
    return 7

def draws(image_size, channels, num_classes):
    torch.rand(5, device="cpu")
    return Affine(image_size, channels, num_classes, 5)

def any_keywords(**keywords):
    assert set(keywords) == {"image_size", "channels", "num_classes", "width"}
    return Affine(**keywords)

def broken(image_size, channels, num_classes):
    raise TypeError("inside the factory")

number = 7
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`own_networks.affine`, a package of the user's, importable."""
    package = tmp_path / "own_networks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "affine.py").write_text(OWN_NETWORK)
    (package / "fails.py").write_text("1 / 0\n")
    (package / "talks.py").write_text('raise ImportError("first line\\nsecond line")\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "own_networks"]:
        del sys.modules[name]


def own(factory: str, **options: int | float | str | bool) -> ModelConfig:
    return ModelConfig(model=factory, model_options=options, image_size=8, channels=2)


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, r"^image_size: must be at least 1 pixel, got 0"),
        ({"image_size": 30}, r"^image_size: must be a multiple of 8 for 4 levels, got 30"),
        ({"image_size": 40}, r"^attention_resolutions: must be among \[40, 20, 10, 5\].* got 16"),
        ({"channels": 0}, r"^channels: must be at least 1, got 0"),
        ({"num_classes": 0}, r"^num_classes: must be at least 1, got 0; leave it out"),
        ({"prediction_type": "flow"}, r"^prediction_type: must be eps, x_0 or v, got 'flow'"),
        (
            {"schedule": ScheduleConfig(zero_terminal_snr=True)},
            r"^prediction_type: must be v or x_0 with zero_terminal_snr, got 'eps'",
        ),
        ({"model_options": {"width": 3}}, r"^model_options: the U-Net takes none, got \['width'\]"),
        (
            {"model": "dit", "image_size": 31},
            r"^image_size: must be a multiple of dit.patch_size \(2\), got 31",
        ),
        (
            {"model": "dit", "model_options": {"width": 3}},
            r"^model_options: the DiT takes none, .*its shape is set by dit",
        ),
        ({"model": "UNet"}, r'^model: must be "unet", "dit" or "package.module:factory", got \'UNet\''),
        ({"model": "a.b:"}, r"^model: "),
        ({"model": ":c"}, r"^model: "),
        ({"model": "a..b:c"}, r"^model: "),
        ({"model": "a/b.py:c"}, r"^model: "),
        ({"model": "a:b:c"}, r"^model: "),
        ({"model": "a:b", "model_options": {"channels": 3}}, r"^model_options: 'channels' is a field of its own"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"image_size": 32, "channels": 3}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**good, **fields})


def test_another_network_is_not_held_to_the_unets_rules() -> None:
    assert ModelConfig(model="a.b:c", image_size=31, channels=3).image_size == 31
    assert ModelConfig(model="dit", image_size=30, channels=3).image_size == 30


def test_configs_do_not_share_or_change() -> None:
    first, second = ModelConfig(image_size=32, channels=3), ModelConfig(image_size=32, channels=3)
    assert first == second
    assert first.model_options is not second.model_options
    assert first.schedule == ScheduleConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.channels = 1  # type: ignore[misc]


# --- the U-Net --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed() -> None:
    config = ModelConfig(image_size=8, channels=1, num_classes=2, unet=SMALL_UNET)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    second, third = build_model(config, seed=1), build_model(config, seed=2)
    assert isinstance(first, UNet)
    assert first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.conv_in.weight, third.get_parameter("conv_in.weight"))


def test_what_the_config_says_reaches_the_unet() -> None:
    schedule = ScheduleConfig(num_timesteps=250, zero_terminal_snr=True)
    config = ModelConfig(
        image_size=8, channels=1, unet=SMALL_UNET, schedule=schedule, prediction_type="v", learned_variance=True
    )
    net = build_model(config)
    assert isinstance(net, UNet) and net.num_timesteps == 250
    assert net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 249])).shape == (2, 2, 8, 8)


def test_what_the_config_says_reaches_the_dit() -> None:
    config = ModelConfig(
        model="dit",
        dit=DiTConfig(patch_size=4, hidden_size=16, depth=3, num_heads=2),
        image_size=8,
        channels=1,
        num_classes=2,
        schedule=ScheduleConfig(num_timesteps=250),
        learned_variance=True,
    )
    net = build_model(config)
    assert isinstance(net, DiT) and (net.num_timesteps, len(net.blocks), net.null_label) == (250, 3, 2)
    assert net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 249]), torch.tensor([0, 2])).shape == (2, 2, 8, 8)
    again = build_model(config)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())


def test_count_parameters() -> None:
    assert count_parameters(build_model(CIFAR10)) == 35_746_307
    shared = torch.nn.Linear(3, 4)
    assert count_parameters(torch.nn.Sequential(shared, shared)) == 16


def conv_flops(in_channels: int, out_channels: int, kernel_size: int, resolution: int) -> int:
    return 2 * in_channels * out_channels * kernel_size**2 * resolution**2


def res_block_flops(in_channels: int, out_channels: int, resolution: int) -> int:
    flops = conv_flops(in_channels, out_channels, 3, resolution) + conv_flops(out_channels, out_channels, 3, resolution)
    flops += 2 * 512 * out_channels  # the embedding
    return flops + (conv_flops(in_channels, out_channels, 1, resolution) if in_channels != out_channels else 0)


def test_flops_of_the_cifar10_network_equal_the_sum_over_its_layers() -> None:
    """Written down from the paper's description, layer by layer: 12.44 GFLOP, 12.11 without attention's products."""
    blocks = [
        *[(128, 128, 32), (128, 128, 32), (128, 256, 16), (256, 256, 16)],
        *[(256, 256, 8), (256, 256, 8), (256, 256, 4), (256, 256, 4)],
        *[(256, 256, 4), (256, 256, 4)],
        *[(512, 256, 4), (512, 256, 4), (512, 256, 4), (512, 256, 8), (512, 256, 8), (512, 256, 8)],
        *[(512, 256, 16), (512, 256, 16), (384, 256, 16), (384, 128, 32), (256, 128, 32), (256, 128, 32)],
    ]
    flops = sum(res_block_flops(*block) for block in blocks)
    flops += conv_flops(3, 128, 3, 32) + conv_flops(128, 3, 3, 32)
    flops += conv_flops(128, 128, 3, 16) + conv_flops(256, 256, 3, 8) + conv_flops(256, 256, 3, 4)  # down
    flops += conv_flops(256, 256, 3, 8) + conv_flops(256, 256, 3, 16) + conv_flops(256, 256, 3, 32)  # up
    flops += 2 * 128 * 512 + 2 * 512 * 512
    products = 0
    for num_pixels in [256] * 5 + [16]:
        flops += 4 * 2 * 256 * 256 * num_pixels
        products += 2 * 2 * num_pixels**2 * 256
    assert flops_per_image(CIFAR10) == flops + products
    assert flops / 1e9 == pytest.approx(12.108, abs=0.001)
    assert (flops + products) / 1e9 == pytest.approx(12.444, abs=0.001)


def test_flops_take_no_memory_for_weights() -> None:
    """A network of 45 billion parameters (180 GB) is counted: only shapes are made."""
    config = ModelConfig(image_size=32, channels=3, unet=UNetConfig(base_channels=4608))
    assert flops_per_image(config) > 1e13


# --- networks of the user's own ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize("factory", ["Affine", "Box.factory", "any_keywords"])
def test_own_network(factory: str) -> None:
    network = build_model(own(f"own_networks.affine:{factory}", width=5))
    assert count_parameters(network) == (2 * 5 + 5) + (5 * 2 + 2)
    out = network(torch.zeros(3, 2, 8, 8), torch.zeros(3, dtype=torch.int64), None)
    assert out.shape == (3, 2, 8, 8)
    again = build_model(own(f"own_networks.affine:{factory}", width=5))
    assert torch.equal(network.get_parameter("lift.weight"), again.get_parameter("lift.weight"))


@pytest.mark.usefixtures("own_package")
def test_flops_of_own_networks_on_shapes_or_values() -> None:
    flops = 2 * 2 * 2 * 5 * 64
    assert flops_per_image(own("own_networks.affine:Affine", width=5)) == flops
    assert flops_per_image(own("own_networks.affine:LooksAtValues", width=5)) == flops
    assert flops_per_image(own("own_networks.affine:Attends", width=5)) == flops + 2 * 2 * 64**2 * 2


@pytest.mark.usefixtures("own_package")
def test_counting_flops_disturbs_no_random_state() -> None:
    before = torch.get_rng_state()
    flops_per_image(own("own_networks.affine:draws"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("nowhere.at_all:f", {}, r"^model: cannot import 'nowhere.at_all' .*ModuleNotFoundError: No module named"),
        ("own_networks.fails:f", {}, r"^model: cannot import 'own_networks.fails' .*ZeroDivisionError"),
        ("own_networks.talks:f", {}, r"^model: .*ImportError: first line second line"),
        ("own_networks.affine:nothing", {}, r"^model: .* has no 'nothing'"),
        ("own_networks.affine:Box.nothing", {}, r"^model: .* has no 'Box.nothing'"),
        ("own_networks.affine:number", {}, r"^model: 'own_networks.affine:number' must be callable, got int"),
        ("own_networks.affine:no_module", {}, r"^model: .* must return a torch.nn.Module, got int"),
        ("own_networks.affine:Affine", {}, r"^model_options: .* \(missing a required argument: 'width'\)"),
        (
            "own_networks.affine:Affine",
            {"width": 3, "depth": 2},
            r"^model_options: .* unexpected keyword argument 'depth'",
        ),
    ],
)
def test_a_bad_factory_is_one_clear_line(factory: str, options: dict[str, Any], message: str) -> None:
    for build in (build_model, flops_per_image):
        with pytest.raises(ValueError, match=message) as error:
            build(own(factory, **options))
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("own_package")
def test_errors_inside_a_factory_stay_what_they_are() -> None:
    with pytest.raises(TypeError, match=r"^inside the factory$"):
        build_model(own("own_networks.affine:broken"))
