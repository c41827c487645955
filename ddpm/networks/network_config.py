"""What every network's configuration offers: a variant per network, each beside its network."""

import abc
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from ddpm.process.prediction import PredictionType
from ddpm.variants import check_variant_name

ImageSize = tuple[int, int]
"""Height and width in pixels."""


def check_one_of(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is not among a Literal's.

    Raises:
        ValueError: Names the field, and all that it may be.
    """
    *others, last = get_args(choices)
    if value not in (*others, last):
        raise ValueError(f"{name}: must be {', '.join(others)} or {last}, got {value!r}; choose one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig(abc.ABC):
    """A network, and what it answers with; the images and the classes come from the dataset."""

    name: str
    """Which network."""
    prediction_type: PredictionType = "eps"
    """What it predicts: the noise eps, the clean image x_0, or v, which a schedule with zero terminal SNR needs."""
    learned_variance: bool = False
    """It answers with twice the channels: the prediction, then v for the variance of a step, which the objective hybrid
    or vlb trains."""

    def __post_init__(self) -> None:
        """Check what all networks share; then, by `check`, the network's own fields."""
        check_variant_name(self)
        check_one_of("prediction_type", self.prediction_type, PredictionType)
        self.check()

    @property
    def title(self) -> str:
        """What messages call the network."""
        return self.name

    @abc.abstractmethod
    def check(self) -> None:
        """Refuse impossible values of the network's own fields.

        Raises:
            ValueError: Names the field.
        """

    @abc.abstractmethod
    def check_fits(self, image_size: ImageSize) -> None:
        """Refuse images that the network cannot take.

        Raises:
            ValueError: Names the field that would have to change.
        """

    @abc.abstractmethod
    def build(self, *, image_size: ImageSize, channels: int, num_classes: int | None, num_timesteps: int) -> nn.Module:
        """The network with initial weights from PyTorch's global generator, on the current default device.

        Args:
            image_size: Height and width of the images in pixels.
            channels: Channels of the images.
            num_classes: Number of classes; None for a network that is not told the class.
            num_timesteps: Length T of the training chain.

        Returns:
            A module with forward(x_t [B, C, H, W], t [B], label [B] | None) -> prediction [B, C, H, W], or
            [B, 2C, H, W] with a learned variance.

        Raises:
            ValueError: If the network does not fit the images or cannot be made.
        """
