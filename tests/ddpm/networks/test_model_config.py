"""Model config: what fits together, and the network that is built from it."""

import dataclasses
from typing import Any

import pytest
import torch

from ddpm import (
    DiT,
    DiTConfig,
    ModelConfig,
    OwnNetworkConfig,
    ScheduleConfig,
    UNet,
    UNetConfig,
    build_network,
)

SMALL_UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)

# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (0, 32)}, r"^image_size: must be at least 1 pixel each way, got \(0, 32\)"),
        ({"image_size": (32, 0)}, r"^image_size: must be at least 1 pixel each way, got \(32, 0\)"),
        ({"image_size": (30, 32)}, r"^image_size: must be a multiple of 8 for 4 levels, got 30"),
        ({"image_size": (32, 36)}, r"^image_size: must be a multiple of 8 for 4 levels, got 36"),
        ({"image_size": (40, 64)}, r"^network.attention_resolutions: must be among \[40, 20, 10, 5\].* got 16"),
        ({"channels": 0}, r"^channels: must be at least 1, got 0"),
        ({"num_classes": 0}, r"^num_classes: must be at least 1, got 0; leave it out"),
        ({"num_levels": 1024}, r"^num_levels: must be 256 or 65536, got 1024"),
        (
            {"schedule": ScheduleConfig(zero_terminal_snr=True)},
            r"^network.prediction_type: must be v or x_0 with zero_terminal_snr, got 'eps'",
        ),
        (
            {"network": DiTConfig(), "image_size": (32, 31)},
            r"^image_size: must be a multiple of network.patch_size \(2\), got 31",
        ),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"image_size": (32, 32), "channels": 3}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**good, **fields})


def test_another_network_is_not_held_to_the_unets_rules() -> None:
    own = OwnNetworkConfig(factory="a.b:c")
    assert ModelConfig(network=own, image_size=(31, 7), channels=3).image_size == (31, 7)
    assert ModelConfig(network=DiTConfig(), image_size=(30, 6), channels=3).image_size == (30, 6)


def test_configs_do_not_share_or_change() -> None:
    first, second = (ModelConfig(image_size=(32, 32), channels=3) for _ in range(2))
    assert first == second
    assert first.network == UNetConfig() and first.schedule == ScheduleConfig() and first.num_levels == 256
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.channels = 1  # type: ignore[misc]


# --- the U-Net --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed() -> None:
    config = ModelConfig(image_size=(8, 8), channels=1, num_classes=2, network=SMALL_UNET)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_network(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    second, third = build_network(config, seed=1), build_network(config, seed=2)
    assert isinstance(first, UNet)
    assert first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.conv_in.weight, third.get_parameter("conv_in.weight"))


def test_what_the_config_says_reaches_the_unet() -> None:
    schedule = ScheduleConfig(num_timesteps=250, zero_terminal_snr=True)
    unet = dataclasses.replace(SMALL_UNET, prediction_type="v", learned_variance=True)
    config = ModelConfig(image_size=(8, 16), channels=1, network=unet, schedule=schedule)
    net = build_network(config)
    assert isinstance(net, UNet) and net.num_timesteps == 250
    assert net(torch.zeros(2, 1, 8, 16), torch.tensor([0, 249])).shape == (2, 2, 8, 16)


def test_what_the_config_says_reaches_the_dit() -> None:
    config = ModelConfig(
        network=DiTConfig(patch_size=4, hidden_size=16, depth=3, num_heads=2, learned_variance=True),
        image_size=(8, 16),
        channels=1,
        num_classes=2,
        schedule=ScheduleConfig(num_timesteps=250),
    )
    net = build_network(config)
    assert isinstance(net, DiT) and (net.num_timesteps, len(net.blocks), net.null_label) == (250, 3, 2)
    assert net(torch.zeros(2, 1, 8, 16), torch.tensor([0, 249]), torch.tensor([0, 2])).shape == (2, 2, 8, 16)
    again = build_network(config)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
