"""DPM-Solver++ 3M and its common form: weights against quadrature, the start, long steps, what holds exactly.

Orders over the whole chain are in test_convergence.py, diffusers' numbers in test_diffusers_trajectories.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import lagrange
from torch import Tensor

from ddpm import (
    DDIM,
    DPMSolver2M,
    DPMSolver3M,
    DPMSolver3MCommon,
    NetworkDenoiser,
    NoiseSchedule,
    Prediction,
    Sampler,
    ScheduleConfig,
    make_schedule,
    spaced_timesteps,
)
from ddpm.samplers.dpm_solver_3m import MAX_STRETCH, _common_weights
from ddpm.samplers.multistep import exact_weights, midpoint_weights, moment, multistep_sample
from tests.ddpm.oracles import GAUSSIAN, TWO_MODES, Mixture

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
COSINE_PLACES = SCHEDULE.log_snr(torch.arange(1000)) / 2
LINEAR = make_schedule(ScheduleConfig(name="linear"))
NO_SIGNAL = make_schedule(ScheduleConfig(name="linear", zero_terminal_snr=True))
THREE_STEP: dict[str, Sampler] = {"3m": DPMSolver3M(), "3m common": DPMSolver3MCommon()}


def randn(seed: int) -> Tensor:
    return torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integral(f: Callable[[float], float], h: float) -> float:
    """integral_0^1 e^(h (u - 1)) f(u) h du, by quadrature; f is over the step in units of h."""
    return float(quad(lambda u: h * math.exp(h * (u - 1)) * f(u), 0, 1, epsabs=1e-14, epsrel=1e-13)[0])


@given(h=st.floats(1e-3, 30), k=st.integers(0, 4))
def test_moments_are_the_integrals(h: float, k: int) -> None:
    assert moment(k, h) == pytest.approx(integral(lambda u: u**k, h), rel=1e-11)


def test_moments_at_the_ends() -> None:
    assert [moment(k, math.inf) for k in range(4)] == [1, 1, 1, 1]
    # h / (k + 1) in the limit: the recurrence would have no digit left of k = 3.
    assert [moment(k, 1e-5) * (k + 1) / 1e-5 for k in range(4)] == pytest.approx([1, 1, 1, 1], rel=2e-5)


@given(
    h=st.floats(0.01, 8),
    gaps=st.lists(st.floats(0.2, 5), max_size=2),
    corrected=st.booleans(),
    values=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
)
def test_exact_weights_integrate_lagrange_s_polynomial(
    h: float, gaps: list[float], corrected: bool, values: list[float]
) -> None:
    """Predictors have nodes 0 and behind it, correctors 1 as well; four values of any size."""
    nodes = [0.0, *(-np.cumsum(gaps)).tolist()] + ([1.0] if corrected else [])
    values = values[: len(nodes)]
    expected = integral(lagrange(nodes, values), h)
    got = math.fsum(w * value for w, value in zip(exact_weights(nodes, h), values, strict=True))
    assert got == pytest.approx(expected, rel=1e-8, abs=1e-10)


@given(h=st.floats(0.01, 8), gaps=st.lists(st.floats(0.2, 5), min_size=2, max_size=2))
def test_the_common_form_lacks_half_of_the_bend(h: float, gaps: list[float]) -> None:
    """Exact for straight lines; of u^2 it gives half of the integral, beside what the line through its nodes gives."""
    nodes = [0.0, -gaps[0], -gaps[0] - gaps[1]]
    weights = _common_weights(nodes, h)

    def applied(f: Callable[[float], float]) -> float:
        return math.fsum(w * f(r) for w, r in zip(weights, nodes, strict=True))

    assert applied(lambda u: 1) == pytest.approx(integral(lambda u: 1, h), rel=1e-10)
    assert applied(lambda u: u) == pytest.approx(integral(lambda u: u, h), rel=1e-9)
    assert applied(lambda u: u**2) == pytest.approx(integral(lambda u: u**2, h) / 2, rel=1e-8)


def test_two_nodes_in_the_middle() -> None:
    """2M's simplification; with one node or three there is none."""
    assert midpoint_weights([0.0, -2.0], 0.7) == pytest.approx([1.25 * moment(0, 0.7), -0.25 * moment(0, 0.7)])
    for nodes in ([0.0], [0.0, -1.0, -3.0], [0.0, -1.0, 1.0]):
        assert midpoint_weights(nodes, 0.7) == exact_weights(nodes, 0.7)


