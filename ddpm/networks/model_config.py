"""Which network, for which images and schedule: the config of a model, and the network built from it.

Weights are the network's `state_dict`; how config and weights are stored is not decided here.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.networks.dit import DiT, DiTConfig, grid_size
from ddpm.networks.gradient_checkpointing import switch_on_checkpointing
from ddpm.networks.unet import UNet, UNetConfig, level_resolutions
from ddpm.process.prediction import PredictionType
from ddpm.process.schedules import ScheduleConfig

_FACTORY_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
BUILT_IN_NETWORKS = {"unet": "U-Net", "dit": "DiT"}  # ModelConfig.model, and the name in messages
_IMAGE_KEYWORDS = frozenset({"image_size", "channels", "num_classes"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network, the images it makes and the noise schedule it is trained for."""

    model: str = "unet"
    """"unet", "dit", or your own network as "package.module:factory": a callable that takes image_size, channels,
    num_classes and the model_options as keywords and returns an nn.Module with forward(x_t, t, label)."""
    model_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keywords for your own factory; the U-Net and the DiT take none."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Shape of the U-Net; ignored when model names another network."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """Shape of the DiT; ignored when model names another network."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Noise schedule of the training chain."""
    prediction_type: PredictionType = "eps"
    """What the network predicts: the noise eps, the clean image x_0, or v, which a schedule with zero terminal SNR
    needs."""
    learned_variance: bool = False
    """The network predicts the variance of a step too, in as many channels again; your own one must do so itself."""
    image_size: int
    """Height and width of the images in pixels."""
    channels: int
    """Channels of the images: 1 for grey, 3 for colour."""
    num_classes: int | None = None
    """Number of classes; None for a network that is not told the class."""

    def __post_init__(self) -> None:
        """Check each field, and that the network fits the images."""
        if self.image_size < 1:
            raise ValueError(f"image_size: must be at least 1 pixel, got {self.image_size}")
        if self.channels < 1:
            raise ValueError(f"channels: must be at least 1, got {self.channels}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"num_classes: must be at least 1, got {self.num_classes}; leave it out for a network without classes"
            )
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type: must be eps, x_0 or v, got {self.prediction_type!r}; choose one of them"
            )
        if self.prediction_type == "eps" and self.schedule.zero_terminal_snr:
            raise ValueError("prediction_type: must be v or x_0 with zero_terminal_snr, got 'eps'; choose v")
        if self.model in BUILT_IN_NETWORKS:
            if self.model_options:
                raise ValueError(
                    f"model_options: the {BUILT_IN_NETWORKS[self.model]} takes none, got {sorted(self.model_options)}; "
                    f"its shape is set by {self.model}"
                )
            if self.model == "unet":
                level_resolutions(self.unet, self.image_size)
            else:
                grid_size(self.dit, self.image_size)
            return
        if not _FACTORY_PATH.fullmatch(self.model):
            raise ValueError(f'model: must be "unet", "dit" or "package.module:factory", got {self.model!r}')
        reserved = sorted(_IMAGE_KEYWORDS & set(self.model_options))
        if reserved:
            raise ValueError(
                f"model_options: {reserved[0]!r} is a field of its own; set {reserved[0]} beside model_options"
            )


def build_model(config: ModelConfig, *, seed: int = 0, gradient_checkpointing: bool = False) -> nn.Module:
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
        ValueError: If the factory cannot be imported, is not callable, cannot be called with the keywords, or returns
            something other than a module or, with gradient_checkpointing, a module that does not offer it. Errors
            raised inside a factory are not changed.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators as well
        network = _construct(config)
    if gradient_checkpointing:
        switch_on_checkpointing(network, config.model)
    return network


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_image(config: ModelConfig) -> int:
    """Floating-point operations of one forward pass for one image.

    Args:
        config: Which network.

    Returns:
        Operations of convolutions and matrix products, a multiplication and an addition counted as two: 12.44e9 for the
        CIFAR-10 network of Ho et al. 2020, of which 0.34e9 are the two products inside attention (counters that do not
        see into PyTorch's attention say 12.1e9). Norms and activations, not counted, add about one percent. A training
        step takes about three times as many.

    Raises:
        ValueError: As `build_model`.
    """
    try:
        # Shapes only: no memory and no arithmetic, whatever the size of the network.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _count_flops(_construct(config), config)
    except Exception:  # a network of the user's own may look at values, which fails in many ways
        return _count_flops(build_model(config), config)


def _count_flops(network: nn.Module, config: ModelConfig) -> int:
    """Counts one forward pass; the operands are made on the current default device, where the network is."""
    x_t = torch.zeros(1, config.channels, config.image_size, config.image_size)
    t = torch.zeros(1, dtype=torch.int64)
    label: Tensor | None = None if config.num_classes is None else torch.zeros(1, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # The fused kernels for the CPU are unknown to the counter; the plain formula is matrix products that it sees.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network.eval()(x_t, t, label)
    return int(counter.get_total_flops())


def _construct(config: ModelConfig) -> nn.Module:
    if config.model in BUILT_IN_NETWORKS:
        make = partial(UNet, config.unet) if config.model == "unet" else partial(DiT, config.dit)
        return make(
            image_size=config.image_size,
            channels=config.channels,
            num_classes=config.num_classes,
            learned_variance=config.learned_variance,
            num_timesteps=config.schedule.num_timesteps,
        )
    image = {"image_size": config.image_size, "channels": config.channels, "num_classes": config.num_classes}
    factory = _import_factory(config.model)
    keywords = {**image, **config.model_options}
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:  # bind, not the call: a TypeError from inside the factory is the factory's own
        raise ValueError(
            f"model_options: {config.model} cannot be called with the keywords {', '.join(keywords)} ({error}); "
            "give it these parameters, or change model_options"
        ) from error
    network = factory(**keywords)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model: {config.model} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _import_factory(path: str) -> Callable[..., object]:
    """The callable that "package.module:factory" names."""
    module_name, _, attributes = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line, whatever the error says
        raise ValueError(
            f"model: cannot import {module_name!r} of {path!r} ({reason}); "
            "is it installed, or in the folder where the job was started?"
        ) from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise ValueError(f"model: {path!r} names nothing, {module_name!r} has no {attributes!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"model: {path!r} must be callable, got {type(found).__name__}")
    return found
