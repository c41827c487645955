"""Which steps of the training chain a sampler visits, and the places between them for studies of convergence."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ddpm.process.schedules import NoiseSchedule

Spacing = Literal["leading", "linspace", "trailing", "quadratic", "log_snr", "karras"]

KARRAS_MAX_SIGMA, KARRAS_RHO = 80.0, 7.0
"""Noisiest place and exponent of the karras spacing (Karras et al. 2022, Table 1)."""


def spaced_timesteps(schedule: NoiseSchedule | int, num_steps: int, spacing: Spacing) -> list[int]:
    """A subset of the training chain's steps.

    Args:
        schedule: The training chain; its length T is enough for all spacings but log_snr and karras.
        num_steps: How many steps to visit, in [1, T].
        spacing: linspace includes both ends (rounded half to even); leading starts at 0 and may stop short of T-1;
            trailing ends at T-1 and may start after 0; quadratic has both ends and most steps near 0; log_snr has both
            ends and equal steps in log-SNR; karras goes from 0 to sigma = 80 or T-1, in equal steps of sigma^(1/7). In
            the last three, places that round to one step are moved apart to neighbouring steps.

    Returns:
        Strictly ascending indices in [0, T-1].

    Raises:
        ValueError: If num_steps is outside [1, T], the spacing is unknown, or it needs a schedule and got a length.

    Source:
        Lin et al. 2023 (arXiv:2305.08891), Table 2. Song et al. 2021 (arXiv:2010.02502), appendix D, for quadratic. Lu
        et al. 2022 (arXiv:2206.00927) for log_snr. Karras et al. 2022 (arXiv:2206.00364), Eq. 5. For one step, all but
        leading and karras visit T-1: x_T is noise of that step.
    """
    T = schedule if isinstance(schedule, int) else schedule.num_timesteps
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps: must be in [1, {T}], the trained steps, got {num_steps}; choose fewer")
    match spacing:
        case "leading":
            return [i * (T // num_steps) for i in range(num_steps)]
        case "linspace":
            return [round(i * (T - 1) / (num_steps - 1)) for i in range(num_steps)] if num_steps > 1 else [T - 1]
        case "trailing":
            return sorted(round(T - i * T / num_steps) - 1 for i in range(num_steps))
        case "quadratic":
            return _move_apart([(T - 1) * u**2 for u in _from_0_to_1(num_steps)], T)
        case "log_snr" | "karras":
            if isinstance(schedule, int):
                raise ValueError(f"schedule: {spacing} needs the noise schedule, got its length {T}; pass the schedule")
            return _move_apart(_places(schedule, num_steps, spacing), T)
    raise _unknown(spacing)


def continuous_timesteps(schedule: NoiseSchedule, num_steps: int, spacing: Spacing) -> list[float]:
    """Places between the training chain's steps, not rounded: a network must take float t to visit them.

    Args:
        schedule: The training chain.
        num_steps: How many places, at least 1; may exceed T.
        spacing: linspace, quadratic, log_snr or karras: those which rounding alone ties to the steps.

    Returns:
        Strictly ascending floats in [0, T-1].

    Raises:
        ValueError: If num_steps is below 1, or the spacing is another one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}; choose more")
    last, places = schedule.num_timesteps - 1, _from_0_to_1(num_steps)
    match spacing:
        case "linspace":
            return [last * u for u in places]
        case "quadratic":
            return [last * u**2 for u in places]
        case "log_snr" | "karras":
            return _places(schedule, num_steps, spacing)
    raise _unknown(spacing, "linspace", "quadratic", "log_snr", "karras")


def _from_0_to_1(num_steps: int) -> list[float]:
    """Equally spaced, both ends included; a single one is the end."""
    return [i / (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [1.0]


def _places(schedule: NoiseSchedule, num_steps: int, spacing: Literal["log_snr", "karras"]) -> list[float]:
    """Where the log-SNR or sigma^(1/7) is equally spaced, ascending in t."""
    last = schedule.num_timesteps - 1
    places = torch.tensor(_from_0_to_1(num_steps), dtype=torch.float64)
    ends = schedule.log_snr(torch.tensor([0, last]))
    if spacing == "karras":
        root = (-ends / (2 * KARRAS_RHO)).exp().clamp(max=KARRAS_MAX_SIGMA ** (1 / KARRAS_RHO))
        log_snr = -2 * KARRAS_RHO * torch.lerp(root[0], root[1], places).log()
    elif bool(ends[1].isinf()):
        # Without any signal the last step is infinitely far away: it is visited, the others share the rest.
        if num_steps <= 2:
            return [0.0, float(last)][-num_steps:]
        return [*_places(schedule.respace(range(last)), num_steps - 1, spacing), float(last)]
    else:
        log_snr = torch.lerp(ends[0], ends[1], places)
    return [float(place) for place in schedule.t_at_log_snr(log_snr)]


def _move_apart(places: Sequence[float], num_timesteps: int) -> list[int]:
    """The nearest steps; where several places share one, the next ones up, or down where the chain ends."""
    steps = [round(place) for place in places]
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    return [min(step, num_timesteps - len(steps) + i) for i, step in enumerate(steps)]


def _unknown(spacing: str, *choices: str) -> ValueError:
    return ValueError(
        f"spacing: must be one of {', '.join(choices or get_args(Spacing))}, got {spacing!r}; choose one of them"
    )
