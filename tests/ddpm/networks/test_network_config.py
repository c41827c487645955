"""What every network's config keeps to, and a network that nobody registered."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ddpm import DiTConfig, ModelConfig, NetworkConfig, OwnNetworkConfig, UNetConfig, build_network
from ddpm.networks.network_config import ImageSize


@pytest.mark.parametrize("make", [UNetConfig, DiTConfig, lambda **fields: OwnNetworkConfig(factory="a:b", **fields)])
def test_what_a_network_answers_with(make: Any) -> None:
    assert make().prediction_type == "eps" and not make().learned_variance
    for prediction_type in ("eps", "x_0", "v"):
        assert make(prediction_type=prediction_type, learned_variance=True).prediction_type == prediction_type
    with pytest.raises(ValueError, match=r"^prediction_type: must be eps, x_0 or v, got 'flow'; choose one of them"):
        make(prediction_type="flow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixelwise(NetworkConfig):
    """A convolution of one pixel, for images no wider than high."""

    name: str = "pixelwise"
    bias: bool = True

    def check(self) -> None:
        if not self.bias:
            raise ValueError("bias: must be on, got False; leave it on")

    def check_fits(self, image_size: ImageSize) -> None:
        if image_size[1] > image_size[0]:
            raise ValueError(f"image_size: must be no wider than high, got {image_size}; turn the images")

    def build(self, *, image_size: ImageSize, channels: int, num_classes: int | None, num_timesteps: int) -> nn.Module:
        network = nn.Conv2d(channels, channels * (2 if self.learned_variance else 1), 1)
        network.register_buffer("seen", torch.tensor([*image_size, num_classes or 0, num_timesteps]))
        return network


def test_a_network_that_nobody_registered() -> None:
    """Checked, fitted to its images and built like the others: nothing but its config is needed."""
    network: Any = Pixelwise(learned_variance=True)
    built = build_network(ModelConfig(network=network, image_size=(8, 6), channels=2, num_classes=3), seed=4)
    assert built.get_buffer("seen").tolist() == [8, 6, 3, 1000] and built.training
    assert built.get_parameter("weight").shape == (4, 2, 1, 1)
    again = build_network(ModelConfig(network=network, image_size=(8, 6), channels=2), seed=4)
    assert torch.equal(built.get_parameter("weight"), again.get_parameter("weight"))
    with pytest.raises(ValueError, match=r"^image_size: must be no wider than high, got \(6, 8\)"):
        ModelConfig(network=network, image_size=(6, 8), channels=2)
    with pytest.raises(ValueError, match=r"^bias: "):
        Pixelwise(bias=False)
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: pixelwise does not offer it"):
        build_network(ModelConfig(network=network, image_size=(8, 6), channels=2), gradient_checkpointing=True)
