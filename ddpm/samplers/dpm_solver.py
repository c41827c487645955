"""DPM-Solver++ 2M: two-step solvers in log-SNR that look at x_0_hat, deterministic and stochastic.

Between two steps the linear part of the reverse process is solved exactly; x_0_hat is extrapolated in a straight line
from the last two evaluations, so that second order costs one network evaluation per step.

With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar), lambda = log(a / s), the step from lambda to lambda' = lambda + h is

    x' = (s'/s) x + a' (1 - e^-h) D                                             (deterministic)
    x' = (s'/s) e^-h x + a' (1 - e^-2h) D + s' sqrt(1 - e^-2h) z                (stochastic)
    D  = x_0_hat + h / (2 h_before) (x_0_hat - x_0_hat_before)

Only e^-h = (s'/a') (a/s) is needed, which is 0 in the last step, to the clean image, and in the first one of a schedule
with zero terminal SNR: neither is a special case, except that the last step does not extrapolate.

Source:
    Lu et al. 2022 (arXiv:2211.01095): Algorithm 2 for the deterministic form; the stochastic one is its appendix on
    SDE solvers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.sampler import Callback, Sampler, StepNoise, no_noise, reporting
from ddpm.shapes import Images, Labels


@dataclass(frozen=True, kw_only=True, slots=True)
class DPMSolver2M(Sampler):
    """DPM-Solver++ 2M: two places per step, no noise after x_T (Lu et al. 2022, Algorithm 2)."""

    order: ClassVar[int] = 2

    name: Literal["dpm_solver_2m"] = "dpm_solver_2m"
    """DPM-Solver++ 2M, without noise."""

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
        return _walk(denoise, chain, x_T, label, noise=None, callback=callback, final_step=final_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class DPMSolver2MSDE(Sampler):
    """DPM-Solver++ 2M in its stochastic form: noise in every step (Lu et al. 2022, SDE solvers)."""

    order: ClassVar[int] = 2

    name: Literal["dpm_solver_2m_sde"] = "dpm_solver_2m_sde"
    """DPM-Solver++ 2M with noise in every step."""

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return False

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
        return _walk(denoise, chain, x_T, label, noise=noise, callback=callback, final_step=final_step)


def _walk(
    denoise: Denoiser,
    chain: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    noise: StepNoise | None,
    callback: Callback | None,
    final_step: bool,
) -> Images:
    """All steps of a chain, each with the coefficients at the top of this file."""
    s, a_next = (1 - chain.alpha_bar).sqrt(), chain.alpha_bar_prev.sqrt()
    s_next = (1 - chain.alpha_bar_prev).sqrt()
    decay = s_next / a_next * chain.alpha_bar.sqrt() / s  # e^-h
    h = -decay.log()
    x_t, x_0_hat_before = x_T, None
    for draw, i in enumerate(reversed(range(0 if final_step else 1, chain.num_timesteps)), start=1):
        t = chain.timesteps[i].expand(len(x_t))
        x_0_hat = reporting(denoise, callback, draw)(x_t, t, label).x_0_hat
        direction = x_0_hat
        if x_0_hat_before is not None and i > 0:
            direction = x_0_hat + float(h[i] / (2 * h[i + 1])) * (x_0_hat - x_0_hat_before)
        kept = float(decay[i])
        if noise is None:
            x_t = float(s_next[i] / s[i]) * x_t + float(a_next[i]) * (1 - kept) * direction
        else:
            x_t = float(s_next[i] / s[i]) * kept * x_t + float(a_next[i]) * (1 - kept**2) * direction
            if i > 0:
                x_t = x_t + float(s_next[i]) * (1 - kept**2) ** 0.5 * noise(draw)
        x_0_hat_before = x_0_hat
    return x_t
