"""Pixels of which everything is known: drawn from a few of their levels, and the network that is exact for them."""

import torch
from torch import Tensor

from ddpm import DiffusionModel, NoiseSchedule, Stream, random_integers
from ddpm.process.pixels import NumLevels

FOUR = torch.tensor([0, 40, 90, 255])
"""Levels far apart: both ends and two between, 2 bits."""


class ExactNetwork:
    """x_0_hat = E[x_0 | x_t] for pixels drawn from some of their levels: uniformly, or by their shares."""

    def __init__(
        self, schedule: NoiseSchedule, levels: Tensor, num_levels: NumLevels = 256, share: Tensor | None = None
    ) -> None:
        self.schedule, self.levels = schedule, values_of(levels, num_levels)
        self.log_share = torch.zeros_like(self.levels) if share is None else share.log()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = self.schedule.alpha_bar_at(t)[:, None, None, None, None]
        distance = (x_t[..., None] - abar.sqrt() * self.levels).square()
        return (self.log_share - distance / (2 * (1 - abar))).softmax(-1) @ self.levels


def exact_model(
    schedule: NoiseSchedule, levels: Tensor, size: int, num_levels: NumLevels = 256, share: Tensor | None = None
) -> DiffusionModel:
    """The best model of such images, [1, size, size]."""
    return DiffusionModel(
        network=ExactNetwork(schedule, levels, num_levels, share),
        schedule=schedule,
        image_shape=(1, size, size),
        prediction_type="x_0",
        num_levels=num_levels,
    )


def values_of(levels: Tensor, num_levels: NumLevels = 256) -> Tensor:
    """Where levels lie in [-1, 1], float64."""
    return levels.to(torch.float64) / ((num_levels - 1) / 2) - 1


def images_of(levels: Tensor, ids: Tensor, size: int, num_levels: NumLevels = 256) -> Tensor:
    """Such images, a function of their ids, float64 [B, 1, size, size]."""
    draws = [random_integers(3, Stream.EVAL_X_0, ids, draw, len(levels)) for draw in range(size * size)]
    return values_of(levels[torch.stack(draws, dim=1)], num_levels).reshape(-1, 1, size, size)
