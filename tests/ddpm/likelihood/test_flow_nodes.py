"""What the nodes of the probability flow leave of its error, on one pixel whose flow has a closed form.

In one dimension a flow keeps its places in order, so that x_T has the share of q(x_T) below it that x_1 has of q(x_1)
below it: x_T = F_T^-1(F_1(x_1)). The density that it carries from N(0, 1) follows from the change of variables,

    p(x_1) = N(x_T; 0, 1) q(x_1) / q(x_T),

with mixtures of Gaussians for both q. No differential equation is solved for it, and the network is exact, so that all
of the difference is the solver's.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm import (
    FlowBound,
    NoiseSchedule,
    ScheduleConfig,
    Spacing,
    Stream,
    bound_term,
    make_schedule,
    probability_flow_bound,
    q_sample,
    spaced_timesteps,
    standard_normal,
)
from ddpm.likelihood.probability_flow import probability_flow_log_density
from tests.ddpm.pixel_oracle import exact_model, values_of

SCHEDULES = {
    "linear, T = 1000": ScheduleConfig(),
    "linear, T = 4000": ScheduleConfig(num_timesteps=4000),
    "linear, zero terminal SNR": ScheduleConfig(zero_terminal_snr=True),
    "cosine, T = 1000": ScheduleConfig(name="cosine"),
    "cosine, T = 4000": ScheduleConfig(name="cosine", num_timesteps=4000),
}
BELL = torch.exp(-((torch.arange(26, dtype=torch.float64) - 12.5) / 5.2).square() / 2)
UNEVEN = 1 + 0.9 * torch.sin(5 * torch.arange(26, dtype=torch.float64))
PIXELS = {
    "26 neighbours, bell": (torch.arange(100, 126), BELL),
    "26 neighbours, uneven": (torch.arange(100, 126), UNEVEN),
    "26 levels, 5 apart, uneven": (torch.arange(60, 190, 5), UNEVEN),
    "17 levels of the digits": (torch.arange(17) * 255 // 16, torch.ones(17, dtype=torch.float64)),
    "all 256": (torch.arange(256), torch.ones(256, dtype=torch.float64)),
}
DRAWS = 16
"""Of the noise, for each level: the error differs more from place to place than from noise to noise."""


class Pixel:
    """One pixel of known levels, noised to t = 0 in several ways, and the exact density of the flow there."""

    def __init__(self, schedule: NoiseSchedule, levels: Tensor, share: Tensor) -> None:
        self.schedule, self.levels, self.share = schedule, values_of(levels), share / share.sum()
        self.model = exact_model(schedule, levels, 1, share=self.share)
        self.ids = torch.arange(len(levels) * DRAWS)
        self.x_0 = self.levels.repeat_interleave(DRAWS).reshape(-1, 1, 1, 1)
        self.weight = self.share.repeat_interleave(DRAWS) / DRAWS
        self.eps = standard_normal(0, Stream.EVAL_BOUND_EPS, self.ids, 0, (1, 1, 1), torch.float64)
        self.x_1 = q_sample(schedule, self.x_0, torch.zeros_like(self.ids), self.eps)

    def mean(self, bits: Tensor) -> float:
        """Over levels by their shares, and over the noise."""
        return float((self.weight * bits).sum())

    def log_q(self, x: Tensor, t: int) -> Tensor:
        """Of the noised pixel."""
        z, s = self._standardised(x, t)
        return (self.share.log() - z.square() / 2).logsumexp(-1) - math.log(s * math.sqrt(2 * math.pi))

    def below_and_above(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Shares of the noised pixel on both sides, each to its own last digit."""
        z, _ = self._standardised(x, t)
        return torch.special.ndtr(z) @ self.share, torch.special.ndtr(-z) @ self.share

    def _standardised(self, x: Tensor, t: int) -> tuple[Tensor, float]:
        abar = float(self.schedule.alpha_bar[t])
        s = (1 - abar) ** 0.5
        return (x[:, None] - abar**0.5 * self.levels) / s, s

    def exact_log_density(self) -> Tensor:
        """Of the flow from N(0, 1), at x_1."""
        x, last = self.x_1.flatten(), self.schedule.num_timesteps - 1
        below, above = self.below_and_above(x, 0)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(100):
            middle = (low + high) / 2
            below_middle, above_middle = self.below_and_above(middle, last)
            is_lower = torch.where(below < 0.5, below_middle < below, above_middle > above)
            low, high = torch.where(is_lower, middle, low), torch.where(is_lower, high, middle)
        normal = -middle.square() / 2 - math.log(2 * math.pi) / 2
        return normal + self.log_q(x, 0) - self.log_q(middle, last)

    def exact_bits(self) -> Tensor:
        """The bound, with the closed form in the place of the solver."""
        t = torch.zeros_like(self.ids)
        denoise = self.model.denoiser(clip_x_0=False)
        decoder = bound_term(self.schedule, denoise, self.x_0, t, None, variance="fixed_small", eps=self.eps)
        log_q = -(self.eps.flatten().square() + math.log(2 * math.pi * (1 - float(self.schedule.alpha_bar[0])))) / 2
        return (log_q - self.exact_log_density()) / math.log(2) + decoder

    def solved_bits(self) -> FlowBound:
        """The bound as it is measured, with 100 nodes."""
        return probability_flow_bound(self.model, seed=0, sample_ids=self.ids, x_0=self.x_0, label=None, num_steps=100)

    def bits_above_exact(self, spacing: Spacing, num_steps: int = 100) -> float:
        """The error of so many nodes of a spacing."""
        solved = probability_flow_log_density(
            self.model.denoiser(clip_x_0=False),
            self.schedule,
            self.x_1,
            None,
            timesteps=spaced_timesteps(self.schedule, num_steps, spacing),
            probes=torch.ones(1, *self.x_1.shape, dtype=torch.float64),
        )
        return self.mean(self.exact_log_density() - solved) / math.log(2)


