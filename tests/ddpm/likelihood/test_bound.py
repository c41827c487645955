"""The bound of images: never below the entropy, the sum of its terms, and of the model that it says."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from ddpm import (
    DiffusionModel,
    ImageBound,
    LikelihoodConfig,
    NetworkDenoiser,
    RunningMoments,
    ScheduleConfig,
    Stream,
    Variance,
    bound_of_images,
    bound_term,
    make_schedule,
    prior_loss,
    probability_flow_bound,
    q_sample,
    standard_normal,
)
from tests.ddpm.pixel_oracle import FOUR, ExactNetwork, exact_model, images_of

SEED = 3
SHORT = make_schedule(ScheduleConfig(name="cosine", num_timesteps=25))


@pytest.mark.parametrize(
    ("levels", "variance", "entropy", "decoder"),
    [(FOUR, "fixed_small", 2.0, 0.9), (torch.arange(100, 132), "fixed_large", 5.0, 0.06)],
)
def test_two_estimates_stay_above_the_entropy_and_agree(
    levels: Tensor, variance: Variance, entropy: float, decoder: float
) -> None:
    """Four levels far apart, and 32 neighbouring ones, with exact predictions and the paper's schedule.

    Both estimates exceed the entropy by what the decoder's Gaussian wastes: on four known levels, 0.51 bits at the
    edges and 1.30 between. They differ by the noise of the terms, and by what a Gaussian step cannot express.
    """
    schedule, ids = make_schedule(ScheduleConfig()), torch.arange(24)
    x_0, model = images_of(levels, ids, 4), exact_model(schedule, levels, 4)
    config = LikelihoodConfig(variance=variance)
    bits = bound_of_images(model, config, seed=SEED, sample_ids=ids, x_0=x_0, label=None).bits_per_dim
    found = probability_flow_bound(
        model, seed=SEED, sample_ids=ids, x_0=x_0, label=None, variance=variance, num_steps=200
    )
    flow = found.bits_per_dim
    for estimate in (bits, flow):
        error = float(estimate.std()) / 24**0.5
        assert error < 0.12
        assert abs(float(estimate.mean()) - entropy - decoder) < 0.1 + 4 * error
        assert float(estimate.mean()) > entropy - 4 * error
    difference = RunningMoments.from_samples((bits - flow)[:, None]).estimate(0)
    assert abs(difference.value) < 0.06 + 4 * difference.standard_error


def test_all_terms_of_an_image_are_those_of_each_t() -> None:
    ids = torch.arange(5)
    x_0 = images_of(FOUR, ids, 2)
    model = exact_model(SHORT, FOUR, 2)
    whole = bound_of_images(model, LikelihoodConfig(), seed=SEED, sample_ids=ids, x_0=x_0, label=None)
    assert torch.equal(whole.t, torch.arange(25).expand(5, 25)) and torch.equal(
        whole.weight, torch.ones_like(whole.terms)
    )
    ids = torch.arange(5)
    x_0 = images_of(FOUR, ids, 2)
    denoise = NetworkDenoiser(network=ExactNetwork(SHORT, FOUR), schedule=SHORT, prediction_type="x_0")
    for k in (0, 1, 24):
        eps = standard_normal(SEED, Stream.EVAL_BOUND_EPS, ids, k, (1, 2, 2), torch.float64)
        t = torch.full((5,), k)
        expected = bound_term(SHORT, denoise, x_0, t, None, variance="fixed_small", eps=eps)
        assert torch.equal(whole.terms[:, k], expected)
    assert torch.equal(whole.prior, prior_loss(SHORT, x_0))
    torch.testing.assert_close(whole.decoder, whole.terms[:, 0])
    torch.testing.assert_close(whole.denoising, whole.terms[:, 1:].sum(dim=1))
    torch.testing.assert_close(whole.bits_per_dim, whole.prior + whole.terms.sum(dim=1))


def test_65536_levels_stay_above_their_entropy_too() -> None:
    """4,096 neighbouring levels of 16 bits, an eighth of the range: 12 bits, and 0.2 wasted at both ends."""
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=100))
    ids, levels = torch.arange(24), torch.arange(30_000, 34_096)
    x_0, model = images_of(levels, ids, 2, 65536), exact_model(schedule, levels, 2, 65536)
    bits = bound_of_images(model, LikelihoodConfig(), seed=SEED, sample_ids=ids, x_0=x_0, label=None).bits_per_dim
    error = float(bits.std()) / 24**0.5
    assert error < 0.12
    assert 12 - 4 * error < float(bits.mean()) < 12.2 + 4 * error


def test_the_decoder_of_every_estimate_has_as_many_levels_as_the_model() -> None:
    """Levels of 8 bits are levels of 16 bits too, 257 apart: where the decoder is wide it costs log2(257) bits more.

    All else is the same to the last bit, and L_0 is the difference of two values of the normal distribution function.
    """
    ids = torch.arange(6)
    coarse = exact_model(SHORT, torch.arange(100, 132), 2)
    fine, x_0 = dataclasses.replace(coarse, num_levels=65536), images_of(torch.arange(100, 132), ids, 2)
    bounds = [
        bound_of_images(model, LikelihoodConfig(), seed=SEED, sample_ids=ids, x_0=x_0, label=None)
        for model in (coarse, fine)
    ]
    assert torch.equal(bounds[0].terms[:, 1:], bounds[1].terms[:, 1:]) and torch.equal(bounds[0].prior, bounds[1].prior)
    sigma = float(SHORT.posterior_variance[1]) ** 0.5
    assert sigma > 10 / 255
    torch.testing.assert_close(
        bounds[1].decoder - bounds[0].decoder, torch.full_like(bounds[0].decoder, math.log2(257)), rtol=0, atol=5e-3
    )
    eps = standard_normal(SEED, Stream.EVAL_BOUND_EPS, ids, 0, (1, 2, 2), torch.float64)
    t = torch.zeros_like(ids)
    x_0_hat = coarse.denoiser()(q_sample(SHORT, x_0, t, eps), t, None).x_0_hat
    for bound, half in zip(bounds, (1 / 255, 1 / 65535), strict=True):
        ends = [(((x_0 + side - x_0_hat) / sigma).numpy()) for side in (-half, half)]
        share = scipy.stats.norm.cdf(ends[1]) - scipy.stats.norm.cdf(ends[0])
        np.testing.assert_allclose(bound.decoder.numpy(), -np.log2(share).mean(axis=(1, 2, 3)), rtol=1e-9)
    flows = [
        probability_flow_bound(model, seed=SEED, sample_ids=ids, x_0=x_0, label=None, num_steps=9).bits_per_dim
        for model in (coarse, fine)
    ]
    torch.testing.assert_close(flows[1] - flows[0], bounds[1].decoder - bounds[0].decoder, rtol=0, atol=1e-12)


def test_clipping_is_part_of_the_model_that_is_measured() -> None:
    """x_0_hat = 3 everywhere: clipped, it is a white image's exact prediction, and its L_{t-1} are 0."""
    ids = torch.arange(2)
    white = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    model = DiffusionModel(
        network=lambda x_t, t, label: torch.full_like(x_t, 3.0),
        schedule=SHORT,
        image_shape=(1, 2, 2),
        prediction_type="x_0",
    )
    clipped, free = (
        bound_of_images(model, LikelihoodConfig(clip_x_0=clip), seed=SEED, sample_ids=ids, x_0=white, label=None)
        for clip in (True, False)
    )
    assert torch.equal(clipped.denoising, torch.zeros(2, dtype=torch.float64))
    assert bool((free.denoising > 1).all())
    assert LikelihoodConfig().clip_x_0


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_shorter_chain_has_its_own_terms_and_a_higher_bound(spacing: str) -> None:
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=200))
    ids = torch.arange(50)

    def bits(num_steps: int | None) -> ImageBound:
        return bound_of_images(
            exact_model(schedule, FOUR, 2),
            LikelihoodConfig(num_steps=num_steps, spacing=spacing),  # type: ignore[arg-type]
            seed=SEED,
            sample_ids=ids,
            x_0=images_of(FOUR, ids, 2),
            label=None,
        )

    short, whole = bits(10), bits(None)
    assert short.terms.shape == (50, 10) and short.num_timesteps == 10
    assert float(short.bits_per_dim.mean()) > float(whole.bits_per_dim.mean()) > 2.0


