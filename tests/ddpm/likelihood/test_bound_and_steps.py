"""What more steps do to the bound of a model that cannot be better: the posterior mean itself, of one pixel.

Prints the table of ddpm/README.md, by `pytest -s`. The expectation over x_t is a sum over a grid, not a draw.
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm import NoiseSchedule, Prediction, ScheduleConfig, bound_loss, make_schedule, p_mean_variance, prior_loss
from ddpm.shapes import Images, Labels, Times

LEVELS = torch.linspace(10, 245, 26).round().to(torch.float64)
"""One pixel that is one of 26 levels of 256, each as likely as the others."""
PIXELS = 2 * LEVELS / 255 - 1
ENTROPY = math.log2(len(LEVELS))


def terms_of_the_exact_model(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Terms of the bound at the given entries of the chain, in bits [N], in expectation over x_t."""
    z = torch.linspace(-8, 8, 65, dtype=torch.float64)
    mass = torch.softmax(-z.square() / 2, dim=0)

    def denoise(x_t: Images, t: Times, label: Labels | None) -> Prediction:
        alpha_bar = schedule.alpha_bar[t][:, None]
        log_density = -(x_t.flatten(1) - alpha_bar.sqrt() * PIXELS).square() / (2 * (1 - alpha_bar))
        x_0_hat = (torch.softmax(log_density, dim=1) @ PIXELS)[:, None, None, None]
        return Prediction(x_0_hat=x_0_hat, eps_hat=x_t)

    found = []
    x_0 = PIXELS.repeat_interleave(len(z))[:, None, None, None]
    eps = z.repeat(len(PIXELS))[:, None, None, None]
    for index in t.tolist():
        here = torch.full((len(x_0),), index)
        alpha_bar = schedule.alpha_bar[index]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        step = p_mean_variance(schedule, denoise, x_t, here, None, variance="fixed_small")
        bits = bound_loss(schedule, x_0, here, step).reshape(len(PIXELS), len(z))
        found.append((bits @ mass).mean())
    return torch.stack(found)


def bound_of_the_exact_model(schedule: NoiseSchedule) -> tuple[float, float, float]:
    """L_T, the sum of L_{t-1}, and L_0."""
    terms = terms_of_the_exact_model(schedule, torch.arange(schedule.num_timesteps))
    prior = float(prior_loss(schedule, PIXELS[:, None, None, None]).mean())
    return prior, float(terms[1:].sum()), float(terms[0])


def with_the_papers_ends(num_timesteps: int) -> NoiseSchedule:
    return NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64))


def test_a_term_is_what_the_signal_to_noise_ratios_make_of_the_least_error() -> None:
    """With the posterior's variance, L_{t-1} = (SNR_{t-1} - SNR_t) E|x_0 - x_0_hat|^2 / 2, by one-dimensional sums."""
    schedule = make_schedule(ScheduleConfig(num_timesteps=100))
    t = torch.tensor([1, 2, 5, 20, 60, 99])
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    mass = torch.softmax(-z.square() / 2, dim=0)
    for index, bits in zip(t.tolist(), terms_of_the_exact_model(schedule, t), strict=True):
        y = PIXELS[:, None] + z / snr[index].sqrt()
        weights = torch.softmax(-(y[..., None] - PIXELS).square() * snr[index] / 2, dim=-1)
        least_error = ((PIXELS[:, None] - weights @ PIXELS).square() @ mass).mean()
        expected = (snr[index - 1] - snr[index]) * least_error / 2 / math.log(2)
        assert float(bits) == pytest.approx(float(expected), rel=1e-6)


def test_the_factor_that_l_simple_drops_is_as_the_page_says() -> None:
    """Of |eps - eps_theta|^2 in L_{t-1}, read off the terms: (the bound with an error) - (without), in nats."""
    schedule = make_schedule(ScheduleConfig())
    t = torch.arange(1, 1000)
    x_0, eps = torch.zeros(999, 1, 1, 1, dtype=torch.float64), torch.zeros(999, 1, 1, 1, dtype=torch.float64)

    def denoise(x_t: Images, index: Times, label: Labels | None) -> Prediction:
        """Errs by 1 in eps: eps_hat is 1 where x_t holds no noise."""
        sigma = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()[index][:, None, None, None]
        return Prediction(x_0_hat=-sigma * (eps + 1), eps_hat=eps + 1)

    step = p_mean_variance(schedule, denoise, x_0, t, None, variance="fixed_small")
    factor = dict(zip((t + 1).tolist(), (bound_loss(schedule, x_0, t, step) * math.log(2)).tolist(), strict=True))
    assert (round(factor[2], 2), round(factor[10], 3)) == (0.60, 0.086)
    late = [factor[one] for one in range(100, 1001)]
    assert (round(min(late), 4), round(max(late), 4)) == (0.0050, 0.0103)
    last = [float(prior_loss(schedule, torch.full((1, 1, 1, 1), 1.0))), float(schedule.alpha_bar[-1])]
    assert (round(last[0], 6), round(last[1], 6)) == (2.9e-5, 4.0e-5)


def test_more_steps_alone_do_not_lower_the_bound_but_less_noise_in_the_first_does() -> None:
    print(f"\nentropy {ENTROPY:.2f} bits")
    totals = {}
    for num_timesteps in (250, 1000, 4000):
        for name, schedule in {
            "linear, 1e-4 to 0.02": with_the_papers_ends(num_timesteps),
            "linear, scaled by 1000 / T": make_schedule(ScheduleConfig(num_timesteps=num_timesteps)),
            "cosine": make_schedule(ScheduleConfig(name="cosine", num_timesteps=num_timesteps)),
        }.items():
            parts = bound_of_the_exact_model(schedule)
            totals[name, num_timesteps] = sum(parts)
            print(f"{name} | {num_timesteps} | {sum(parts):.2f} = " + " + ".join(f"{part:.2f}" for part in parts))
    assert min(totals.values()) > ENTROPY
    fixed, scaled = "linear, 1e-4 to 0.02", "linear, scaled by 1000 / T"
    assert totals[fixed, 1000] == totals[scaled, 1000], "one schedule"
    fallen = {name: totals[name, 1000] - totals[name, 4000] for name in (fixed, scaled)}
    assert 0 < fallen[fixed] < fallen[scaled] / 5
    assert totals["cosine", 4000] < totals[scaled, 4000] < totals[scaled, 1000] < totals[scaled, 250]


def test_why_more_steps_alone_do_not_help_is_as_the_page_says() -> None:
    counts = []
    for num_timesteps in (1000, 4000):
        alpha_bar = with_the_papers_ends(num_timesteps).alpha_bar
        counts.append(int((alpha_bar / (1 - alpha_bar) > 1000).sum()))
    assert counts == [6, 8]
    schedule = make_schedule(ScheduleConfig())
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    assert [round(float(snr[k] / snr[k + 1]), 1) for k in (0, 1)] == [2.2, 1.6]
    width = float(schedule.posterior_log_variance[0].exp().sqrt())
    assert (round(width, 4), round(2 / 255, 4)) == (0.0074, 0.0078)
    own_level = math.erf(1 / 255 / width / math.sqrt(2))
    assert (
        round(-math.log2(own_level), 2),
        round(float(terms_of_the_exact_model(schedule, torch.tensor([0]))[0]), 2),
    ) == (1.31, 1.32)