def check(of: Pixel) -> tuple[float, float, float]:
    """Exact bits, the error of 100 nodes, and the share that is reported, which must hold the error."""
    found, exact = of.solved_bits(), of.exact_bits()
    error, share = of.mean(found.bits_per_dim - exact), of.mean(found.discretisation)
    assert abs(error) < 0.02 and abs(error) <= abs(share) + 1e-4
    return of.mean(exact), error, share


@pytest.mark.parametrize(
    ("schedule", "pixel"),
    [
        ("linear, T = 1000", "26 neighbours, bell"),
        ("linear, T = 1000", "26 neighbours, uneven"),
        ("linear, T = 4000", "26 levels, 5 apart, uneven"),
        ("linear, zero terminal SNR", "26 neighbours, uneven"),
        ("cosine, T = 1000", "26 levels, 5 apart, uneven"),
    ],
)
def test_the_share_of_discretisation_holds_the_error(schedule: str, pixel: str) -> None:
    """The error of 100 quadratic nodes; equal steps in t are far below what is true, and would fail this."""
    of = Pixel(make_schedule(SCHEDULES[schedule]), *PIXELS[pixel])
    _, error, _ = check(of)
    assert of.bits_above_exact("linspace") < -0.03 < -abs(error)


@pytest.mark.slow
def test_every_schedule_and_pixel() -> None:
    """The first table of the measurements."""
    print("\n| schedule | pixel | entropy | exact | 100 equal steps | 100 quadratic nodes | reported share |")
    print("|---|---|---|---|---|---|---|")
    for schedule, pixel in itertools.product(SCHEDULES, PIXELS):
        of = Pixel(make_schedule(SCHEDULES[schedule]), *PIXELS[pixel])
        exact, error, share = check(of)
        entropy, before = -float((of.share * of.share.log2()).sum()), of.bits_above_exact("linspace")
        print(
            f"| {schedule} | {pixel} | {entropy:.4f} | {exact:.4f} | {before:+.4f} | {error:+.4f} | {share:+.4f} |",
            flush=True,
        )


@pytest.mark.slow
def test_spacings_and_numbers_of_nodes() -> None:
    """Why quadratic, and why 100: the second table of the measurements."""
    print("\n| schedule | pixel | nodes | 25 | 50 | 100 | 200 |\n|---|---|---|---|---|---|---|")
    for schedule, pixel in itertools.product(SCHEDULES, ("26 neighbours, bell", "26 levels, 5 apart, uneven")):
        of = Pixel(make_schedule(SCHEDULES[schedule]), *PIXELS[pixel])
        spacings: tuple[Spacing, ...] = ("linspace", "quadratic", "log_snr")
        errors = {spacing: [of.bits_above_exact(spacing, n) for n in (25, 50, 100, 200)] for spacing in spacings}
        for spacing, row in errors.items():
            cells = " | ".join(f"{error:+.4f}" for error in row)
            print(f"| {schedule} | {pixel} | {spacing} | {cells} |", flush=True)
        assert abs(errors["quadratic"][2]) < min(0.02, abs(errors["linspace"][2]))
