"""Exponential moving average of a network's weights, with its memory given as a half-life in images.

In images, so that the average stays the same when the batch size changes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """The averaged weights, in the dtype and on the device of the model.

    After halflife_images more images, what was in the average weighs half as much. Buffers are copied, not averaged.

    Args:
        model: The network; its present weights are the first average.
        halflife_images: Half-life in images, above 0. Ho et al.'s decay of 0.9999 at batch 128 is 887,000 images.

    Raises:
        ValueError: If halflife_images is not above 0.
    """

    def __init__(self, model: nn.Module, halflife_images: int | float) -> None:
        """Start from the model's weights."""
        if not halflife_images > 0:
            raise ValueError(f"halflife_images: must be above 0, got {halflife_images}; 500000 is a good start")
        self.halflife_images = halflife_images
        self._averaged = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, num_images: int) -> None:
        """Take in the model's weights after a step on num_images images: average = d average + (1 - d) weights.

        d = 0.5 ** (num_images / halflife_images).
        """
        weight = -math.expm1(-math.log(2) * num_images / self.halflife_images)  # 1 - d without cancellation
        for name, tensor in model.state_dict().items():
            if name in self._averaged:
                self._state[name].lerp_(tensor, weight)
            else:
                self._state[name].copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's own names; not copies, later updates change them."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from stored averages.

        Raises:
            ValueError: If the names or shapes are not this model's.
        """
        if state.keys() != self._state.keys():
            odd = ", ".join(sorted(state.keys() ^ self._state.keys())[:4])
            raise ValueError(f"state: must have the model's names, got a difference at {odd}; load the same network's")
        for name, tensor in state.items():
            if tensor.shape != self._state[name].shape:
                raise ValueError(
                    f"state: {name} must have shape {list(self._state[name].shape)}, got {list(tensor.shape)}; "
                    "load the same network's"
                )
            self._state[name].copy_(tensor)

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into a model of the same architecture."""
        model.load_state_dict(self._state)
