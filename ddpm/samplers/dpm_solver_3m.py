"""DPM-Solver++ 3M, the three-step solver of third order, and the second-order form of it in common use.

The update. A step from lambda to lambda + h integrates, exactly, the parabola through x_0_hat at the last three places
(multistep.py derives the weights and the moments M_k). With D, D' and D'' the parabola's value, slope and second
derivative where the step starts,

    x' = (s'/s) x + a' (M_0 D + M_1 h D' + M_2 h^2 D''/2)

The form in common use (Lu et al.'s code, k-diffusion, diffusers) has a factor of 1/2 too many in the last term: what it
multiplies by 1/2 - M_1/h = M_2/2 is a second divided difference, which is D''/2 already. So the curvature counts by
half, the error of a step is O(h^3) instead of O(h^4), and the order is 2. It is kept as dpm_solver_3m_common, number
for number, so that images made elsewhere can be made again.

The first step. One evaluation allows an Euler step only, whose error O(h^2) would spoil the order. Once x_0_hat is
known at its end, the step is taken again along the straight line through both ends. That needs no further evaluation,
and leaves an error O(h^3) once, which third order allows; the second step, with two places, leaves the same. The common
form keeps Euler's first step.

Long steps. A parabola is a bad guess far outside the places it goes through. A step longer than MAX_STRETCH times the
one before it is therefore taken as an Euler step, like the last one, to the clean image. Where steps are equal in t
this concerns the last but one: with 90 to 200 of 1,000 steps it is 2.4 to 3.3 times as long as the one before it, from
223 steps on less than twice. A limit of 3 would fall among those of 90 to 200, and the error would jump by a factor of
4 from one number of steps to the next; at 2 the one jump left is by a factor of 2. Spacings whose lengths change
smoothly have no such step unless there are few. The common form has no such rule: it uses three places there too, and
two if there are fewer than 15 steps in all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.multistep import exact_weights, midpoint_weights, moment, multistep_sample
from ddpm.samplers.sampler import Callback, Sampler, StepNoise, no_noise
from ddpm.shapes import Images, Labels

MAX_STRETCH = 2.0
"""Longest step with more than one node, in lengths of the step before, our choice; all lengths are in log-SNR."""
_FEW_STEPS = 15
"""Below, the common form takes its last step but one with two nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DPMSolver3M(Sampler):
    """DPM-Solver++ 3M: three places per step, of third order, no noise after x_T; best with few steps.

    Source:
        Lu et al. 2022 (arXiv:2211.01095), section 4, for the integral; the coefficients are derived in multistep.py.
    """

    order: ClassVar[int] = 3

    name: Literal["dpm_solver_3m"] = "dpm_solver_3m"
    """Lu et al.: best with few steps where spacing is trailing or linspace; with quadratic, karras or log_snr from
    about 20 steps on."""

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return True

    def sample(
        self,
        denoise: Denoiser,
        schedule: NoiseSchedule,
        x_T: Images,
        label: Labels | None,
        *,
        timesteps: Sequence[int] | Sequence[float],
        noise: StepNoise = no_noise,
        x_0_error: Table | None = None,
        callback: Callback | None = None,
        final_step: bool = True,
    ) -> Images:
        """See Sampler.sample."""
        chain = schedule.respace(timesteps)
        h = -chain.log_snr(torch.arange(chain.num_timesteps)).diff()  # h[i] ends at entry i, in units of log-SNR

        def order(i: int) -> int:
            stretched = 0 < i < len(h) and bool(h[i - 1] > MAX_STRETCH * h[i])
            return 1 if i == 0 or stretched else 3

        return multistep_sample(
            denoise,
            chain,
            x_T,
            label,
            weights=exact_weights,
            order=order,
            correct_first=True,
            callback=callback,
            final_step=final_step,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DPMSolver3MCommon(Sampler):
    """DPM-Solver++ 3M as it is commonly implemented, of second order."""

    order: ClassVar[int] = 2

    name: Literal["dpm_solver_3m_common"] = "dpm_solver_3m_common"
    """DPM-Solver++ 3M as it is commonly implemented."""

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return True

    def sample(
        self,
        denoise: Denoiser,
        schedule: NoiseSchedule,
        x_T: Images,
        label: Labels | None,
        *,
        timesteps: Sequence[int] | Sequence[float],
        noise: StepNoise = no_noise,
        x_0_error: Table | None = None,
        callback: Callback | None = None,
        final_step: bool = True,
    ) -> Images:
        """See Sampler.sample."""
        chain = schedule.respace(timesteps)
        few = chain.num_timesteps < _FEW_STEPS
        return multistep_sample(
            denoise,
            chain,
            x_T,
            label,
            weights=_common_weights,
            order=lambda i: min(i + 1, 3) if few else 3 if i > 0 else 1,
            correct_first=False,
            callback=callback,
            final_step=final_step,
        )


def _common_weights(nodes: Sequence[float], h: float) -> list[float]:
    """Two nodes as in 2M; of three, the parabola's term, the divided difference times M_2, only by half."""
    weights = midpoint_weights(nodes, h)
    if len(nodes) < 3:
        return weights
    half = moment(2, h) / 2
    return [
        w - half / math.prod(r - other for other in nodes if other != r) for w, r in zip(weights, nodes, strict=True)
    ]
