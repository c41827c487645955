"""Samplers with options of every kind, and a network for them whose answers do not depend on the batch."""

import torch
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver3M,
    DPMSolver3MCommon,
    Heun,
    ScheduleConfig,
    make_schedule,
)

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=100))
SHAPE = (3, 5, 7)
CHOSEN = [
    Ancestral(num_steps=20),
    Ancestral(num_steps=20, variance="fixed_large", spacing="trailing"),
    DDIM(num_steps=20),
    DDIM(num_steps=20, eta=0.0, spacing="leading", clip_x_0=False),
    DPMSolver2M(num_steps=20, dynamic_threshold=0.9),
    DPMSolver2MSDE(num_steps=20, spacing="quadratic", guidance_scale=2.0),
    DPMSolver3M(num_steps=20, spacing="trailing"),
    DPMSolver3MCommon(num_steps=20, clip_x_0=False),
    Heun(num_steps=10, spacing="log_snr"),
    Heun(num_steps=10, spacing="karras", churn=10.0),
]


def elementwise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network without sums: rounding cannot depend on the batch. Labels shift it."""
    shift = t / 100 if label is None else t / 100 + label
    return torch.tanh(x_t * 0.7 + shift.to(x_t)[:, None, None, None])
