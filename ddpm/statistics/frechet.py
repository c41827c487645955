"""Distances between sets of images, from statistics that merge across shards."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ddpm.shapes import check_precision


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Count, mean and scatter of feature vectors. a + b is the Moments of both sets together, in any grouping."""

    count: int
    """Number of vectors."""
    mean: Float64[Tensor, " d"]
    """Mean, float64 [D]."""
    m2: Float64[Tensor, "d d"]
    """Sum of outer products of the deviations from the mean, float64 [D, D]."""

    @classmethod
    def from_samples(cls, samples: Float[Tensor, "n d"]) -> "Moments":
        """Moments of some vectors [N, D], N >= 1, float32 or float64.

        Raises:
            ValueError: If there is no vector, or they have fewer digits, whose rounding would count as variance.
        """
        check_precision("samples", samples)
        if len(samples) == 0:
            raise ValueError("samples: must hold at least one vector, got none; skip empty shards")
        x = samples.to(torch.float64)
        mean = x.mean(dim=0)
        deviation = x - mean
        return cls(count=len(x), mean=mean, m2=deviation.T @ deviation)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the two sets together.

        Source:
            Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + torch.outer(delta, delta) * (self.count * other.count / count),
        )

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased covariance [D, D].

        Raises:
            ValueError: If there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"count: must be at least 2 for a covariance, got {self.count}; collect more images")
        return self.m2 / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Singular covariances (fewer images than dimensions, constant pixels) are no trouble: with C = L L^T, the trace of
    the root is the sum of the singular values of L_a^T L_b, so that no root of a product is needed.

    Args:
        a: Moments of one set.
        b: Moments of the other, same D.

    Returns:
        The distance, at least 0 up to rounding.

    Raises:
        ValueError: If the dimensions differ or a set has fewer than two vectors.

    Source:
        Dowson and Landau 1982; Heusel et al. 2017 (arXiv:1706.08500).
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b: must have a's dimension {len(a.mean)}, got {len(b.mean)}; use the same features")
    covariance_a, covariance_b = a.covariance(), b.covariance()
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float(distance)


def _factor(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """L with L L^T = covariance; eigenvalues that are only rounding become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor: Tensor = vectors * torch.where(values > rounding, values, 0.0).sqrt()
    return factor
