"""Data for which everything is known: mixtures of Gaussians in one dimension, and the network that is exact for them.

For x_0 from a mixture, x_t is from a mixture too, and the best prediction of x_0 is a weighted mean of the components'.
The probability-flow equation carries quantiles to quantiles, so that its exact solution is a pair of distribution
functions: no solver is needed to judge a solver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm import NetworkDenoiser, NoiseSchedule, PredictionType

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Mixture:
    """sum_k weight_k N(mean_k, variance_k), for each pixel on its own."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def components(self, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and variances of x_t; the components are the last dimension."""
        weights, means, variances = torch.tensor((self.weights, self.means, self.variances), dtype=torch.float64)
        alpha_bar = alpha_bar[..., None]
        return weights, alpha_bar.sqrt() * means, alpha_bar * variances + 1 - alpha_bar

    def mean_and_variance(self, alpha_bar: float) -> tuple[float, float]:
        """Of x_t."""
        weights, means, variances = self.components(torch.tensor(alpha_bar, dtype=torch.float64))
        mean = float((weights * means).sum())
        return mean, float((weights * (variances + means**2)).sum()) - mean**2

    def posterior(self, x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_0 | x_t), a mixture too: weights, means and variances; exact also where alpha_bar is 0."""
        weights, means, variances = self.components(alpha_bar)
        distance = x_t[..., None] - means
        posterior = (weights.log() - 0.5 * (distance**2 / variances + variances.log())).softmax(-1)
        _, start, width = torch.tensor((self.weights, self.means, self.variances), dtype=torch.float64)
        centre = start + alpha_bar.sqrt()[..., None] * width / variances * distance
        return posterior, centre, width * (1 - alpha_bar)[..., None] / variances

    def x_0_hat(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """E[x_0 | x_t]."""
        weights, means, _ = self.posterior(x_t, alpha_bar)
        return (weights * means).sum(-1)

    def network(self, schedule: NoiseSchedule, prediction_type: PredictionType = "eps") -> Network:
        """The best network there can be, in float64, for integer and float t."""

        def predict(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            alpha_bar = schedule.alpha_bar_at(t)[:, None, None, None]
            x_0_hat = self.x_0_hat(x_t, alpha_bar)
            eps_hat = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
            v_hat = alpha_bar.sqrt() * eps_hat - (1 - alpha_bar).sqrt() * x_0_hat
            return {"eps": eps_hat, "x_0": x_0_hat, "v": v_hat}[prediction_type]

        return predict

    def denoiser(self, schedule: NoiseSchedule) -> NetworkDenoiser:
        """The same as a denoiser, without clipping."""
        return NetworkDenoiser(network=self.network(schedule), schedule=schedule, clip_x_0=False)

    def expectation(self, f: Callable[[Tensor, Tensor], Tensor], alpha_bar: Tensor) -> Tensor:
        """E f(x_t, alpha_bar), float64 [T], by the trapezoidal rule: as good as exact for so smooth a function."""
        weights, means, variances = self.components(alpha_bar)
        x = torch.linspace(-8, 8, 401, dtype=torch.float64)[:, None, None]
        density = (weights / (2 * math.pi * variances).sqrt() * (-((x - means) ** 2) / (2 * variances)).exp()).sum(-1)
        x_t, alpha_bar = x[..., 0].expand(-1, len(alpha_bar)), alpha_bar.expand(len(x), -1)
        return torch.trapezoid(density * f(x_t, alpha_bar), x[:, 0, 0], dim=0)

    def x_0_error(self, alpha_bar: Tensor) -> Tensor:
        """E[(x_0 - x_0_hat)^2], float64 [T]: the variance of p(x_0 | x_t), without a difference of like numbers."""

        def variance(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
            weights, means, variances = self.posterior(x_t, alpha_bar)
            return (weights * (variances + (means - (weights * means).sum(-1, keepdim=True)) ** 2)).sum(-1)

        return self.expectation(variance, alpha_bar)

    def cumulative(self, x: Tensor, alpha_bar: float) -> Tensor:
        """Distribution function of x_t."""
        weights, means, variances = self.components(torch.tensor(alpha_bar, dtype=torch.float64))
        return (weights * 0.5 * torch.erfc((means - x[..., None]) / (2 * variances).sqrt())).sum(-1)

    def flow(self, x: Tensor, alpha_bar_from: float, alpha_bar_to: float) -> Tensor:
        """Where the probability flow carries x: to the same quantile, found by bisection."""
        quantile = self.cumulative(x, alpha_bar_from)
        low, high = torch.full_like(x, -20), torch.full_like(x, 20)
        for _ in range(80):
            middle = (low + high) / 2
            beyond = self.cumulative(middle, alpha_bar_to) > quantile
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return low


GAUSSIAN = Mixture(weights=(1.0,), means=(0.7,), variances=(0.25,))
"""The data of the numbers that are known for ancestral sampling."""
TWO_MODES = Mixture(weights=(0.4, 0.6), means=(-0.6, 0.5), variances=(0.0225, 0.0625))
"""Two modes that hardly overlap: the flow bends sharply between them."""
SKEWED = Mixture(weights=(0.4, 0.6), means=(-0.5, 0.5), variances=(0.16, 0.25))
"""Not Gaussian, but smooth enough for quadrature."""


def affine_moments(
    sample: Callable[[Tensor, Callable[[int], Tensor]], Tensor],
    num_draws: int,
    mean_T: float,
    variance_T: float,
) -> tuple[float, float]:
    """Mean and variance of what a sampler returns on Gaussian data, from those of x_T, without Monte Carlo.

    With the exact network every sampler is affine in x_T and in all of its noise. Its coefficients are read off by
    running the real code on a batch: nothing, x_T = 1, and each draw = 1 in turn.
    """
    x_T = torch.zeros(num_draws + 2, 1, 1, 1, dtype=torch.float64)
    x_T[1] = 1

    def noise(draw: int) -> Tensor:
        z = torch.zeros_like(x_T)
        z[1 + draw] = 1
        return z

    answer = sample(x_T, noise).flatten()
    constant, slopes = float(answer[0]), answer[1:] - answer[0]
    mean = constant + float(slopes[0]) * mean_T
    return mean, float(slopes[0]) ** 2 * variance_T + math.fsum(slopes[1:].square().tolist())
