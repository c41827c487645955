"""What the benchmark of a GPU trains: the presets' networks, in four ways, and a peer's of the same shape."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ddpm import ModelConfig, ObjectiveConfig, ScheduleConfig, UNetConfig
from ddpm.interop.diffusers_weights import diffusers_config
from pipeline.models.network_pass import Precision
from pipeline.preset_networks import ADM_64, HO_256, HO_CIFAR10


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A network in training."""

    model: ModelConfig
    """The network, its images and its schedule."""
    batch: int
    """Images of a step; halved while they do not fit."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    gradient_checkpointing: bool = False
    """As in TrainConfig."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """How a network is evaluated in training; fields as in TrainConfig."""

    precision: Precision
    """Of the network's operations."""
    compile: bool = False
    """Whether PyTorch compiles the network."""
    channels_last: bool = False
    """Layout of images and convolutions."""


def _of_ho(network: UNetConfig, size: int) -> ModelConfig:
    return ModelConfig(network=network, schedule=ScheduleConfig(name="linear"), image_size=(size, size), channels=3)


_TINY = UNetConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)
CASES = {
    "cifar10-128": Case(model=_of_ho(HO_CIFAR10, 32), batch=128),
    "cifar10-1024": Case(model=_of_ho(HO_CIFAR10, 32), batch=1024),
    "imagenet64": Case(
        model=ModelConfig(
            network=ADM_64,
            schedule=ScheduleConfig(name="cosine"),
            image_size=(64, 64),
            channels=3,
            num_classes=1000,
        ),
        batch=128,
        objective=ObjectiveConfig(name="hybrid"),
        gradient_checkpointing=True,
    ),
    "celebahq256": Case(model=_of_ho(HO_256, 256), batch=32),
    "tiny": Case(model=_of_ho(_TINY, 8), batch=4),
}
"""By name; "tiny" is for tests, and is run only where it is named."""
MODES = {
    "float32": Mode(precision="float32"),
    "tf32": Mode(precision="tf32"),
    "bf16": Mode(precision="bf16"),
    "bf16-compiled": Mode(precision="bf16", compile=True, channels_last=True),
}


class Peer(nn.Module):
    """Diffusers' network of the same shape, called as ours is.

    Raises:
        ImportError: If diffusers is not installed.
        ValueError: If it has no such network.
    """

    def __init__(self, case: Case) -> None:
        """Build it with its own first weights."""
        from diffusers import UNet2DModel  # the one use of it outside the tests

        super().__init__()
        model = case.model
        if not isinstance(model.network, UNetConfig):
            raise ValueError(f"network: {type(model.network).__name__} has no counterpart; leave the peer out")
        keywords = diffusers_config(
            model.network, image_size=model.image_size, channels=model.channels, num_classes=model.num_classes
        )
        make: Any = UNet2DModel  # it is not typed
        self.unet = make(**keywords)
        if case.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The prediction."""
        prediction: Tensor = self.unet(x_t, t, class_labels=label).sample
        return prediction
