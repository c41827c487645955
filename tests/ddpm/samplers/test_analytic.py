"""Analytic-DPM: exact on Gaussian data over any steps, within its limits always; and the error it needs, measured."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm import (
    Ancestral,
    DiffusionModel,
    LikelihoodConfig,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    RunningMoments,
    Sampler,
    ScheduleConfig,
    Stream,
    generate,
    make_schedule,
    p_mean_variance,
    p_sample,
    spaced_timesteps,
    standard_normal,
    x_0_error_table,
    x_0_errors,
)
from ddpm.process.diffusion import analytic_variance
from tests.ddpm.oracles import SKEWED, TWO_MODES, Mixture

LINEAR, COSINE = (make_schedule(ScheduleConfig(name=name)) for name in ("linear", "cosine"))
NO_SIGNAL = make_schedule(ScheduleConfig(name="linear", zero_terminal_snr=True))
SHORT = make_schedule(ScheduleConfig(name="cosine", num_timesteps=50))


def error_of_a_gaussian(alpha_bar: Tensor, variance: float) -> Tensor:
    """E[(x_0 - x_0_hat)^2] = s^2 (1 - abar) / (abar s^2 + 1 - abar)."""
    return variance * (1 - alpha_bar) / (alpha_bar * variance + 1 - alpha_bar)


@pytest.mark.parametrize("variance", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE, NO_SIGNAL], ids=["linear", "cosine", "no signal"])
@pytest.mark.parametrize(
    "steps",
    [
        *(spaced_timesteps(1000, n, "linspace") for n in range(2, 11)),
        [0, 999],
        [0, 3, 500, 501, 999],
        [0.5, 100.25, 700.75],
        [400],
        range(1000),
    ],
    ids=lambda s: f"{len(s)}",
)
def test_exact_on_a_gaussian_over_any_steps(
    steps: list[int] | list[float], schedule: NoiseSchedule, variance: float
) -> None:
    """Mean and variance after every step but the noiseless last, to 1e-12; read off one real step at a time.

    The network predicts v: of eps, x_0_hat would have few digits where there is next to no signal, and none without.
    """
    data = Mixture(weights=(1.0,), means=(0.7,), variances=(variance,))
    chain, network = schedule.respace(steps), data.network(schedule, "v")
    denoise = NetworkDenoiser(network=network, schedule=schedule, prediction_type="v", clip_x_0=False)
    error = error_of_a_gaussian(chain.alpha_bar, variance)
    mean, var = data.mean_and_variance(float(chain.alpha_bar[-1]))
    x_t, eps = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    for i in range(len(steps) - 1, 0, -1):
        t = torch.full((3,), i)
        step = p_sample(chain, denoise, x_t, t, None, variance="analytic", eps=eps, x_0_error=error)
        constant, of_x, of_eps = step.flatten().tolist()
        mean, var = constant + (of_x - constant) * mean, (of_x - constant) ** 2 * var + (of_eps - constant) ** 2
        exact = data.mean_and_variance(float(chain.alpha_bar[i - 1]))
        assert mean == pytest.approx(exact[0], abs=1e-12)
        assert var == pytest.approx(exact[1], abs=1e-12)


def test_fixed_variances_are_its_special_cases() -> None:
    """A point has the posterior's variance, unit noise beta."""
    chain = LINEAR.respace([0, 20, 500, 999])
    point, noise = (error_of_a_gaussian(chain.alpha_bar, variance) for variance in (0.0, 1.0))
    torch.testing.assert_close(analytic_variance(chain, point), chain.posterior_variance, rtol=0, atol=1e-15)
    torch.testing.assert_close(analytic_variance(chain, noise), chain.beta, rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("data", [SKEWED, TWO_MODES], ids=["skewed", "two modes"])
def test_it_is_theorem_1(data: Mixture, schedule: NoiseSchedule) -> None:
    """Bao et al.'s form, from the second moment of the score by quadrature, the posterior's variance being lambda^2.

    Steps with alpha_bar above 1e-4: with less signal their form has no digits left for this tolerance.
    """
    chain = schedule.respace([0, 20, 100, 350, 600, 800])
    gamma = data.expectation(
        lambda x_t, alpha_bar: (x_t - alpha_bar.sqrt() * data.x_0_hat(x_t, alpha_bar)) ** 2 / (1 - alpha_bar) ** 2,
        chain.alpha_bar,
    )
    noise, noise_prev, lambda_2 = 1 - chain.alpha_bar, 1 - chain.alpha_bar_prev, chain.posterior_variance
    slope = (noise / chain.alpha).sqrt() - (noise_prev - lambda_2).clamp(min=0).sqrt()
    expected = lambda_2 + slope**2 * (1 - noise * gamma)
    got = analytic_variance(chain, data.x_0_error(chain.alpha_bar))
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-12)