@pytest.mark.parametrize("name", THREE_STEP)
def test_constant_x_0_hat_is_solved_exactly(name: str) -> None:
    x_T, image = randn(0), randn(1)

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        return Prediction(x_0_hat=image, eps_hat=torch.full_like(image, math.nan))

    alpha_bar = SCHEDULE.alpha_bar[[50, 999]]
    eps = (x_T - alpha_bar[1].sqrt() * image) / (1 - alpha_bar[1]).sqrt()
    expected = alpha_bar[0].sqrt() * image + (1 - alpha_bar[0]).sqrt() * eps
    for timesteps in ([50, 999], [50, 300, 301, 600, 999]):
        got = THREE_STEP[name].sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=False)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    got = THREE_STEP[name].sample(denoise, SCHEDULE, x_T, None, timesteps=[50, 300, 500, 999])
    torch.testing.assert_close(got, image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2])
def test_x_0_hat_that_bends_no_more_than_a_parabola(degree: int) -> None:
    """A straight line of lambda is solved exactly from the first step on; a parabola but for the first two steps."""
    timesteps = [100, 300, 500, 700, 900]
    places = COSINE_PLACES[timesteps]

    def denoise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        x_0_hat = torch.full_like(x_t, float(COSINE_PLACES[t[0]]) ** degree)
        return Prediction(x_0_hat=x_0_hat, eps_hat=torch.full_like(x_t, math.nan))

    def solved(sampler: Sampler) -> float:
        x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return float(sampler.sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=False))

    inside = quad(lambda place: math.exp(place) * place**degree, float(places[-1]), float(places[0]))[0]
    s = (1 - SCHEDULE.alpha_bar[[100, 900]]).sqrt()
    expected = float(s[0] * (1 / s[1] + inside))
    error, of_common = (abs(solved(sampler) - expected) for sampler in THREE_STEP.values())
    assert error < (1e-12 if degree == 1 else 0.1)
    assert of_common > 0.01


def test_a_long_step_is_euler_s() -> None:
    """Of 5 steps equal in t the last but one is far longer than the one before it."""
    timesteps = spaced_timesteps(SCHEDULE, 5, "linspace")
    lengths = -COSINE_PLACES[timesteps].diff()
    assert float(lengths[0]) > MAX_STRETCH * float(lengths[1]) and float(lengths[1]) < MAX_STRETCH * float(lengths[2])
    x_T, seen = randn(0), []
    denoise = TWO_MODES.denoiser(SCHEDULE)

    def listen(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        prediction = denoise(x_t, t, label)
        seen.append((x_t, prediction))
        return prediction

    DPMSolver3M().sample(listen, SCHEDULE, x_T, None, timesteps=timesteps)
    (_, before), (x_0, _) = seen[3:]
    alpha_bar = SCHEDULE.alpha_bar[0]
    euler = alpha_bar.sqrt() * before.x_0_hat + (1 - alpha_bar).sqrt() * before.eps_hat
    torch.testing.assert_close(x_0, euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [LINEAR, SCHEDULE], ids=["linear", "cosine"])
def test_the_error_does_not_jump_between_numbers_of_steps(schedule: NoiseSchedule) -> None:
    """The last but one of steps equal in t is about 3 times as long as the one before: a limit of 3 jumped by 4."""
    x_T, denoise, errors = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64), TWO_MODES.denoiser(schedule), []
    exact = TWO_MODES.flow(x_T, float(schedule.alpha_bar[-1]), 1 - 1e-12)
    for num_steps in range(90, 205, 5):
        timesteps = spaced_timesteps(schedule, num_steps, "linspace")
        got = DPMSolver3M().sample(denoise, schedule, x_T[:, None, None, None], None, timesteps=timesteps)
        errors.append(float((got.flatten() - exact).square().mean().sqrt()))
    ratios = [max(a / b, b / a) for a, b in itertools.pairwise(errors)]
    assert max(ratios) < 1.3 and errors[-1] < 0.6 * errors[0]


def test_a_step_with_one_node_does_not_forget_the_places_before_it() -> None:
    """Orders 3, 1, 3: the last step is through three places, solved here from the exact weights."""
    timesteps, seen = [100, 300, 500, 900], list[tuple[Tensor, Tensor]]()
    denoise, chain = TWO_MODES.denoiser(SCHEDULE), SCHEDULE.respace(timesteps)

    def listen(x_t: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        prediction = denoise(x_t, t, label)
        seen.append((x_t, prediction.x_0_hat))
        return prediction

    got = multistep_sample(
        listen, chain, randn(0), None, weights=exact_weights, order={3: 3, 2: 1, 1: 3}.__getitem__,
        correct_first=False, callback=None, final_step=False,
    )  # fmt: skip
    places = COSINE_PLACES[timesteps].tolist()
    h = places[0] - places[1]
    weights = exact_weights([0.0, (places[2] - places[1]) / h, (places[3] - places[1]) / h], h)
    ends = chain.alpha_bar[:2]
    expected = ((1 - ends[0]) / (1 - ends[1])).sqrt() * seen[2][0]
    for weight, (_, x_0_hat) in zip(weights, reversed(seen), strict=True):
        expected = expected + ends[0].sqrt() * weight * x_0_hat
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def from_step_300(sample: Callable[..., Tensor], data: Mixture, num_steps: int) -> float:
    """As in test_convergence.py, but from a place where x_0_hat changes from the first step on."""
    ends = LINEAR.log_snr(torch.tensor([0, 300]))
    places = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    x = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)
    got = sample(
        data.denoiser(LINEAR),
        LINEAR,
        x[:, None, None, None],
        None,
        timesteps=LINEAR.t_at_log_snr(places).tolist(),
        final_step=False,
    )
    exact = data.flow(x, float(LINEAR.alpha_bar[300]), float(LINEAR.alpha_bar[0]))
    return float((got.flatten() - exact).abs().max())


