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

from collections.abc import Callable, Sequence

from torch import Tensor

from ddpm.process.denoiser import Denoiser
from ddpm.process.schedules import NoiseSchedule
from ddpm.shapes import Images, Labels


def dpm_solver_2m_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    timesteps: Sequence[int] | Sequence[float],
    final_step: bool = True,
) -> Images:
    """Draw x_0 by the deterministic two-step solver: no noise after x_T.

    Args:
        denoise: Predicts x_0_hat.
        schedule: The training chain.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        timesteps: Steps of the training chain to visit, ascending.
        final_step: Go on from timesteps[0] to x_0; if not, x_t of timesteps[0] is returned.

    Returns:
        x_0 [B, C, H, W].

    Source:
        Lu et al. 2022 (arXiv:2211.01095), Algorithm 2.
    """
    return _walk(denoise, schedule.respace(timesteps), x_T, label, noise=None, final_step=final_step)


def dpm_solver_2m_sde_sample(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    timesteps: Sequence[int] | Sequence[float],
    noise: Callable[[int], Tensor],
    final_step: bool = True,
) -> Images:
    """Draw x_0 by the stochastic two-step solver. Otherwise as dpm_solver_2m_sample.

    Args:
        denoise: Predicts x_0_hat.
        schedule: The training chain.
        x_T: Standard normal noise [B, C, H, W].
        label: Class [B], or None.
        timesteps: Steps of the training chain to visit, ascending.
        noise: noise(draw) gives the standard normal noise of a step, x_T's shape; draw counts the steps from 1. It is
            not called in the final step.
        final_step: Go on from timesteps[0] to x_0.

    Returns:
        x_0 [B, C, H, W].

    Source:
        Lu et al. 2022 (arXiv:2211.01095), the SDE form of the second-order multistep solver.
    """
    return _walk(denoise, schedule.respace(timesteps), x_T, label, noise=noise, final_step=final_step)


def _walk(
    denoise: Denoiser,
    chain: NoiseSchedule,
    x_T: Images,
    label: Labels | None,
    *,
    noise: Callable[[int], Tensor] | None,
    final_step: bool,
) -> Images:
    """All steps of a chain, each with the coefficients at the top of this file."""
    s, a_next = (1 - chain.alpha_bar).sqrt(), chain.alpha_bar_prev.sqrt()
    s_next = (1 - chain.alpha_bar_prev).sqrt()
    decay = s_next / a_next * chain.alpha_bar.sqrt() / s  # e^-h
    h = -decay.log()
    x_t, x_0_hat_before = x_T, None
    for draw, i in enumerate(reversed(range(0 if final_step else 1, chain.num_timesteps)), start=1):
        t = chain.timesteps[i].to(x_t.device).expand(len(x_t))
        x_0_hat = denoise(x_t, t, label).x_0_hat
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
