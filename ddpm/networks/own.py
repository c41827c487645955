"""A network of your own: a factory that is named by its place, "package.module:factory"."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ddpm.networks.network_config import ImageSize, NetworkConfig

_FACTORY_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_IMAGE_KEYWORDS = frozenset({"image_size", "channels", "num_classes"})


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnNetworkConfig(NetworkConfig):
    """A network of your own."""

    name: Literal["own"] = "own"
    """A network of your own."""
    factory: str
    """"package.module:factory": a callable that takes image_size (height, width), channels, num_classes and the options
    as keywords and returns an nn.Module with forward(x_t, t, label), where label num_classes means "no label", and an
    answer of x_t's shape, or with twice the channels for a learned variance."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keywords for the factory."""

    @property
    def title(self) -> str:
        """See NetworkConfig.title."""
        return self.factory

    def check(self) -> None:
        """See NetworkConfig.check."""
        if not _FACTORY_PATH.fullmatch(self.factory):
            raise ValueError(f'factory: must be "package.module:factory", got {self.factory!r}; name your callable')
        reserved = sorted(_IMAGE_KEYWORDS & set(self.options))
        if reserved:
            raise ValueError(f"options: {reserved[0]!r} comes from the dataset, got it here; leave it out")

    def check_fits(self, image_size: ImageSize) -> None:
        """See NetworkConfig.check_fits; which images your network takes is known to it alone."""

    def build(self, *, image_size: ImageSize, channels: int, num_classes: int | None, num_timesteps: int) -> nn.Module:
        """See NetworkConfig.build. Errors raised inside a factory are not changed.

        Raises:
            ValueError: If the factory cannot be imported, is not callable, cannot be called with the keywords, or
                returns something other than a module.
        """
        image = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
        factory = _import_factory(self.factory)
        keywords = {**image, **self.options}
        try:
            inspect.signature(factory).bind(**keywords)
        except TypeError as error:  # bind, not the call: a TypeError from inside the factory is the factory's own
            raise ValueError(
                f"network.options: {self.factory} cannot be called with the keywords {', '.join(keywords)} ({error}); "
                "give it these parameters, or change the options"
            ) from error
        network = factory(**keywords)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"network.factory: {self.factory} must return a torch.nn.Module, got {type(network).__name__}"
            )
        return network


def _import_factory(path: str) -> Callable[..., object]:
    """The callable that "package.module:factory" names."""
    module_name, _, attributes = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line, whatever the error says
        raise ValueError(
            f"network.factory: cannot import {module_name!r} of {path!r} ({reason}); "
            "is it installed, or in the folder where the job was started?"
        ) from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise ValueError(f"network.factory: {path!r} names nothing, {module_name!r} has no {attributes!r}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"network.factory: {path!r} must be callable, got {type(found).__name__}")
    return found
