"""Which network, for which images and schedule: the config of a model, and the network built from it.

Weights are the network's `state_dict`; how config and weights are stored is not decided here.
"""

from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import nn

from ddpm.networks.gradient_checkpointing import switch_on_checkpointing
from ddpm.networks.network_config import ImageSize
from ddpm.networks.registry import AnyNetwork
from ddpm.networks.unet import UNetConfig
from ddpm.process.pixels import NumLevels
from ddpm.process.schedules import ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network, the images it makes and the noise schedule it is trained for."""

    network: AnyNetwork = field(default_factory=UNetConfig)
    """The network, and what it answers with."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise schedule of the training chain."""
    image_size: ImageSize
    """Height and width of the images in pixels."""
    channels: int
    """Channels of the images: 1 for grey, 3 for colour."""
    num_levels: NumLevels = 256
    """Values of a pixel: 256, or 65,536 for images of 16 bits."""
    num_classes: int | None = None
    """Number of classes; None for a network that is not told the class."""

    def __post_init__(self) -> None:
        """Check each field, and that the network fits the images."""
        if min(self.image_size) < 1:
            raise ValueError(f"image_size: must be at least 1 pixel each way, got {self.image_size}")
        if self.channels < 1:
            raise ValueError(f"channels: must be at least 1, got {self.channels}")
        if self.num_levels not in get_args(NumLevels):
            raise ValueError(f"num_levels: must be 256 or 65536, got {self.num_levels}; store images so")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"num_classes: must be at least 1, got {self.num_classes}; leave it out for a network without classes"
            )
        if self.network.prediction_type == "eps" and self.schedule.zero_terminal_snr:
            raise ValueError("network.prediction_type: must be v or x_0 with zero_terminal_snr, got 'eps'; choose v")
        self.network.check_fits(self.image_size)


def build_network(config: ModelConfig, *, seed: int = 0, gradient_checkpointing: bool = False) -> nn.Module:
    """Builds the network with its initial weights, on the CPU, in training mode.

    Args:
        config: Which network.
        seed: Seeds the initial weights. PyTorch's global generator is seeded for the construction only and restored
            afterwards: the same seed gives the same weights whatever was drawn before, and nothing drawn later changes.
        gradient_checkpointing: Keep less in memory in training and compute it twice; see gradient_checkpointing.py.

    Returns:
        A module with forward(x_t [B, C, H, W], t [B], label [B] | None) -> prediction [B, C, H, W], or [B, 2C, H, W]
        with a learned variance.

    Raises:
        ValueError: As NetworkConfig.build; with gradient_checkpointing, if the module does not offer it.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators as well
        network = construct(config)
    if gradient_checkpointing:
        switch_on_checkpointing(network, config.network.title)
    return network


def construct(config: ModelConfig) -> nn.Module:
    """The network with weights from the global generator, on the current default device; errors as build_network."""
    return config.network.build(
        image_size=config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        num_timesteps=config.schedule.num_timesteps,
    )