def slope(sample: Callable[..., Tensor], data: Mixture) -> float:
    return math.log2(from_step_300(sample, data, 160) / from_step_300(sample, data, 320))


def three_nodes_after_euler_s_step(
    denoise: NetworkDenoiser,
    schedule: NoiseSchedule,
    x_T: Tensor,
    label: None,
    *,
    timesteps: Sequence[float],
    final_step: bool,
) -> Tensor:
    return multistep_sample(
        denoise,
        schedule.respace(timesteps),
        x_T,
        label,
        weights=exact_weights,
        order=lambda i: 3,
        correct_first=False,
        callback=None,
        final_step=final_step,
    )


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["Gaussian", "mixture"])
def test_the_start_is_of_third_order_too(data: Mixture) -> None:
    """From pure noise the first step hardly matters; from the middle of the chain Euler's would cost an order."""
    assert slope(DPMSolver3M().sample, data) >= 2.85
    assert 1.7 < slope(three_nodes_after_euler_s_step, data) < 2.3
    assert 1.7 < slope(DPMSolver3MCommon().sample, data) < 2.3


@pytest.mark.parametrize("name", THREE_STEP)
def test_one_or_two_steps(name: str) -> None:
    """One step goes straight to x_0_hat; the first of two is Euler's as long as nothing is known of where it leads."""
    x_T, denoise = randn(0), GAUSSIAN.denoiser(SCHEDULE)
    got = THREE_STEP[name].sample(denoise, SCHEDULE, x_T, None, timesteps=[999])
    torch.testing.assert_close(got, denoise(x_T, torch.full((2,), 999), None).x_0_hat, rtol=0, atol=1e-12)
    euler = DDIM(eta=0.0).sample(denoise, SCHEDULE, x_T, None, timesteps=[400, 999], final_step=False)
    got = THREE_STEP[name].sample(denoise, SCHEDULE, x_T, None, timesteps=[400, 999], final_step=False)
    torch.testing.assert_close(got, euler, rtol=0, atol=1e-10)


def test_the_common_form_begins_as_2m() -> None:
    x_T, denoise = randn(0), TWO_MODES.denoiser(SCHEDULE)

    def difference(timesteps: list[int], *, final_step: bool) -> float:
        common, two = (
            sampler.sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, final_step=final_step)
            for sampler in (DPMSolver3MCommon(), DPMSolver2M())
        )
        return float((common - two).abs().max())

    assert difference([400, 600, 900], final_step=False) < 1e-12
    # With few steps the last but one has two nodes again.
    assert difference([20, 200, 600, 900], final_step=True) < 1e-12
    assert difference([20, 200, 400, 600, 900], final_step=True) > 1e-6


@pytest.mark.parametrize("name", THREE_STEP)
def test_zero_terminal_snr_is_the_limit(name: str) -> None:
    timesteps, x_T = [0, 200, 400, 600, 800, 999], randn(0)

    def run(schedule: NoiseSchedule) -> Tensor:
        denoise = NetworkDenoiser(network=GAUSSIAN.network(schedule, "v"), schedule=schedule, prediction_type="v")
        return THREE_STEP[name].sample(denoise, schedule, x_T, None, timesteps=timesteps)

    exact = run(NO_SIGNAL)
    assert bool(exact.isfinite().all())
    distances = []
    for last in (1e-9, 1e-14, 1e-19):
        alpha_bar = NO_SIGNAL.alpha_bar.clone()
        alpha_bar[-1] = last
        distances.append(float((run(NoiseSchedule.from_alpha_bar(alpha_bar)) - exact).abs().max()))
    assert distances[2] < distances[1] < distances[0] < 0.2


@pytest.mark.parametrize("name", THREE_STEP)
def test_one_network_evaluation_per_step(name: str) -> None:
    heard: list[int] = []
    network = GAUSSIAN.network(SCHEDULE)

    def counting(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        heard.append(int(t[0]))
        assert t.dtype == torch.int64 and t.shape == (2,)
        return network(x_t, t, label)

    denoise = NetworkDenoiser(network=counting, schedule=SCHEDULE)
    THREE_STEP[name].sample(denoise, SCHEDULE, randn(0), None, timesteps=[3, 10, 300, 500, 999])
    assert heard == [999, 500, 300, 10, 3]
