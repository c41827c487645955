"""Bits per dimension of images under the variational bound: L_T + sum of L_{t-1} + L_0, streaming over a data set.

    bound = bound_of_images(model, config, seed=..., sample_ids=..., x_0=..., label=...)   one batch
    total = BoundStatistics.of(bound) + BoundStatistics.of(another) + ...                              in any grouping
    total.bits_per_dim                                                              the mean and its standard error

The bound is an upper one. Either every term of an image is evaluated, or a few at random t, which is unbiased for their
sum. Noise and t are functions of (seed, sample id, term): two models measured with one seed share them, so that the
standard error of their difference is that of `RunningMoments` over the differences, image by image.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ddpm.likelihood.terms import PerSampleBits, bound_term, prior_loss
from ddpm.model import DiffusionModel
from ddpm.noise import Stream, random_words, standard_normal
from ddpm.process.diffusion import Variance
from ddpm.process.random_steps import importance_probabilities, timestep_in_stratum, timestep_of_word
from ddpm.process.spacing import Spacing, spaced_timesteps
from ddpm.shapes import Images, Labels, Steps
from ddpm.statistics.running_moments import Estimate, RunningMoments


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodConfig:
    """Which bound is measured, and how much of it per image."""

    variance: Variance = "fixed_small"
    """Variance of a step: the posterior's (fixed_small), beta (fixed_large) or the network's own (learned_range)."""
    clip_x_0: bool = True
    """Clip each predicted image to [-1, 1], as Ho et al. do; the bound is that of the model so clipped."""
    num_steps: int | None = None
    """Steps of the chain whose bound it is; None for all that were trained."""
    spacing: Spacing = "linspace"
    """Which trained steps a shorter chain visits."""
    terms: Literal["all", "uniform", "stratified", "importance"] = "all"
    """all: every term of every image. uniform, stratified, importance: terms_per_image of them at random t; stratified
    takes one from each of as many parts of the chain."""
    terms_per_image: int = 0
    """Network evaluations per image; 0 with terms = all, which takes one per step."""

    def __post_init__(self) -> None:
        """Refuse impossible values, counts that would be ignored, and a variance that would need a table."""
        if self.variance == "analytic":
            raise ValueError("variance: analytic is for sampling only, got it for a bound; choose a fixed variance")
        if self.terms not in ("all", "uniform", "stratified", "importance"):
            raise ValueError(f"terms: must be all, uniform, stratified or importance, got {self.terms!r}; choose one")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {self.num_steps}; leave it out for all steps")
        if self.terms == "all" and self.terms_per_image != 0:
            raise ValueError(f"terms_per_image: is for random t, got {self.terms_per_image} with all; leave it out")
        if self.terms != "all" and self.terms_per_image < 1:
            raise ValueError(f"terms_per_image: must be at least 1, got {self.terms_per_image}; 10 is a good start")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBound:
    """The bound of a batch of images, or an unbiased estimate of it, in bits per dimension."""

    config: LikelihoodConfig
    """How it was measured."""
    num_timesteps: int
    """Length of the chain, T."""
    prior: PerSampleBits
    """L_T of each image [B]."""
    t: Int64[Tensor, "b k"]
    """Indices into the chain at which terms were evaluated [B, K]."""
    terms: Float64[Tensor, "b k"]
    """Those terms [B, K]: L_{t-1}, and L_0 where t = 0."""
    weight: Float64[Tensor, "b k"]
    """Factors [B, K] with which the sum of the terms is, or estimates, the sum over all t."""

    @property
    def decoder(self) -> PerSampleBits:
        """L_0 of each image [B]; from random t an estimate that is rarely anything but 0."""
        return (self.terms * self.weight).where(self.t == 0, 0.0).sum(dim=1)

    @property
    def denoising(self) -> PerSampleBits:
        """Sum of the L_{t-1} of each image [B]."""
        return (self.terms * self.weight).where(self.t > 0, 0.0).sum(dim=1)

    @property
    def bits_per_dim(self) -> PerSampleBits:
        """The whole bound of each image [B]."""
        return self.prior + self.denoising + self.decoder


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BoundStatistics:
    """The bound of a set of images, by term and by t. a + b is that of both sets together, in any grouping."""

    config: LikelihoodConfig
    """How it was measured; config.clip_x_0 says whether x_0_hat was clipped."""
    totals: RunningMoments
    """Over images: the whole bound, L_T, the sum of L_{t-1}, L_0."""
    by_t: RunningMoments
    """Over the evaluations of each t [T]: L_{t-1}, and L_0 at t = 0."""

    @classmethod
    def of(cls, bound: ImageBound) -> "BoundStatistics":
        """Statistics of a batch of images."""
        totals = torch.stack((bound.bits_per_dim, bound.prior, bound.denoising, bound.decoder), dim=1)
        return cls(
            config=bound.config,
            totals=RunningMoments.from_samples(totals),
            by_t=RunningMoments.from_entries(bound.t.flatten(), bound.terms.flatten(), bound.num_timesteps),
        )

    def __add__(self, other: "BoundStatistics") -> "BoundStatistics":
        """Statistics of the two sets together.

        Raises:
            ValueError: If they were measured in different ways.
        """
        if self.config != other.config or len(self.by_t.count) != len(other.by_t.count):
            raise ValueError(
                f"other: must be measured in the same way, got {other.config} of {len(other.by_t.count)} steps "
                f"beside {self.config} of {len(self.by_t.count)}; measure again"
            )
        return BoundStatistics(config=self.config, totals=self.totals + other.totals, by_t=self.by_t + other.by_t)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return int(self.totals.count[0])

    @property
    def bits_per_dim(self) -> Estimate:
        """The whole bound, with its standard error over images."""
        return self.totals.estimate(0)

    @property
    def prior(self) -> Estimate:
        """L_T."""
        return self.totals.estimate(1)

    @property
    def denoising(self) -> Estimate:
        """Sum of the L_{t-1}."""
        return self.totals.estimate(2)

    @property
    def decoder(self) -> Estimate:
        """L_0."""
        return self.totals.estimate(3)

    def importance(self, uniform_share: float = 0.001) -> Float64[Tensor, " T"]:
        """Probabilities of t [T] for terms = importance, from what these images gave at each t."""
        return importance_probabilities(self.by_t.second_moment, uniform_share)


@torch.no_grad()
def bound_of_images(
    model: DiffusionModel,
    config: LikelihoodConfig,
    *,
    seed: int,
    sample_ids: Steps,
    x_0: Images,
    label: Labels | None,
    probabilities: Float64[Tensor, " T"] | None = None,
) -> ImageBound:
    """The variational bound of some images; that of an image does not depend on its neighbours in the batch.

    Args:
        model: The model.
        config: Which bound, and how much of it.
        seed: Key of the noise and of random t, in [0, 2^64).
        sample_ids: Ids [B] in [0, 2^48), on the network's device.
        x_0: The images [B, C, H, W] in [-1, 1], float32 or float64, at the levels of the model's pixels.
        label: Class [B], same device, or None for an unconditional network.
        probabilities: Probabilities of t along the chain [T], needed for terms = importance.

    Raises:
        ValueError: If the network is in training mode or answers with another shape, x_0 has too few digits, the config
            asks for more steps than were trained, or probabilities are missing, of another length or without being
            asked for.
    """
    chain = model.schedule
    if config.num_steps is not None:
        chain = chain.respace(spaced_timesteps(chain.num_timesteps, config.num_steps, config.spacing))
    denoise = model.denoiser(clip_x_0=config.clip_x_0)
    t, weight = _choose_terms(config, chain.num_timesteps, seed, sample_ids, probabilities)
    terms = []
    for k, t_k in enumerate(t.unbind(dim=1)):
        eps = standard_normal(seed, Stream.EVAL_BOUND_EPS, sample_ids, k, x_0.shape[1:], x_0.dtype)
        terms.append(
            bound_term(chain, denoise, x_0, t_k, label, variance=config.variance, eps=eps, num_levels=model.num_levels)
        )
    return ImageBound(
        config=config,
        num_timesteps=chain.num_timesteps,
        prior=prior_loss(chain, x_0),
        t=t,
        terms=torch.stack(terms, dim=1),
        weight=weight,
    )


def _choose_terms(
    config: LikelihoodConfig,
    num_timesteps: int,
    seed: int,
    sample_ids: Steps,
    probabilities: Float64[Tensor, " T"] | None,
) -> tuple[Int64[Tensor, "b k"], Float64[Tensor, "b k"]]:
    """Indices into the chain, and the factors of their terms."""
    if (probabilities is not None) != (config.terms == "importance"):
        raise ValueError(f"probabilities: are for terms = importance and needed there, got terms = {config.terms}")
    T, K, B, device = num_timesteps, config.terms_per_image, len(sample_ids), sample_ids.device
    if config.terms == "all":
        t = torch.arange(T, device=device).expand(B, T)
        return t, torch.ones_like(t, dtype=torch.float64)
    word = random_words(seed, Stream.EVAL_BOUND_T, sample_ids, 0, K)
    if config.terms == "stratified":
        t = timestep_in_stratum(T, torch.arange(K, device=device).expand_as(word), K, word)
    elif probabilities is None:
        t = timestep_in_stratum(T, torch.zeros_like(word), 1, word)
    else:
        if len(probabilities) != T:
            raise ValueError(f"probabilities: must have the chain's length {T}, got {len(probabilities)}")
        t = timestep_of_word(probabilities.to(device), word)
        return t, 1 / (K * probabilities.to(device)[t])
    return t, torch.full_like(t, T / K, dtype=torch.float64)
