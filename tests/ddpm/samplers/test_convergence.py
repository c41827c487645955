"""Every sampler approaches the truth at the speed that theory gives it, with the exact network of known data.

The schedule is continuous in t and the network takes float t; the interval is from sigma(999) to sigma(0), without the
final step: rounding to trained steps would end the convergence early, and a final step to zero noise puts a floor under
Heun. An error that falls by 2^p when the steps double has slope p; the last pair counts.

The table in ddpm/measurements.md is printed by

    pytest -s -m slow tests/ddpm/samplers/test_convergence.py
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ddpm import (
    DDIM,
    SAMPLERS,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver3M,
    DPMSolver3MCommon,
    Heun,
    NoiseSchedule,
    Sampler,
    ScheduleConfig,
    Spacing,
    Variance,
    make_schedule,
    p_sample,
)
from ddpm.process.spacing import continuous_timesteps
from tests.ddpm.oracles import GAUSSIAN, SKEWED, TWO_MODES, Mixture, affine_moments

LINEAR, COSINE = (make_schedule(ScheduleConfig(name=name)) for name in ("linear", "cosine"))
# Steps of samplers without noise, of those with it, and of ancestral sampling.
PAIRS = (160, 320), (80, 160), (125, 250)
ALL = (80, 160, 320, 640), (40, 80, 160, 320), (250, 500, 1000, 2000, 4000)
DETERMINISTIC: dict[str, tuple[Sampler, float]] = {
    "ddim, eta 0": (DDIM(eta=0.0), 1),
    "heun": (Heun(), 2),
    "dpm_solver_2m": (DPMSolver2M(), 2),
    "dpm_solver_3m_common": (DPMSolver3MCommon(), 2),
    "dpm_solver_3m": (DPMSolver3M(), 3),
}

NOISY: dict[str, tuple[Sampler, float]] = {
    "ddim, eta 0.5": (DDIM(eta=0.5), 1),
    "dpm_solver_2m_sde": (DPMSolver2MSDE(), 2),
    "heun, churn 10": (Heun(churn=10.0, churn_interval=(0.0, math.inf), churn_noise=1.0), 2),
}
VARIANCES: tuple[Variance, ...] = ("fixed_small", "fixed_large", "analytic")


def test_declared_orders_are_those_of_the_table() -> None:
    """Of every sampler: the order of what it makes of one x_T, or of the distribution where it draws noise."""
    table = [*DETERMINISTIC.values(), *NOISY.values(), *((Ancestral(variance=variance), 1) for variance in VARIANCES)]
    assert {sampler.name for sampler, _ in table} == set(SAMPLERS)
    for sampler, order in table:
        assert sampler.order == order, sampler


@dataclass(frozen=True)
class Row:
    """Errors of one sampler for several numbers of steps."""

    sampler: str
    data: str
    order: float
    steps: Sequence[int]
    errors: Sequence[float]

    @property
    def slope(self) -> float:
        """Of the last pair."""
        return math.log(self.errors[-2] / self.errors[-1]) / math.log(self.steps[-1] / self.steps[-2])

    def __str__(self) -> str:
        errors = ", ".join(f"{steps}: {error:.2e}" for steps, error in zip(self.steps, self.errors, strict=True))
        return f"| {self.sampler} | {self.data} | {errors} | {self.slope:.2f} | {self.order:g} |"


def flow_error(
    sampler: Sampler,
    data: Mixture,
    num_steps: int,
    schedule: NoiseSchedule = LINEAR,
    spacing: Spacing = "log_snr",
) -> float:
    """Largest distance from the exact end of the flow, over starts that all but one in a hundred x_T lie between."""
    x_T = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    timesteps = continuous_timesteps(schedule, num_steps + 1, spacing)
    start, end = schedule.alpha_bar_at(torch.tensor([timesteps[-1], timesteps[0]], dtype=torch.float64)).tolist()
    exact = data.flow(x_T, start, end)
    got = sampler.sample(
        data.denoiser(schedule), schedule, x_T[:, None, None, None], None, timesteps=timesteps, final_step=False
    )
    return float((got.flatten() - exact).abs().max())


def variance_error(sampler: Sampler, num_steps: int, spacing: Spacing = "log_snr") -> float:
    """Error of the variance at the end, on Gaussian data; the mean must be exact."""
    timesteps = continuous_timesteps(LINEAR, num_steps + 1, spacing)
    start, (mean, variance) = (GAUSSIAN.mean_and_variance(float(LINEAR.alpha_bar[t])) for t in (-1, 0))
    denoise = GAUSSIAN.denoiser(LINEAR)
    got_mean, got_variance = affine_moments(
        lambda x_T, noise: sampler.sample(
            denoise, LINEAR, x_T, None, timesteps=timesteps, noise=noise, final_step=False
        ),
        num_steps,
        *start,
    )
    assert got_mean == pytest.approx(mean, abs=1e-10)
    return abs(got_variance - variance)


def ancestral_variance_error(variance: Variance, num_steps: int) -> float:
    """The same for ancestral sampling: it looks at one step only, so mean and variance carry from step to step."""
    chain = LINEAR.respace(continuous_timesteps(LINEAR, num_steps + 1, "log_snr"))
    denoise, x_0_error = GAUSSIAN.denoiser(LINEAR), GAUSSIAN.x_0_error(chain.alpha_bar)
    (mean, var), end = (GAUSSIAN.mean_and_variance(float(chain.alpha_bar[t])) for t in (-1, 0))
    x_t, eps = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    for i in range(num_steps, 0, -1):
        t = torch.full((3,), i)
        step = p_sample(chain, denoise, x_t, t, None, variance=variance, eps=eps, x_0_error=x_0_error)
        constant, of_x, of_eps = step.flatten().tolist()
        mean, var = constant + (of_x - constant) * mean, (of_x - constant) ** 2 * var + (of_eps - constant) ** 2
    assert mean == pytest.approx(end[0], abs=1e-10)
    return abs(var - end[1])


def ancestral_error(data: Mixture, variance: Variance, num_steps: int) -> float:
    """Error of E[x^2] after ancestral sampling, x_T having the true distribution, by quadrature.

    u_i(x) = E[x_end^2 | x_i = x] is carried upwards one step at a time: u_i(x) is the mean of u_{i-1} over the noise of
    the step (Gauss-Hermite), read between grid points by a polynomial of degree 5.
    """
    chain = LINEAR.respace(continuous_timesteps(LINEAR, num_steps + 1, "log_snr"))
    denoise, half_width, num_nodes = data.denoiser(LINEAR), 5.5, 551
    x_0_error = data.x_0_error(chain.alpha_bar)
    grid = torch.linspace(-half_width, half_width, num_nodes, dtype=torch.float64)
    spacing = float(grid[1] - grid[0])
    abscissae, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    x_t = grid.repeat_interleave(3)[:, None, None, None]
    eps = abscissae.repeat(num_nodes)[:, None, None, None]
    offsets = torch.arange(-2, 4)
    u = grid**2
    for i in range(1, num_steps + 1):
        t = torch.full((len(x_t),), i)
        x = p_sample(chain, denoise, x_t, t, None, variance=variance, eps=eps, x_0_error=x_0_error).flatten()
        place = (x.clamp(-half_width, half_width) + half_width) / spacing
        left = place.floor().to(torch.int64).clamp(2, num_nodes - 4)
        # Lagrange's polynomials through six neighbours.
        distance = (place - left)[:, None] - offsets
        basis = [
            math.prod(distance[:, k] / (j - offsets[k].item()) for k in range(6) if k != index)
            for index, j in enumerate(offsets.tolist())
        ]
        values = (torch.stack(basis, dim=1) * u[left[:, None] + offsets]).sum(1)
        u = (values.reshape(num_nodes, 3) * weights).sum(1) / weights.sum()
    component_weights, means, variances = data.components(chain.alpha_bar[-1])
    density = component_weights * (-((grid[:, None] - means) ** 2) / (2 * variances)).exp()
    density = (density / (2 * math.pi * variances).sqrt()).sum(1)
    mean, variance_end = data.mean_and_variance(float(chain.alpha_bar[0]))
    return abs(float((u * density).sum() * spacing) - mean**2 - variance_end)


def rows(flow: Sequence[int], few: Sequence[int], many: Sequence[int]) -> list[Row]:
    """The table: noiseless samplers by the largest error of a pixel, the others by that of the variance or E[x^2]."""
    table = []
    for (name, (sampler, order)), (label, data) in itertools.product(
        DETERMINISTIC.items(), {"Gaussian": GAUSSIAN, "mixture": TWO_MODES}.items()
    ):
        table.append(Row(name, label, order, flow, [flow_error(sampler, data, n) for n in flow]))
    for name, (sampler, order) in NOISY.items():
        table.append(Row(name, "Gaussian", order, few, [variance_error(sampler, n) for n in few]))
    for variance in VARIANCES:
        name = f"ancestral, {variance}"
        if variance != "analytic":  # exact on a Gaussian: test_analytic.py
            table.append(Row(name, "Gaussian", 1, many, [ancestral_variance_error(variance, n) for n in many]))
        table.append(Row(name, "mixture", 1, many, [ancestral_error(SKEWED, variance, n) for n in many]))
    return table


@pytest.mark.parametrize(
    "steps", [pytest.param(PAIRS, id="pairs"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
)
def test_table(steps: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> None:
    """Print the table and hold every slope against its theory."""
    table = rows(*steps)
    print("\n| sampler | data | error for this many steps | slope | theory |\n|---|---|---|---|---|")
    print(*table, sep="\n")
    assert [row for row in table if not row.slope >= row.order - 0.15] == []


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["Gaussian", "mixture"])
def test_third_order_on_karras_places(data: Mixture) -> None:
    """And the form in common use is of second order there as well: it does not converge faster by chance."""

    def slope(name: str) -> float:
        coarse, fine = (flow_error(DETERMINISTIC[name][0], data, n, LINEAR, "karras") for n in (320, 640))
        return math.log2(coarse / fine)

    assert slope("dpm_solver_3m") >= 2.85
    assert 1.8 <= slope("dpm_solver_3m_common") <= 2.2


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_equal_steps_in_t(name: str, schedule: NoiseSchedule) -> None:
    """The longest steps are near sigma(0) and many times the shortest: third order shows late, and not yet quite."""
    sampler, order = DETERMINISTIC[name]
    pair = (160, 320) if order < 3 else (1280, 2560)
    coarse, fine = (flow_error(sampler, GAUSSIAN, n, schedule, "linspace") for n in pair)
    assert math.log2(coarse / fine) >= order - (0.15 if order < 3 else 0.35)


def test_order_2_is_worth_it() -> None:
    """At equal numbers of network evaluations: 2M before Heun before DDIM, and ancestral sampling far behind."""
    errors = {
        "2m": flow_error(DPMSolver2M(), TWO_MODES, 160),
        "heun": flow_error(DETERMINISTIC["heun"][0], TWO_MODES, 80),
        "ddim": flow_error(DETERMINISTIC["ddim, eta 0"][0], TWO_MODES, 160),
    }
    assert errors["2m"] < errors["heun"] / 3 < errors["ddim"] / 30
