"""Exponential moving averages of a network's weights, with their memory given as a half-life in images.

In images, so that the average stays the same when the batch size changes.
"""

import abc
import math
from collections.abc import Collection, Iterable, Mapping

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

_TENSORS_AT_ONCE = 64
"""Whose differences are in memory at the same time."""


class WeightAverage(abc.ABC):
    """An average of a network's weights over its training, in the dtype and on the device of the network.

    Buffers are copied, not averaged.

    Args:
        model: The network; its present weights are the first average.
        names: Which of the tensors in its state_dict are averaged here, for several processes that share the work; None
            for all.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Start from the model's weights."""
        parameters, state = {name for name, _ in model.named_parameters(remove_duplicate=False)}, model.state_dict()
        device = next(iter(state.values())).device
        self._state = {name: one.detach().clone() for name, one in state.items() if names is None or name in names}
        self._averaged = [name for name in self._state if name in parameters]
        self._copied = [name for name in self._state if name not in parameters]
        self._num_images = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_images(self) -> int:
        """Images taken in so far; to read it waits for the device.

        It is not part of the state; load_state_dict is told.
        """
        return int(self._num_images)

    @abc.abstractmethod
    def _share(self, num_images: Int64[Tensor, ""]) -> Float64[Tensor, ""]:
        """Share of the present weights in the average after a step on num_images images; the rest is the old one's."""

    @torch.no_grad()
    def update(self, model: nn.Module, num_images: int | Int64[Tensor, ""]) -> None:
        """Take in the model's weights after a step on num_images images; nothing waits for the device.

        Args:
            model: The network.
            num_images: 0 after a step that was skipped: nothing changes then, whatever the model's buffers hold. Where
                the device alone knows whether it was, a 0-dim tensor there.
        """
        if not isinstance(num_images, Tensor):
            num_images = torch.full_like(self._num_images, num_images)
        is_step = num_images > 0
        share = torch.where(is_step, self._share(num_images), 0.0)
        present = model.state_dict()
        _lerp([self._state[name] for name in self._averaged], [present[name] for name in self._averaged], share)
        for name in self._copied:
            self._state[name].copy_(torch.where(is_step, present[name], self._state[name]))
        self._num_images += num_images

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's own names, those of `names`; not copies, later updates change them."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor], *, num_images: int = 0) -> None:
        """Go on from stored averages.

        Args:
            state: What state_dict gave.
            num_images: Images that these averages had taken in. An average with a constant half-life does not need it.

        Raises:
            ValueError: If the names or shapes are not this model's.
        """
        check_state(state, self._state)
        for name, tensor in state.items():
            self._state[name].copy_(tensor)
        self._num_images.fill_(num_images)

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into a model of the same architecture."""
        model.load_state_dict(self._state)


def _lerp(averages: list[Tensor], weights: list[Tensor], share: Float64[Tensor, ""]) -> None:
    """Averages + share (weights - averages), in their place."""
    if share.device.type != "cpu":
        _lerp_many(averages, weights, share)
        return
    for average, weight in zip(averages, weights):
        average.lerp_(weight, share.to(average.dtype))  # one pass over the memory


def _lerp_many(averages: list[Tensor], weights: list[Tensor], share: Float64[Tensor, ""]) -> None:
    """The same for an accelerator, where hundreds of tensors would be hundreds of kernels."""
    for first in range(0, len(averages), _TENSORS_AT_ONCE):
        some = averages[first : first + _TENSORS_AT_ONCE]
        differences = torch._foreach_sub(weights[first : first + _TENSORS_AT_ONCE], some)
        torch._foreach_mul_(differences, share.to(some[0].dtype))
        torch._foreach_add_(some, differences)


def check_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a state that has other names or shapes than a network's own.

    Raises:
        ValueError: With the first names, or the first shape, that differ.
    """
    if state.keys() != own.keys():
        odd = ", ".join(sorted(state.keys() ^ own.keys())[:4])
        raise ValueError(f"state: must have the model's names, got a difference at {odd}; load the same network's")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"state: {name} must have shape {list(own[name].shape)}, got {list(tensor.shape)}; "
                "load the same network's"
            )