@given(
    steps=st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True).map(sorted),
    errors=st.lists(st.floats(-1, 3), min_size=8, max_size=8),
)
def test_limits(steps: list[int], errors: list[float]) -> None:
    """Bao et al., Theorem 2: not below the posterior's, not above what data in [-1, 1] would have."""
    for schedule in (LINEAR, NO_SIGNAL):
        chain = schedule.respace(steps)
        variance = analytic_variance(chain, torch.tensor(errors[: len(steps)], dtype=torch.float64))
        assert bool((variance >= chain.posterior_variance).all())
        of_data = chain.posterior_variance + chain.posterior_mean_coef_x_0.square()
        assert bool((variance <= of_data + 1e-15).all())


def test_without_signal_the_data_s_own_variance_is_unknown() -> None:
    """Not 1, which is only the limit of data in [-1, 1]; and the same as where there is next to no signal."""
    steps = [0, 500, 999]
    chain, nearly = (schedule.respace(steps) for schedule in (NO_SIGNAL, COSINE))
    error = SKEWED.x_0_error(chain.alpha_bar)
    _, of_data = SKEWED.mean_and_variance(1.0)
    assert float(error[2]) == pytest.approx(of_data, rel=1e-12)
    variance = analytic_variance(chain, error)
    assert float(variance[2]) == pytest.approx(1 - float(chain.alpha_bar[1]) * (1 - of_data), rel=1e-12)
    of_nearly = analytic_variance(nearly, SKEWED.x_0_error(nearly.alpha_bar))
    assert float(of_nearly[2]) == pytest.approx(1 - float(nearly.alpha_bar[1]) * (1 - of_data), rel=1e-4)


def test_of_a_step() -> None:
    chain = SHORT.respace([0, 10, 40])
    error = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    x_t, table = torch.zeros(3, 1, 2, 2, dtype=torch.float64), analytic_variance(chain, error)
    p = p_mean_variance(
        chain,
        lambda x, t, label: Prediction(x_0_hat=x, eps_hat=x),
        x_t,
        torch.arange(3),
        None,
        variance="analytic",
        x_0_error=error,
    )
    assert torch.equal(p.variance.flatten(), table)
    assert torch.equal(p.log_variance.flatten()[1:], table[1:].log())
    assert float(p.log_variance[0]) == float(chain.posterior_log_variance[0])


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_measured_errors_are_the_exact_ones(kind: Any) -> None:
    """1,000 images of 8 x 8 independent pixels at 10 of 50 t each: 12,800 pixels behind every number."""
    generator = torch.Generator().manual_seed(0)
    weights, means, variances = (
        torch.tensor(v, dtype=torch.float64) for v in (SKEWED.weights, SKEWED.means, SKEWED.variances)
    )
    chosen = torch.multinomial(weights.expand(1000, 2), 64, replacement=True, generator=generator)
    noise = torch.randn(1000, 64, generator=generator, dtype=torch.float64)
    x_0 = (means[chosen] + variances[chosen].sqrt() * noise).reshape(1000, 1, 8, 8)
    model = DiffusionModel(
        network=SKEWED.network(SHORT, kind), schedule=SHORT, image_shape=(1, 8, 8), prediction_type=kind
    )
    errors = x_0_errors(model, seed=3, sample_ids=torch.arange(1000), x_0=x_0, label=None, clip_x_0=False)
    assert int(errors.count.sum()) == 10_000 and int(errors.count.min()) > 100
    exact = SKEWED.x_0_error(SHORT.alpha_bar)
    # 4.5 standard errors, 50 times: a false alarm in 3,000 seeds.
    assert float(((errors.mean - exact).abs() / errors.standard_error).max()) < 4.5
    assert torch.equal(x_0_error_table(errors), errors.mean)
    # At the noisy end |eps_hat|^2 / 64 would have the standard error of |eps|^2 / 64, in units of eps.
    of_noise = (2 / 64 / errors.count).sqrt() * (1 - SHORT.alpha_bar) / SHORT.alpha_bar
    assert float((errors.standard_error / of_noise)[-10:].max()) < 0.1


def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    shift = t / 50 if label is None else t / 50 + label
    return torch.tanh(x_t + shift.to(x_t)[:, None, None, None])


MODEL = DiffusionModel(network=network, schedule=SHORT, image_shape=(1, 3, 3))


