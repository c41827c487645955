"""Noise schedules: every table that the forward and the reverse process need, in float64.

Float64 because the tables hold differences of numbers close to one (1 - alpha_bar at t = 0 is 1e-4) and products of a
thousand factors; they are cast to the dtype of the images only where they are used.

`t` is the 0-based index: t = 0 is the paper's t = 1, and t = T - 1 is almost pure noise. A schedule may be *respaced*
to a subset of the steps it was trained on; `timesteps[t]` is then the index in the training chain, which is what the
network is given.

Source:
    Ho et al. 2020 (arXiv:2006.11239). Nichol and Dhariwal 2021 (arXiv:2102.09672) for the cosine schedule, respacing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

Table = Float64[Tensor, " T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which variances the forward process adds, step by step."""

    name: Literal["linear", "cosine"] = "linear"
    """linear: Ho et al., 1e-4 to 0.02, scaled by 1000 / T. cosine: Nichol and Dhariwal, for small images."""
    num_timesteps: int = 1000
    """T, the number of diffusion steps."""

    def __post_init__(self) -> None:
        """Refuse chains for which a beta would reach 1."""
        if self.name not in ("linear", "cosine"):
            raise ValueError(f"name: must be linear or cosine, got {self.name!r}; choose one of them")
        least = 21 if self.name == "linear" else 2
        if self.num_timesteps < least:
            raise ValueError(
                f"num_timesteps: must be at least {least} for the {self.name} schedule, got {self.num_timesteps}; "
                "train with more steps (sampling may use fewer)"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoiseSchedule:
    """Tables of length T, float64, on the CPU. Build it with make_schedule, from_betas or respace."""

    beta: Table
    """Variance added by step t: q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta I). Eq. 2."""
    alpha: Table
    """1 - beta."""
    alpha_bar: Table
    """Product of alpha up to and including t: q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I). Eq. 4."""
    alpha_bar_prev: Table
    """alpha_bar of the step before; 1 at t = 0."""
    posterior_variance: Table
    """Variance of q(x_{t-1} | x_t, x_0), beta_tilde of Eq. 7; 0 at t = 0."""
    posterior_log_variance: Table
    """Its logarithm, where entry 0 (log 0) is replaced by entry 1, as the decoder of L_0 needs."""
    posterior_mean_coef_x_0: Table
    """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0), Eq. 7."""
    posterior_mean_coef_x_t: Table
    """Coefficient of x_t in that mean."""
    timesteps: Int64[Tensor, " T"]
    """Index of each entry in the training chain: what the network is given."""
    num_train_timesteps: int
    """Length of the training chain."""

    @property
    def num_timesteps(self) -> int:
        """Length of this chain, T."""
        return len(self.beta)

    @classmethod
    def from_betas(cls, beta: Table) -> "NoiseSchedule":
        """The schedule of a training chain.

        Args:
            beta: float64 [T], each in (0, 1).

        Raises:
            ValueError: If beta is not a non-empty float64 vector or leaves (0, 1).
        """
        if beta.dtype != torch.float64 or beta.ndim != 1 or len(beta) == 0:
            raise ValueError(f"beta: must be a float64 vector, got {beta.dtype} {list(beta.shape)}; convert it first")
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(f"beta: must lie in (0, 1), got {float(beta.min())} to {float(beta.max())}; rescale it")
        return _tables(beta, torch.cumprod(1 - beta, dim=0), torch.arange(len(beta)), len(beta))

    def respace(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """The chain that visits only some of this chain's steps, with the same marginals q(x_t | x_0).

        Args:
            timesteps: Indices into this chain, strictly ascending, in [0, T-1].

        Raises:
            ValueError: If timesteps are empty, not strictly ascending or out of range.

        Source:
            Nichol and Dhariwal 2021, section 4: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} along the subset.
        """
        steps = list(timesteps)
        if steps != sorted(set(steps)) or not steps or steps[0] < 0 or steps[-1] >= self.num_timesteps:
            last = self.num_timesteps - 1
            raise ValueError(f"timesteps: must ascend strictly within [0, {last}], got {steps}; sort, drop repeats")
        index = torch.tensor(steps)
        alpha_bar = self.alpha_bar[index]
        beta = 1 - alpha_bar / _shift(alpha_bar)
        return _tables(beta, alpha_bar, self.timesteps[index], self.num_train_timesteps)


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule that a config names."""
    T = config.num_timesteps
    return NoiseSchedule.from_betas(linear_betas(T) if config.name == "linear" else cosine_betas(T))


def linear_betas(num_timesteps: int) -> Table:
    """Equally spaced from 1e-4 to 0.02, times 1000 / T so that the end is as noisy for every T.

    Source:
        Ho et al. 2020, section 4; the scaling as in Nichol and Dhariwal's code.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """Betas whose alpha_bar falls as a squared cosine; the last ones are capped.

    Source:
        Nichol and Dhariwal 2021, Eq. 17.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((time + offset) / (1 + offset) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def gather(table: Table, t: Int[Tensor, " b"], like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """Entries of a table for a batch, shaped to multiply images.

    Args:
        table: float64 [T].
        t: Index [B] in [0, T-1].
        like: Images whose dtype and device the result takes; the cast is the last thing done.

    Returns:
        [B, 1, 1, 1].
    """
    return table.to(t.device)[t].to(like)[:, None, None, None]


def _shift(alpha_bar: Table) -> Table:
    """alpha_bar one step earlier, 1 before the first."""
    return torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))


def _tables(beta: Table, alpha_bar: Table, timesteps: Tensor, num_train_timesteps: int) -> NoiseSchedule:
    """Every derived table of a chain, Eq. 7."""
    alpha, alpha_bar_prev = 1 - beta, _shift(alpha_bar)
    posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # A chain of one step has no entry 1: its only choice is beta.
    first = posterior_variance[1:2] if len(beta) > 1 else beta
    return NoiseSchedule(
        beta=beta,
        alpha=alpha,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        posterior_variance=posterior_variance,
        posterior_log_variance=torch.cat((first, posterior_variance[1:])).log(),
        posterior_mean_coef_x_0=alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
        posterior_mean_coef_x_t=alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        timesteps=timesteps,
        num_train_timesteps=num_train_timesteps,
    )