def test_learned_variance_labels_and_dtype_reach_the_network() -> None:
    """Half-way between the bounds everywhere, in float32."""
    seen: list[Tensor | None] = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        seen.append(label)
        assert x_t.dtype == torch.float32
        return torch.cat((x_t, torch.zeros_like(x_t)), dim=1)

    ids = torch.arange(3)
    x_0 = images_of(FOUR, ids, 2).float()
    model = DiffusionModel(network=network, schedule=SHORT, image_shape=(1, 2, 2), learned_variance=True)
    config = LikelihoodConfig(variance="learned_range")
    learned = bound_of_images(model, config, seed=SEED, sample_ids=ids, x_0=x_0, label=ids)
    assert all(label is ids for label in seen) and len(seen) == 25
    k, t = 4, torch.full((3,), 4)
    eps = standard_normal(SEED, Stream.EVAL_BOUND_EPS, ids, k, (1, 2, 2))
    x_t = q_sample(SHORT, x_0, t, eps)
    x_0_hat = ((x_t - (1 - SHORT.alpha_bar[k]).sqrt().float() * x_t) / SHORT.alpha_bar[k].sqrt().float()).clamp(-1, 1)
    log_p = 0.5 * (SHORT.beta[k].log() + SHORT.posterior_variance[k].log())
    log_q, coef = SHORT.posterior_variance[k].log(), SHORT.posterior_mean_coef_x_0[k]
    kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (coef * (x_0 - x_0_hat)).square() / log_p.exp())
    torch.testing.assert_close(learned.terms[:, k], kl.double().mean(dim=(1, 2, 3)) / math.log(2), rtol=1e-4, atol=1e-6)


def test_a_network_in_training_mode_is_refused_and_nothing_is_tracked() -> None:
    network = nn.Conv2d(1, 1, 1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            out: Tensor = self.inner(x_t)
            return out

    ids = torch.arange(2)

    def measure(module: nn.Module) -> ImageBound:
        model = DiffusionModel(network=module, schedule=SHORT, image_shape=(1, 2, 2))
        return bound_of_images(
            model, LikelihoodConfig(), seed=0, sample_ids=ids, x_0=torch.ones(2, 1, 2, 2), label=None
        )

    with pytest.raises(ValueError, match=r"^network: "):
        measure(Wrapped())
    assert not measure(Wrapped().eval()).terms.requires_grad


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("terms", {"terms": "some"}),
        ("num_steps", {"num_steps": 0}),
        ("terms_per_image", {"terms_per_image": 3}),
        ("terms_per_image", {"terms": "uniform"}),
    ],
)
def test_impossible_configs_are_refused(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        LikelihoodConfig(**arguments)  # type: ignore[arg-type]