def test_an_image_adds_the_same_in_any_batch_and_batches_merge() -> None:
    ids, x_0 = torch.tensor([7, 2**40, 0, 3]), torch.linspace(-1, 1, 4 * 18).reshape(4, 2, 3, 3)

    def measured(rows: list[int], **options: Any) -> RunningMoments:
        options = {"seed": 1, "terms_per_image": 5, "label": ids[rows] % 3} | options
        return x_0_errors(MODEL, sample_ids=ids[rows], x_0=x_0[rows], **options)

    whole = measured([0, 1, 2, 3])
    parts = measured([3, 1]) + measured([0]) + measured([2])
    assert torch.equal(parts.count, whole.count)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.m2, whole.m2, rtol=1e-9, atol=1e-15)
    for other in (measured([0, 1, 2, 3], seed=2), measured([0, 1, 2, 3], label=None)):
        assert not torch.equal(other.mean, whole.mean)
    # One t in each fifth of the chain; with as many terms as steps, each once.
    assert measured([0]).count.reshape(5, 10).sum(1).tolist() == [1] * 5
    assert measured([0, 1], terms_per_image=50).count.tolist() == [2] * 50


def test_a_learned_variance_is_left_aside() -> None:
    def double(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return torch.cat((network(x_t, t, label), torch.full_like(x_t, 9.0)), dim=1)

    options: dict[str, Any] = {"seed": 0, "sample_ids": torch.arange(2), "x_0": torch.zeros(2, 1, 2, 2), "label": None}
    plain = x_0_errors(MODEL, **options)
    learned = x_0_errors(dataclasses.replace(MODEL, network=double, learned_variance=True), **options)
    assert torch.equal(learned.mean, plain.mean)


def test_gaps_are_bridged() -> None:
    def table(index: list[int], values: list[float]) -> list[float]:
        errors = RunningMoments.from_entries(torch.tensor(index), torch.tensor(values), 6)
        return x_0_error_table(errors).tolist()

    assert table([1, 4, 4], [0.25, 0.75, 1.25]) == pytest.approx([0.25, 0.25, 0.5, 0.75, 1.0, 1.0])
    assert table([3], [0.5]) == [0.5] * 6
    assert table([0, 1, 2, 3, 4, 5], [0.0, 0.1, 0.9, 0.3, 0.7, 1.0]) == pytest.approx([0.0, 0.1, 0.9, 0.3, 0.7, 1.0])
    with pytest.raises(ValueError, match=r"^errors: must hold a value, got none"):
        x_0_error_table(RunningMoments.from_samples(torch.zeros(0, 6)))


def images(sampler: Sampler, table: Tensor | None) -> Tensor:
    return generate(MODEL, sampler, seed=5, sample_ids=torch.arange(3), label=None, x_0_error=table)


def test_generate_takes_the_entries_of_the_visited_steps() -> None:
    table = torch.linspace(0.1, 0.99, 50, dtype=torch.float64)
    ids, timesteps = torch.arange(3), spaced_timesteps(50, 7, "trailing")
    sampler = Ancestral(variance="analytic", num_steps=7, spacing="trailing")
    expected = sampler.sample(
        NetworkDenoiser(network=network, schedule=SHORT),
        SHORT,
        standard_normal(5, Stream.X_T, ids, 0, (1, 3, 3)),
        None,
        timesteps=timesteps,
        noise=lambda draw: standard_normal(5, Stream.STEP, ids, draw, (1, 3, 3)),
        x_0_error=table[timesteps],
    )
    assert torch.equal(images(sampler, table), expected.clamp(-1, 1))
    small = Ancestral(num_steps=7, spacing="trailing")
    assert not torch.equal(images(sampler, table), images(small, None))
    assert torch.equal(images(small, table), images(small, None))


def test_refusals() -> None:
    analytic = Ancestral(variance="analytic", num_steps=5)
    with pytest.raises(ValueError, match=r"^variance: analytic needs the error of x_0_hat, got none; "):
        images(analytic, None)
    with pytest.raises(ValueError, match=r"^x_0_error: must have one entry per trained step, 50, got 5; "):
        images(analytic, torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^x_0_error: must have the chain's length 50, got 5; "):
        analytic_variance(SHORT, torch.ones(5, dtype=torch.float64))
    for changes in ({"guidance_scale": 2.0}, {"guidance_scale": 0.0}, {"dynamic_threshold": 0.995}):
        with pytest.raises(ValueError, match=rf"^variance: .*without guidance .*{next(iter(changes.values()))}"):
            dataclasses.replace(analytic, **changes)
    with pytest.raises(ValueError, match=r"^variance: analytic is for sampling only"):
        LikelihoodConfig(variance="analytic")
    options: dict[str, Any] = {"seed": 0, "sample_ids": torch.arange(2), "x_0": torch.zeros(2, 1, 2, 2), "label": None}
    for terms in (0, 51):
        with pytest.raises(ValueError, match=rf"^terms_per_image: must be in \[1, 50\].* got {terms}; "):
            x_0_errors(MODEL, **options, terms_per_image=terms)
    with pytest.raises(ValueError, match=r"^network: must be in eval mode"):
        x_0_errors(dataclasses.replace(MODEL, network=nn.Identity()), **options)
