"""Charts of the method itself, by schedule: signal and noise, the variance of a step, the weights of objectives."""

import dataclasses

import torch

from ddpm import (
    NoiseSchedule,
    ObjectiveConfig,
    PredictionType,
    ScheduleConfig,
    make_schedule,
    spaced_timesteps,
)
from ddpm.process.interpolation import Table
from ddpm.training.objectives import loss_weights
from pipeline.evaluation.charts import Line, Panel, line_charts

_CHAINS = (1000, 100, 20)
_LEAST_LINEAR_STEPS = 21  # shorter linear chains would have a beta of 1


def draw_schedules(config: ScheduleConfig) -> bytes:
    """Signal left and log-SNR against t, of the usual schedules of the same length, as a PNG."""
    cosine = dataclasses.replace(config, name="cosine", shift=1.0, zero_terminal_snr=False)
    schedules = {"cosine": cosine, "cosine, shift 4": dataclasses.replace(cosine, shift=4.0)}
    if config.num_timesteps >= _LEAST_LINEAR_STEPS:
        linear = dataclasses.replace(cosine, name="linear")
        schedules["linear"] = linear
        schedules["linear, zero terminal SNR"] = dataclasses.replace(linear, zero_terminal_snr=True)
    if config not in schedules.values():
        schedules["this model's"] = config
    signal, log_snr = [], []
    for name, choice in schedules.items():
        schedule = make_schedule(choice)
        t = torch.arange(schedule.num_timesteps)
        signal.append(Line(label=name, x=t.tolist(), y=schedule.alpha_bar.sqrt().tolist()))
        finite = schedule.alpha_bar > 0
        log_snr.append(Line(label=name, x=t[finite].tolist(), y=schedule.log_snr(t[finite]).tolist()))
    return line_charts(
        [
            Panel(title="signal left, sqrt(alpha_bar)", lines=signal),
            Panel(title="log-SNR, log(alpha_bar / (1 - alpha_bar))", lines=log_snr, limits_y=(-15.0, 10.0)),
        ],
        x_label="t",
    )


def draw_posterior_variance(config: ScheduleConfig) -> bytes:
    """The fixed variances of a step, between which a learned one lies, and their ratio on shorter chains, as a PNG."""
    schedule = make_schedule(config)
    t = list(range(1, schedule.num_timesteps))
    deviations = [
        Line(label="fixed_large: sqrt(beta)", x=t, y=schedule.beta[1:].sqrt().tolist()),
        Line(label="fixed_small: sqrt(beta_tilde)", x=t, y=schedule.posterior_variance[1:].sqrt().tolist()),
    ]
    ratios = []
    for num_steps in _CHAINS:
        if num_steps <= schedule.num_timesteps:
            chain = schedule.respace(spaced_timesteps(schedule, num_steps, "linspace"))
            ratio = chain.posterior_variance[1:] / chain.beta[1:]
            ratios.append(Line(label=f"{num_steps} steps", x=chain.timesteps[1:].tolist(), y=ratio.tolist()))
    return line_charts(
        [
            Panel(title="standard deviation of a step", lines=deviations, log_y=True),
            Panel(title="fixed_small / fixed_large, by length of the chain", lines=ratios),
        ],
        x_label="t",
        log_x=True,
    )


def draw_loss_weights(config: ScheduleConfig, prediction_type: PredictionType) -> bytes:
    """How strongly each objective weighs the squared error of eps, and of x_0, as a PNG; each has median 1 over t."""
    schedule = make_schedule(config)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    shown = (schedule.alpha_bar > 0) & (torch.arange(len(snr)) > 0)  # no eps can be told from x_0 without signal
    place = torch.arange(len(snr))[shown].tolist()
    panels = []
    for title, per_x_0 in (("weight of the error of eps", snr), ("weight of the error of x_0", torch.ones_like(snr))):
        lines = []
        for name, weights in weights_of_x_0(schedule, prediction_type).items():
            weight = (weights / per_x_0)[shown]
            lines.append(Line(label=name, x=place, y=(weight / weight.median()).tolist()))
        panels.append(Panel(title=title, lines=lines, log_y=True, limits_y=(1e-3, 1e3)))
    return line_charts(panels, x_label="t")


def weights_of_x_0(schedule: NoiseSchedule, prediction_type: PredictionType) -> dict[str, Table]:
    """Factor of the squared error of x_0_hat in each objective, at every t [T]; finite also without signal.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Eq. 12 with sigma^2 = beta_tilde, for the bound: there the means of a step
        differ by a multiple of the error of x_0_hat.
    """
    alpha_bar = schedule.alpha_bar
    snr = alpha_bar / (1 - alpha_bar)
    per_prediction = {
        "eps": snr,
        "x_0": torch.ones_like(alpha_bar),
        "v": 1 / (1 - alpha_bar),
    }
    return {
        f"L_simple of {prediction_type}": per_prediction[prediction_type],
        "min-SNR, gamma 5": snr * loss_weights(schedule, ObjectiveConfig(weighting="min_snr"), "eps"),
        "P2, gamma 1": snr * loss_weights(schedule, ObjectiveConfig(weighting="p2"), "eps"),
        "L_vlb, fixed_small": schedule.posterior_mean_coef_x_0.square() / (2 * schedule.posterior_log_variance.exp()),
    }
