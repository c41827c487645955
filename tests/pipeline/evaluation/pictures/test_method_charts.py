"""The method's charts: drawn for every schedule, and the weights in them are those of the bound."""

import pytest
import torch

from ddpm import (
    NetworkDenoiser,
    PredictionType,
    ScheduleConfig,
    bound_term,
    make_schedule,
    prediction_target,
)
from ddpm.process.prediction import predict_eps_from_x_0
from pipeline.evaluation.pictures.method_charts import (
    draw_loss_weights,
    draw_posterior_variance,
    draw_schedules,
    weights_of_x_0,
)

SCHEDULES = [
    ScheduleConfig(),
    ScheduleConfig(name="cosine", num_timesteps=50),
    ScheduleConfig(name="cosine", zero_terminal_snr=True),
    ScheduleConfig(shift=3.0),
    ScheduleConfig(name="cosine", num_timesteps=5),
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
    """A prediction whose x_0_hat is off by d costs weight x d^2 nats more than the exact one, at every t > 0."""
    schedule = make_schedule(ScheduleConfig(num_timesteps=50))
    weights = weights_of_x_0(schedule, "eps")["L_vlb, fixed_small"]
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 50)
    x_0, eps = (torch.randn((49, 1, 4, 4), generator=generator, dtype=torch.float64) for _ in range(2))

    def bits(off: float) -> torch.Tensor:
        denoise = NetworkDenoiser(
            network=lambda x, t, label: x_0 + off, schedule=schedule, prediction_type="x_0", clip_x_0=False
        )
        return bound_term(schedule, denoise, x_0, t, None, variance="fixed_small", eps=eps)

    nats = (bits(0.1) - bits(0.0)) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(nats / 0.01, weights[1:], rtol=1e-9)


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_every_weight_is_finite_and_that_of_the_prediction_s_error(
    config: ScheduleConfig, prediction: PredictionType
) -> None:
    schedule = make_schedule(config)
    for weights in weights_of_x_0(schedule, prediction).values():
        assert bool(weights.isfinite().all())
    if prediction == "eps" and config.zero_terminal_snr:
        return
    t = torch.arange(schedule.num_timesteps)
    x_t = torch.ones((len(t), 1, 1, 1), dtype=torch.float64)
    targets = []
    for value in (0.0, 1.0):  # two answers for the same x_t whose x_0 differ by 1
        x_0 = torch.full_like(x_t, value)
        targets.append(prediction_target(schedule, x_0, t, predict_eps_from_x_0(schedule, x_t, t, x_0), prediction))
    factor = weights_of_x_0(schedule, prediction)[f"L_simple of {prediction}"]
    assert torch.allclose((targets[1] - targets[0]).flatten().square(), factor, rtol=1e-9)
