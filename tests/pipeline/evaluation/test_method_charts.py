"""The method's charts: drawn for every schedule, and the weights in them are those of the bound."""

import pytest
import torch

from ddpm import (
    NetworkDenoiser,
    ScheduleConfig,
    bound_term,
    make_schedule,
    predict_eps_from_x_0,
    prediction_target,
    q_sample,
)
from pipeline.evaluation import method_charts
from pipeline.evaluation.method_charts import draw_loss_weights, draw_posterior_variance, draw_schedules

SCHEDULES = [
    ScheduleConfig(),
    ScheduleConfig(name="cosine", num_timesteps=50),
    ScheduleConfig(name="cosine", zero_terminal_snr=True),
    ScheduleConfig(shift=3.0),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_every_schedule_can_be_drawn(config: ScheduleConfig) -> None:
    prediction = "v" if config.zero_terminal_snr else "eps"
    pictures = {draw_schedules(config), draw_posterior_variance(config), draw_loss_weights(config, prediction)}
    assert len(pictures) == 3 and all(png[:8] == b"\x89PNG\r\n\x1a\n" for png in pictures)


def test_a_schedule_of_its_own_gets_a_line_of_its_own() -> None:
    assert draw_schedules(ScheduleConfig()) == draw_schedules(ScheduleConfig(name="cosine"))
    assert draw_schedules(ScheduleConfig()) != draw_schedules(ScheduleConfig(shift=3.0))


def test_the_weights_of_the_bound_are_those_of_its_terms() -> None:
    """A prediction that is off by d in eps costs weight x d^2 nats more than the exact one, at every t > 0."""
    schedule = make_schedule(ScheduleConfig(num_timesteps=50))
    weights = method_charts._bound_weights(schedule)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 50)
    x_0, eps = (torch.randn((49, 1, 4, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    x_t = q_sample(schedule, x_0, t, eps)
    exact = predict_eps_from_x_0(schedule, x_t, t, x_0)

    def bits(off: float) -> torch.Tensor:
        denoise = NetworkDenoiser(network=lambda x, t, label: exact + off, schedule=schedule, clip_x_0=False)
        return bound_term(schedule, denoise, x_0, t, None, variance="fixed_small", eps=eps)

    nats = (bits(0.1) - bits(0.0)) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(nats / 0.01, weights[1:], rtol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_error_of_a_prediction_per_error_of_eps(prediction: str) -> None:
    schedule = make_schedule(ScheduleConfig(num_timesteps=50))
    t = torch.arange(50)
    x_0 = torch.zeros((50, 1, 1, 1), dtype=torch.float64)
    x_t = torch.ones_like(x_0)
    targets = []
    for eps in (0.0, 1.0):  # two answers for the same x_t that differ by 1 in eps
        noise = torch.full_like(x_0, eps)
        clean = (x_t - (1 - schedule.alpha_bar).sqrt()[:, None, None, None] * noise) / schedule.alpha_bar.sqrt()[
            :, None, None, None
        ]
        targets.append(prediction_target(schedule, clean, t, noise, prediction))  # type: ignore[arg-type]
    factor = method_charts._eps_error_per_error(schedule, prediction)  # type: ignore[arg-type]
    assert torch.allclose((targets[1] - targets[0]).flatten().square(), factor, rtol=1e-9)
