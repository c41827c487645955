"""DPM-Solver++ 3M: three-step, third order at one network evaluation per step; and the form of it in common use.

A step integrates the parabola through x_0_hat at the last three places exactly (derived in multistep.py). In Newton's
form, with D the value where the step starts, D' the parabola's slope there and D'' its second derivative,

    x' = (s'/s) x + a' (M_0 D + M_1 h D' + M_2 h^2 D''/2)

The multistep update in common use (Lu et al.'s code, k-diffusion, diffusers) has M_2/2 in the last term: its factor
1/2 - M_1/h = M_2/2 belongs to h^2 D'', but is multiplied by the second divided difference, which is D''/2. The bend is
halved, a step errs by a' M_2 h^2 D''/4 = O(h^3), and the method is of second order. It is here by the name
dpm_solver_3m_common, number for number, so that images made elsewhere can be made again.

Third order also needs the start: an Euler step, which is all that one evaluation allows, errs by O(h^2), once but for
good. The first step is therefore taken again when x_0_hat is known at its end, with a straight line through both ends.
That costs no evaluation and errs by O(h^3), as does the second step with its two nodes: once each, which third order
allows. The common form starts with Euler's step.

A parabola goes far astray beyond its nodes: a step more than MAX_STRETCH times as long as the one before it is Euler's,
as the last one, to the clean image, always is. Where steps are equal in t the last but one is such, and with few of
them this decides. With 90 to 200 of 1,000 it is 2.4 to 3.3 times as long as the one before, sometimes more than 3 and
sometimes less, as places are rounded: a limit there would let the error jump by 4 from one number of steps to the next.
It falls below 2 from 223 steps on, where the jump is one by 2. Where lengths change smoothly no step of many is such.
The common form has three nodes there too, but two in the last step but one of fewer than 15.
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
    """The three-step solver of third order: no noise after x_T.

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
    """The same as it is commonly implemented, of second order."""

    order: ClassVar[int] = 2

    name: Literal["dpm_solver_3m_common"] = "dpm_solver_3m_common"
    """The same as it is commonly implemented, of second order only."""

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
