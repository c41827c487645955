"""Noise schedules: every table that the forward and the reverse process need, in float64.

Float64 because the tables hold differences of numbers close to one (1 - alpha_bar at t = 0 is 1e-4) and products of a
thousand factors; they are cast to the dtype of the images only where they are used.

`t` is the 0-based index: t = 0 is the paper's t = 1, and t = T - 1 is almost pure noise. A schedule may be *respaced*
to a subset of the steps it was trained on; `timesteps[t]` is then the index in the training chain, which is what the
network is given.

Every schedule is continuous in t as well: between two steps the angle arctan(sigma) is interpolated, where
sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of x_t per unit of signal. The angle is finite at both ends, with
no signal left (pi/2) as with no noise (0), and for the cosine schedule it is a straight line.

Source:
    Ho et al. 2020 (arXiv:2006.11239). Nichol and Dhariwal 2021 (arXiv:2102.09672) for respacing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from ddpm.process.interpolation import Table, interpolate, invert
from ddpm.process.noise_levels import cosine_betas, linear_betas, shift_alpha_bar, zero_terminal_alpha_bar
from ddpm.shapes import Times

__all__ = ["NoiseSchedule", "ScheduleConfig", "Table", "gather", "make_schedule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which variances the forward process adds, step by step."""

    name: Literal["linear", "cosine"] = "linear"
    """linear: Ho et al., 1e-4 to 0.02, scaled by 1000 / T. cosine: Nichol and Dhariwal, for small images."""
    num_timesteps: int = 1000
    """T, the number of diffusion steps."""
    shift: float = 1.0
    """Factor on the noise per unit of signal, for images k times as wide as the schedule was made for: k. 1: none."""
    zero_terminal_snr: bool = False
    """Leave no signal at all in the last step; needs a network that predicts v or x_0."""

    def __post_init__(self) -> None:
        """Refuse chains for which a beta would reach 1, and impossible shifts."""
        if self.name not in ("linear", "cosine"):
            raise ValueError(f"name: must be linear or cosine, got {self.name!r}; choose one of them")
        least = 21 if self.name == "linear" else 2
        if self.num_timesteps < least:
            raise ValueError(
                f"num_timesteps: must be at least {least} for the {self.name} schedule, got {self.num_timesteps}; "
                "train with more steps (sampling may use fewer)"
            )
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift: must be above 0, got {self.shift}; 1 leaves the schedule as it is")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoiseSchedule:
    """Tables of length T, float64, on the CPU. Build it with make_schedule, from_betas, from_alpha_bar or respace."""

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
    angle: Table
    """arctan(sigma), from near 0 up to pi/2: what is interpolated where t is between two steps."""
    timesteps: Int64[Tensor, " T"] | Float64[Tensor, " T"]
    """Index of each entry in the training chain, what the network is given: float only where respaced by floats."""
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

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Table) -> "NoiseSchedule":
        """The schedule of a training chain with these marginals q(x_t | x_0).

        Args:
            alpha_bar: float64 [T], strictly descending, in (0, 1); the last may be 0.

        Raises:
            ValueError: If alpha_bar is not a non-empty float64 vector, does not descend strictly or leaves the range.
        """
        if alpha_bar.dtype != torch.float64 or alpha_bar.ndim != 1 or len(alpha_bar) == 0:
            raise ValueError(f"alpha_bar: must be a float64 vector, got {alpha_bar.dtype} {list(alpha_bar.shape)}")
        beta = 1 - alpha_bar / _shift(alpha_bar)
        if not bool((beta > 0).all()) or float(alpha_bar[-1]) < 0:
            raise ValueError("alpha_bar: must descend strictly from below 1 to 0 or above, got another order")
        return _tables(beta, alpha_bar, torch.arange(len(beta)), len(beta))

    def respace(self, timesteps: Sequence[int] | Sequence[float]) -> "NoiseSchedule":
        """The chain that visits only some of this chain's steps, with the same marginals q(x_t | x_0).

        Args:
            timesteps: Indices into this chain, strictly ascending, in [0, T-1]. In a training chain they may be floats,
                places between steps, which the network is then given.

        Raises:
            ValueError: If timesteps are empty, not strictly ascending or out of range, or floats in a chain that is
                itself respaced.

        Source:
            Nichol and Dhariwal 2021, section 4: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} along the subset.
        """
        steps = list(timesteps)
        if steps != sorted(set(steps)) or not steps or steps[0] < 0 or steps[-1] >= self.num_timesteps:
            last = self.num_timesteps - 1
            raise ValueError(f"timesteps: must ascend strictly within [0, {last}], got {steps}; sort, drop repeats")
        if all(isinstance(step, int) for step in steps):
            index = torch.tensor(steps)
            alpha_bar, chosen = self.alpha_bar[index], self.timesteps[index]
        elif self.num_timesteps == self.num_train_timesteps:
            chosen = torch.tensor(steps, dtype=torch.float64)
            alpha_bar = self.alpha_bar_at(chosen)
        else:
            raise ValueError(f"timesteps: must be integers in a chain that is respaced, got {steps}; respace once")
        beta = 1 - alpha_bar / _shift(alpha_bar)
        return _tables(beta, alpha_bar, chosen, self.num_train_timesteps)

    def alpha_bar_at(self, t: Times) -> Float64[Tensor, " b"]:
        """alpha_bar at any t, on t's device.

        Args:
            t: Index [B] into this chain, or places between two of its steps as floats, in [0, T-1].

        Returns:
            float64 [B]; the table's own entries at integers.

        Raises:
            ValueError: If a float t is outside [0, T-1].
        """
        return self._at(self.alpha_bar, lambda angle: angle.cos().square(), t)

    def log_snr(self, t: Times) -> Float64[Tensor, " b"]:
        """log(alpha_bar / (1 - alpha_bar)) at any t, float64 [B]; -inf where no signal is left. As alpha_bar_at."""
        table = self.alpha_bar.log() - (-self.alpha_bar).log1p()
        return self._at(table, lambda angle: -2 * angle.tan().log(), t)

    def sigma(self, t: Times) -> Float64[Tensor, " b"]:
        """Noise per unit of signal, sqrt((1 - alpha_bar) / alpha_bar), at any t, float64 [B]. As alpha_bar_at.

        Source:
            Karras et al. 2022 (arXiv:2206.00364), whose sigma this is: x_t / sqrt(alpha_bar) = x_0 + sigma eps.
        """
        return (-self.log_snr(t) / 2).exp()

    def t_at_log_snr(self, log_snr: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """The place with a given log-SNR, float64 [B] in [0, T-1]; what is beyond the chain is taken to its ends.

        Places within 1e-9 of a step are that step, so that this is the exact inverse of log_snr there.
        """
        t = invert(self.angle.to(log_snr.device), (-log_snr / 2).exp().atan())
        return torch.where((t - t.round()).abs() < 1e-9, t.round(), t)

    def _at(self, table: Table, of_angle: Callable[[Tensor], Tensor], t: Times) -> Tensor:
        """A table at t: its entries at integers, the function of the interpolated angle between them."""
        if not t.is_floating_point():
            return table.to(t.device, non_blocking=True)[t]
        t = t.to(torch.float64)
        if not bool(((t >= 0) & (t <= self.num_timesteps - 1)).all()):
            raise ValueError(
                f"t: must be in [0, {self.num_timesteps - 1}], got a value outside; take one of this chain"
            )
        between = of_angle(interpolate(self.angle.to(t.device), t))
        return torch.where(t == t.round(), table.to(t.device)[t.round().to(torch.int64)], between)


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule that a config names."""
    T = config.num_timesteps
    schedule = NoiseSchedule.from_betas(linear_betas(T) if config.name == "linear" else cosine_betas(T))
    if config.shift != 1.0:
        schedule = NoiseSchedule.from_alpha_bar(shift_alpha_bar(schedule.alpha_bar, config.shift))
    if config.zero_terminal_snr:
        schedule = NoiseSchedule.from_alpha_bar(zero_terminal_alpha_bar(schedule.alpha_bar))
    return schedule


def gather(table: Table, t: Int[Tensor, " b"], like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """Entries of a table for a batch, shaped to multiply images.

    Args:
        table: float64 [T].
        t: Index [B] in [0, T-1], on the device of like or on the CPU.
        like: Images whose dtype and device the result takes; the cast is the last thing done.

    Returns:
        [B, 1, 1, 1].
    """
    # A small table from pageable memory is copied out before the call returns: nothing waits for the device.
    return table.to(t.device, non_blocking=True)[t].to(like, non_blocking=True)[:, None, None, None]


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
        angle=torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()),
        timesteps=timesteps,
        num_train_timesteps=num_train_timesteps,
    )