class Ema(WeightAverage):
    """The exponential average: after halflife_images more images, what was in it weighs half as much.

    Args:
        model: The network; its present weights are the first average.
        halflife_images: Half-life in images, above 0. Ho et al.'s decay of 0.9999 at batch 128 is 887,000 images.
        ramp_up_ratio: None for a constant half-life; otherwise the half-life is at most this share of the images seen
            before, so that the random first weights are forgotten early. 0.05 is usual.
        names: As in WeightAverage.

    Raises:
        ValueError: If halflife_images or ramp_up_ratio is not above 0.

    Source:
        Karras et al. 2022 (arXiv:2206.00364), appendix F.2, for the half-life in images and the ramp-up.
    """

    def __init__(
        self,
        model: nn.Module,
        halflife_images: int | float,
        *,
        ramp_up_ratio: float | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        """Start from the model's weights."""
        if not halflife_images > 0:
            raise ValueError(f"halflife_images: must be above 0, got {halflife_images}; 500000 is a good start")
        if ramp_up_ratio is not None and not ramp_up_ratio > 0:
            raise ValueError(f"ramp_up_ratio: must be above 0, got {ramp_up_ratio}; 0.05 is usual, None is without")
        super().__init__(model, names)
        self.halflife_images = halflife_images
        self.ramp_up_ratio = ramp_up_ratio

    def _share(self, num_images: Int64[Tensor, ""]) -> Float64[Tensor, ""]:
        """1 - 0.5 ** (num_images / halflife_images), with a shorter half-life while it ramps up; 1 at first."""
        halflife_images = torch.full_like(num_images, self.halflife_images, dtype=torch.float64)
        if self.ramp_up_ratio is not None:
            halflife_images = (self.ramp_up_ratio * self._num_images.double()).clamp(max=self.halflife_images)
        # expm1: without cancellation. Of a half-life of 0 it is that of minus infinity.
        return -torch.expm1(-math.log(2) * num_images.double() / halflife_images)


class EmaBank:
    """Averages of one network with several half-lives: which one is best is known only when they are sampled.

    `bank[halflife_images]` is one of them.

    Args:
        model: The network; its present weights are the first average of each.
        halflives_images: Half-lives in images, distinct, each above 0.
        ramp_up_ratio: As in Ema, for all of them.
        names: As in WeightAverage.

    Raises:
        ValueError: If there is no half-life, or one twice, or as Ema.
    """

    def __init__(
        self,
        model: nn.Module,
        halflives_images: Iterable[int | float],
        *,
        ramp_up_ratio: float | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        """Start from the model's weights."""
        halflives = tuple(halflives_images)
        if not halflives or len(set(halflives)) < len(halflives):
            raise ValueError(f"halflives_images: must be distinct and at least one, got {halflives}; drop repeats")
        self._averages = {
            halflife: Ema(model, halflife, ramp_up_ratio=ramp_up_ratio, names=names) for halflife in halflives
        }

    @property
    def halflives_images(self) -> tuple[int | float, ...]:
        """The half-lives, in the order given."""
        return tuple(self._averages)

    def __getitem__(self, halflife_images: int | float) -> Ema:
        """The average with one of the half-lives.

        Raises:
            KeyError: If there is none with this half-life.
        """
        return self._averages[halflife_images]

    def update(self, model: nn.Module, num_images: int | Int64[Tensor, ""]) -> None:
        """Update every average, as Ema.update does."""
        for average in self._averages.values():
            average.update(model, num_images)

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, under "half-life/name"; not copies."""
        return {
            f"{halflife}/{name}": tensor
            for halflife, average in self._averages.items()
            for name, tensor in average.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *, num_images: int = 0) -> None:
        """Go on from stored averages.

        Args:
            state: What state_dict gave.
            num_images: Images that these averages had taken in, for the ramp-up.

        Raises:
            ValueError: If the half-lives are not these, or as Ema.load_state_dict.
        """
        parts: dict[str, dict[str, Tensor]] = {str(halflife): {} for halflife in self._averages}
        for key, tensor in state.items():
            halflife, _, name = key.partition("/")
            if halflife not in parts:
                raise ValueError(f"state: must have the half-lives {', '.join(parts)}, got {key}; configure the same")
            parts[halflife][name] = tensor
        for average, part in zip(self._averages.values(), parts.values(), strict=True):
            average.load_state_dict(part, num_images=num_images)
