"""Log-densities of the flow against exact ones: Gaussians, correlated or not, and mixtures."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    DiffusionModel,
    FlowBound,
    Network,
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
    ScheduleConfig,
    Stream,
    Variance,
    make_schedule,
    probability_flow_bound,
    standard_normal,
)
from ddpm.likelihood.probability_flow import probability_flow_log_density, rademacher_probes

LINEAR = make_schedule(ScheduleConfig())
COSINE = make_schedule(ScheduleConfig(name="cosine"))
ZERO = make_schedule(ScheduleConfig(zero_terminal_snr=True))
IDS = torch.arange(6)
SIGNS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
HADAMARD = SIGNS.reshape(4, 1, 1, 2, 2).expand(4, 6, 1, 2, 2)
"""Four probes of which Hutchinson's estimate is exact in four dimensions: the mean of p p^T is I."""

MEAN = torch.tensor([0.7, -0.2, 0.0, 0.4], dtype=torch.float64)
# Neighbours that depend on each other, on different scales: 0.88, 0.48, 0.41 and 0.07 along the axes.
FACTOR = torch.tensor(
    [[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [-0.1, 0.2, 0.6, 0.0], [0.2, 0.1, 0.3, 0.1]], dtype=torch.float64
)
VALUES, AXES = torch.linalg.eigh(FACTOR @ FACTOR.T)


def marginal(schedule: NoiseSchedule, t: int) -> torch.distributions.MultivariateNormal:
    """q(x_t) for x_0 ~ N(MEAN, FACTOR FACTOR^T)."""
    abar = schedule.alpha_bar[t]
    covariance = abar * FACTOR @ FACTOR.T + (1 - abar) * torch.eye(4, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(abar.sqrt() * MEAN, covariance)


def log_prob(distribution: torch.distributions.Distribution, x: Tensor) -> Tensor:
    """Log-density, which torch leaves untyped."""
    values: Tensor = distribution.log_prob(x)
    return values


def exact_denoiser(schedule: NoiseSchedule, prediction_type: PredictionType = "v") -> NetworkDenoiser:
    """eps* = s (a^2 C + s^2 I)^-1 (x_t - a mean), and the v that belongs to it."""

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = schedule.alpha_bar_at(t)[:, None]
        a, s = abar.sqrt(), (1 - abar).sqrt()
        along = ((x_t.flatten(1) - a * MEAN) @ AXES) / (abar * VALUES + 1 - abar)
        eps, x_0 = s * along @ AXES.T, MEAN + a * (VALUES * along) @ AXES.T
        v = a * eps - s * x_0
        answer: Tensor = eps if prediction_type == "eps" else v
        return answer.reshape(x_t.shape)

    return NetworkDenoiser(network=network, schedule=schedule, prediction_type=prediction_type, clip_x_0=False)


def draws(schedule: NoiseSchedule) -> Tensor:
    """Of q(x_t) at t = 0, float64 [6, 1, 2, 2]."""
    z, q = standard_normal(1, Stream.EVAL_X_0, IDS, 0, (4,), torch.float64), marginal(schedule, 0)
    return (q.mean + z @ q.scale_tril.T).reshape(6, 1, 2, 2)


def carried(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """Exact log-density at t = 0 of the flow from N(0, I): on each axis (x - mean) / deviation stays what it is."""
    a_0, a_T = schedule.alpha_bar[[0, -1]].tolist()
    d_0, d_T = (a_0 * VALUES + 1 - a_0).sqrt(), (a_T * VALUES + 1 - a_T).sqrt()
    there = a_T**0.5 * MEAN + ((x.flatten(1) - a_0**0.5 * MEAN) @ AXES / d_0 * d_T) @ AXES.T
    normal = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), 1.0)
    density: Tensor = log_prob(normal, there).sum(dim=1) + (d_T / d_0).log().sum()
    return density


def worst_bits(a: Tensor, b: Tensor) -> float:
    """Largest difference of log-densities, in bits per dimension."""
    return float((a - b).abs().max()) / (4 * math.log(2))


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(COSINE, "v"), (COSINE, "eps"), (ZERO, "v")],
    ids=["cosine-v", "cosine-eps", "zero-v"],
)
def test_equals_the_log_density_of_a_gaussian(schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
    """To 1e-4 bits/dim with the trained steps as nodes, where x_T is noise to four digits."""
    denoise, x = exact_denoiser(schedule, prediction_type), draws(schedule)
    found = probability_flow_log_density(denoise, schedule, x, None, timesteps=range(1000), probes=None)
    assert worst_bits(found, log_prob(marginal(schedule, 0), x.flatten(1))) < 1e-4


def test_density_is_that_of_the_flow_where_the_chain_ends_early() -> None:
    """Ho et al.'s chain keeps 0.0064 of the mean at T, and the flow from N(0, I) is off the data by as much."""
    x = draws(LINEAR)
    found = probability_flow_log_density(
        exact_denoiser(LINEAR, "eps"), LINEAR, x, None, timesteps=range(1000), probes=HADAMARD
    )
    assert worst_bits(found, carried(LINEAR, x)) < 1e-4
    assert 1e-3 < worst_bits(found, log_prob(marginal(LINEAR, 0), x.flatten(1))) < 1e-2


def test_equals_the_log_density_of_a_mixture() -> None:
    """Pixels at four sharp values, where the flow forks: a thousand nodes leave 3e-3 bits/dim."""
    values = torch.tensor([0, 40, 90, 255], dtype=torch.float64) / 127.5 - 1

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = COSINE.alpha_bar_at(t)[:, None, None, None, None]
        return (-(x_t[..., None] - abar.sqrt() * values).square() / (2 * (1 - abar))).softmax(-1) @ values

    a = COSINE.alpha_bar[0].sqrt()
    centre, noise = standard_normal(2, Stream.EVAL_X_0, IDS, 0, (2, 1, 2, 2), torch.float64).unbind(1)
    x = a * values[(centre > 0).long() + 2 * (centre.abs() > 1)] + (1 - a**2).sqrt() * noise
    mixture = torch.distributions.Normal(a * values, (1 - a**2).sqrt())
    exact = (log_prob(mixture, x[..., None]).logsumexp(-1) - math.log(4)).sum(dim=(1, 2, 3))
    denoise = NetworkDenoiser(network=network, schedule=COSINE, prediction_type="x_0", clip_x_0=False)
    found = probability_flow_log_density(denoise, COSINE, x, None, timesteps=range(1000), probes=HADAMARD)
    assert worst_bits(found, exact) < 5e-3


def test_converges_at_third_order_at_places_between_the_steps() -> None:
    """Half the length leaves an eighth of the error, once the nodes are closer than the data's least deviation."""
    x, denoise = draws(COSINE), exact_denoiser(COSINE)
    errors = [
        worst_bits(
            probability_flow_log_density(
                denoise,
                COSINE,
                x,
                None,
                timesteps=[float(t) for t in torch.linspace(0, 999, n, dtype=torch.float64)],
                probes=HADAMARD,
            ),
            carried(COSINE, x),
        )
        for n in (301, 601)
    ]
    assert math.log2(errors[0] / errors[1]) > 2.7


def test_an_interval_left_over_and_one_of_another_length_are_steps_of_their_own() -> None:
    """1,000 nodes have 999 intervals; a gap of three steps in the middle changes little."""
    x, denoise = draws(COSINE), exact_denoiser(COSINE)
    with_gap = [t for t in range(1000) if t not in (501, 502)]
    found = probability_flow_log_density(denoise, COSINE, x, None, timesteps=with_gap, probes=HADAMARD)
    assert worst_bits(found, carried(COSINE, x)) < 1e-4


def test_unit_noise_needs_no_flow() -> None:
    """For x_0 ~ N(0, I) the velocity is 0 everywhere, and so are its divergence and every error."""
    denoise = NetworkDenoiser(network=lambda x_t, t, label: 0 * x_t, schedule=ZERO, prediction_type="v", clip_x_0=False)
    x = draws(ZERO)
    unit = torch.distributions.Normal(torch.zeros(4, dtype=torch.float64), 1.0)
    normal = log_prob(unit, x.flatten(1)).sum(dim=1)
    for nodes in (range(0, 1000, 100), [999]):
        found = probability_flow_log_density(denoise, ZERO, x, None, timesteps=nodes, probes=None)
        torch.testing.assert_close(found, normal, rtol=1e-12, atol=1e-12)


def test_hutchinson_is_unbiased_for_the_exact_divergence() -> None:
    """It is linear in p p^T: over four orthogonal probes exact, over 400 random ones within 5 standard errors."""
    x, denoise = draws(COSINE)[:1], exact_denoiser(COSINE)

    def log_density(probes: Tensor | None, images: Tensor) -> Tensor:
        return probability_flow_log_density(denoise, COSINE, images, None, timesteps=range(0, 1000, 50), probes=probes)

    exact = log_density(None, x)
    torch.testing.assert_close(log_density(HADAMARD[:, :1], x), exact, rtol=1e-12, atol=1e-12)
    many = x.expand(400, 1, 2, 2)
    found = log_density(rademacher_probes(1, torch.arange(400), 1, many), many)
    error = float(found.std()) / 20
    assert 0 < error < 0.3
    assert abs(float(found.mean() - exact)) < 5 * error
    several = log_density(rademacher_probes(1, torch.arange(400), 4, many), many)
    assert float(several.std()) == pytest.approx(float(found.std()) / 2, rel=0.25)


def test_probes_are_signs_of_their_own_image_and_draw() -> None:
    like = torch.zeros(200, 1, 3, 3)
    probes = rademacher_probes(4, torch.arange(200), 3, like)
    assert probes.shape == (3, 200, 1, 3, 3) and probes.dtype == torch.float32
    assert torch.equal(probes.abs(), torch.ones_like(probes))
    flat = probes.transpose(0, 1).flatten(1)
    correlation = flat.T @ flat / 200
    assert float((correlation - torch.eye(27)).abs().max()) < 5 / 200**0.5
    assert abs(float(flat.mean())) < 5 / (200 * 27) ** 0.5
    assert torch.equal(rademacher_probes(4, torch.tensor([7, 150]), 1, like[:2])[0], probes[0, [7, 150]])


def test_float32_labels_and_gradients() -> None:
    """Computed in float32 to its precision; the label is passed on; nothing that comes out carries a gradient."""
    x, exact = draws(COSINE), exact_denoiser(COSINE)
    seen: list[Tensor | None] = []

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        seen.append(label)
        assert x_t.dtype == torch.float32
        return exact.network(x_t.double(), t, None)

    denoise = NetworkDenoiser(network=network, schedule=COSINE, prediction_type="v", clip_x_0=False)
    x32 = x.float().requires_grad_()
    with torch.no_grad():
        found = probability_flow_log_density(
            denoise, COSINE, x32, IDS, timesteps=range(0, 1000, 20), probes=HADAMARD.float()
        )
    reference = probability_flow_log_density(exact, COSINE, x, None, timesteps=range(0, 1000, 20), probes=HADAMARD)
    assert found.dtype == torch.float64 and not found.requires_grad and x32.grad is None and x32.requires_grad
    assert worst_bits(found, reference) < 1e-4
    assert seen and all(label is IDS for label in seen)


def model_of(network: Network, prediction_type: PredictionType = "eps") -> DiffusionModel:
    return DiffusionModel(network=network, schedule=COSINE, image_shape=(1, 2, 2), prediction_type=prediction_type)


def test_impossible_flows_are_refused() -> None:
    def measure(network: Network = lambda x_t, t, label: x_t, **options: Any) -> FlowBound:
        return probability_flow_bound(
            model_of(network),
            seed=0,
            sample_ids=IDS,
            x_0=torch.zeros(6, 1, 2, 2),
            label=None,
            **options,
        )

    for field, value in {"num_steps": 2, "num_probes": 0}.items():
        with pytest.raises(ValueError, match=rf"^{field}: "):
            measure(**{field: value})
    with pytest.raises(ValueError, match=r"^network: "):
        measure(nn.Identity())


def test_the_decoder_has_the_model_s_own_variance() -> None:
    """Unless another is asked for: learned where it is, the posterior's where not."""
    x_0 = torch.full((6, 1, 2, 2), 1.0, dtype=torch.float64)
    fixed = model_of(lambda x_t, t, label: 0.5 * x_t)
    learned = dataclasses.replace(
        fixed, network=lambda x_t, t, label: torch.cat((0.5 * x_t, x_t), dim=1), learned_variance=True
    )

    def bits(model: DiffusionModel, variance: Variance | None) -> Tensor:
        return probability_flow_bound(
            model, seed=1, sample_ids=IDS, x_0=x_0, label=None, variance=variance, num_steps=5
        ).bits_per_dim

    assert torch.equal(bits(fixed, None), bits(fixed, "fixed_small"))
    assert torch.equal(bits(learned, None), bits(learned, "learned_range"))
    assert torch.equal(bits(learned, "fixed_small"), bits(fixed, None))
    assert not torch.equal(bits(learned, None), bits(learned, "fixed_small"))


def test_few_nodes_and_the_exact_divergence_of_images() -> None:
    """For a network that is no one's optimum, 300 probes come close to the exact divergence."""
    x_0 = torch.full((6, 1, 2, 2), 1.0, dtype=torch.float64)
    model = model_of(lambda x_t, t, label: torch.tanh(x_t.sum(dim=3, keepdim=True) * x_t / 4), "v")
    bits = [
        probability_flow_bound(
            model, seed=1, sample_ids=IDS, x_0=x_0, label=None, num_steps=20, num_probes=num_probes
        ).bits_per_dim
        for num_probes in (None, 300)
    ]
    assert bits[0].shape == (6,) and bits[0].dtype == torch.float64 and bool(bits[0].isfinite().all())
    torch.testing.assert_close(bits[0], bits[1], rtol=0.0, atol=0.1)
