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

    **Biased upwards**: of N samples it is on average about the distance of their distribution plus c / N, where c
    depends on the distribution and on the features (Chong & Forsyth 2020); no estimate without bias exists (Binkowski
    et al. 2018). Two distances may be compared only at the same N, and only as far as the standard errors allow that
    come from `frechet_influence`. Of the digits' raw pixels it is 0.45 between 100 real images and the 297 held-out
    ones, 0.23 with 300, 0.14 with 1,500: the same distribution every time.

    Args:
        a: Moments of one set.
        b: Moments of the other, same D.

    Returns:
        The distance, at least 0 up to rounding.

    Raises:
        ValueError: If the dimensions differ or a set has fewer than two vectors.

    Source:
        Dowson and Landau 1982; Heusel et al. 2017 (arXiv:1706.08500). Bias: Binkowski et al. 2018 (arXiv:1801.01401),
        section 4 and appendix D; Chong and Forsyth 2020 (arXiv:1911.07023), section 3.
    """
    _check_dimensions(a, b)
    cross = torch.linalg.svdvals(_Root.of(a).factor.T @ _Root.of(b).factor).sum()
    trace = a.covariance().trace() + b.covariance().trace()
    return float((a.mean - b.mean).square().sum() + trace - 2 * cross)


def frechet_influence(samples: Float[Tensor, "n d"], a: Moments, b: Moments) -> Float64[Tensor, " n"]:
    """How much each vector of a set moves its Frechet distance to another one, to first order.

    The derivative of frechet_distance(a, b) as weight moves from the whole of a to one of its vectors x. With T the
    linear map that carries Gaussian a to Gaussian b, where both are centred,

        2 (mean_a - mean_b) . (x - mean_a) + (x - mean_a)^T (I - T) (x - mean_a) - tr((I - T) C_a).

    Over all vectors of a the mean is 0. Their spread by sqrt(N) is the standard error of the distance (infinitesimal
    jackknife; `stratified_standard_error`), and the spread of the differences between two sets that were made from the
    same noise is that of the difference of their distances. To first order only: of Gaussians in the digits' 64 pixels
    it is within a tenth of the true spread for 20 to 1,000 vectors (a bootstrap of 100 is a third too large). Where
    both sets are of one distribution the first order vanishes, and the error is up to sqrt(2) too large.

    Args:
        samples: Vectors [N, D], those of a or some of them, in any floating dtype.
        a: Moments of their whole set; the distance is symmetric, so that either set may be this one.
        b: Moments of the other set, same D.

    Returns:
        One number for each vector, float64 [N].

    Raises:
        ValueError: As frechet_distance.

    Source:
        Jaeckel 1972 (infinitesimal jackknife); Olkin and Pukelsheim 1982, "The distance between two random vectors
        with given dispersion matrices" (T).
    """
    _check_dimensions(a, b)
    root = _Root.of(a)
    u, s, _ = torch.linalg.svd(root.factor.T @ _Root.of(b).factor)
    deviation = samples.to(torch.float64) - a.mean
    # x^T T x = sum_k s_k z_k^2 with z = U^T L_a^+ x: what lies outside the span of a carries no weight.
    z = deviation @ root.inverse_factor @ u
    along_mean = 2 * deviation @ (a.mean - b.mean)
    expected = (a.covariance().trace() - s.sum()) * (a.count - 1) / a.count
    influence: Tensor = along_mean + deviation.square().sum(1) - z.square() @ s - expected
    return influence


def _check_dimensions(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b: must have a's dimension {len(a.mean)}, got {len(b.mean)}; use the same features")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Root:
    """L with L L^T = covariance, in eigenvectors; eigenvalues that are only rounding are 0."""

    vectors: Float64[Tensor, "d d"]
    deviations: Float64[Tensor, " d"]

    @classmethod
    def of(cls, moments: Moments) -> "_Root":
        values, vectors = torch.linalg.eigh(moments.covariance())
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        return cls(vectors=vectors, deviations=torch.where(values > rounding, values, 0.0).sqrt())

    @property
    def factor(self) -> Float64[Tensor, "d d"]:
        return self.vectors * self.deviations

    @property
    def inverse_factor(self) -> Float64[Tensor, "d d"]:
        """Transpose of L's pseudo-inverse."""
        return self.vectors * torch.where(self.deviations > 0, 1 / self.deviations, 0.0)
