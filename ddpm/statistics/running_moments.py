"""Means with standard errors, from statistics that merge across batches, workers and machines."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from ddpm.shapes import check_precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over images, and how far it may be off."""

    value: float
    """The mean."""
    standard_error: float
    """Its standard error; NaN if there was only one image."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunningMoments:
    """Count, mean and scatter of D quantities, each with a count of its own. a + b is of both sets, in any grouping.

    Unlike Moments, a quantity may be missing from a sample (a step of the chain that was not drawn), and covariances
    are not kept.
    """

    count: Int64[Tensor, " d"]
    """Number of values of each quantity, int64 [D]."""
    mean: Float64[Tensor, " d"]
    """Mean of each, float64 [D]; 0 where the count is 0."""
    m2: Float64[Tensor, " d"]
    """Sum of squared deviations from the mean, float64 [D]."""

    @classmethod
    def from_samples(cls, samples: Float[Tensor, "n d"]) -> "RunningMoments":
        """Moments of N samples [N, D] in which no quantity is missing; errors as from_entries."""
        num_samples, size = samples.shape
        return cls.from_entries(torch.arange(size).expand(num_samples, size).flatten(), samples.flatten(), size)

    @classmethod
    def from_entries(cls, index: Int[Tensor, " n"], values: Float[Tensor, " n"], size: int) -> "RunningMoments":
        """Moments of values [N] of which each belongs to the quantity index [N], in [0, size).

        Raises:
            ValueError: If values is neither float32 nor float64.
        """
        check_precision("values", values)
        index, values = index.cpu(), values.to("cpu", torch.float64)
        count = torch.bincount(index, minlength=size)
        zeros = torch.zeros(size, dtype=torch.float64)
        mean = zeros.index_add(0, index, values) / count.clamp(min=1)
        return cls(count=count, mean=mean, m2=zeros.index_add(0, index, (values - mean[index]).square()))

    def __add__(self, other: "RunningMoments") -> "RunningMoments":
        """Moments of the two sets together.

        Source:
            Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1).to(torch.float64)
        delta = other.mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta.square() * self.count * share,
        )

    @property
    def variance(self) -> Float64[Tensor, " d"]:
        """Unbiased variance of each quantity [D]; NaN where there are fewer than two values."""
        return torch.where(self.count > 1, self.m2 / (self.count - 1), math.nan)

    @property
    def second_moment(self) -> Float64[Tensor, " d"]:
        """Mean square of each quantity [D]; 0 where there is no value."""
        return self.mean.square() + self.m2 / self.count.clamp(min=1)

    @property
    def standard_error(self) -> Float64[Tensor, " d"]:
        """Standard error of each mean [D]; NaN where there are fewer than two values."""
        return (self.variance / self.count).sqrt()

    def estimate(self, index: int) -> Estimate:
        """Mean and standard error of one quantity."""
        return Estimate(value=float(self.mean[index]), standard_error=float(self.standard_error[index]))


def stratified_standard_error(values: Float[Tensor, " n"], stratum: Int[Tensor, " n"] | None) -> float:
    """Standard error of a mean over images of which each stratum has a fixed number, as generated classes have.

    What the strata differ by is no source of error then, and is left out. NaN if there is no more than one image for
    each stratum: nothing shows their spread.

    Args:
        values: One number for each image [N].
        stratum: Stratum of each image [N], from 0; None if they are drawn without strata.
    """
    values = values.to("cpu", torch.float64)
    index = torch.zeros(len(values), dtype=torch.int64) if stratum is None else stratum.cpu()
    moments = RunningMoments.from_entries(index, values, int(index.max()) + 1)
    spare = len(values) - int((moments.count > 0).sum())
    return math.sqrt(float(moments.m2.sum()) / spare / len(values)) if spare else math.nan


def agreement_standard_error(agreement: float, num_images: int) -> float:
    """Standard error of a share of images, half the Wilson interval of one standard error: not 0 for a share of 1.

    Args:
        agreement: The share, in [0, 1].
        num_images: Images, at least 1.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    spread = agreement * (1 - agreement) / num_images + 1 / (4 * num_images**2)
    return math.sqrt(spread) / (1 + 1 / num_images)
