"""Heun's method of Karras et al. with churn, on a network trained as a DDPM, by the change of variables to sigma.

In x / sqrt(alpha_bar) = x_0 + sigma eps the probability-flow equation is dx/dsigma = eps_hat: an Euler step in sigma is
a deterministic DDIM step, and Heun's correction replaces its eps_hat by the mean of those at both ends. Churn adds
noise before a step, which the step then removes: new noise that makes up for errors of earlier steps.

The correction is (sigma/sigma' - 1)/2 times the change of x_0_hat: where a step divides sigma by much it multiplies
errors instead of correcting them. Beyond MAX_SIGMA_RATIO the step is left as DDIM makes it, which serves the first step
of a schedule with (next to) no terminal signal, and the last one, where sigma' = 0, as in the paper's algorithm.

Source:
    Karras et al. 2022 (arXiv:2206.00364), Algorithms 1 and 2, appendix C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpm.noise import Stream
from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.sampler import Callback, Sampler, StepNoise, no_noise, reporting
from ddpm.shapes import Images, Labels

MAX_SIGMA_RATIO = 10.0
"""Largest sigma/sigma' with a correction, our choice; one of 20 steps equal in log-SNR divides sigma by less than 2."""
_MAX_CHURN = math.sqrt(2) - 1
"""At most as much new noise as there is already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heun(Sampler):
    """Karras et al.'s Heun steps, two network evaluations per step but the last, with noise by churn.

    With integer timesteps churn too leads to trained steps (rounded); with floats, to any place.

    Source:
        Karras et al. 2022 (arXiv:2206.00364), Algorithm 2.
    """

    order: ClassVar[int] = 2
    noise_stream: ClassVar[Stream] = Stream.CHURN

    name: Literal["heun"] = "heun"
    """Karras et al.: two network evaluations per step."""
    churn: float = 0.0
    """S_churn, new noise in all steps together, in units of the noise there is: each of N steps raises sigma by the
    factor 1 + min(S_churn / N, sqrt(2) - 1). 0: none."""
    churn_interval: tuple[float, float] = (0.05, 50.0)
    """S_tmin and S_tmax, the sigmas at which there is churn, both included."""
    churn_noise: float = 1.003
    """S_noise, factor on the standard deviation of the new noise."""

    def check(self) -> None:
        """See Sampler.check."""
        if not self.churn >= 0.0:
            raise ValueError(f"churn: must be at least 0, got {self.churn}; 0 is deterministic, 40 much")
        if not 0.0 <= self.churn_interval[0] < self.churn_interval[1]:
            raise ValueError(f"churn_interval: must be two ascending sigmas from 0 up, got {self.churn_interval}")
        if not self.churn_noise >= 0.0:
            raise ValueError(f"churn_noise: must be at least 0, got {self.churn_noise}; 1 is exact noise")

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return self.churn == 0.0

    def num_evaluations(self, schedule: NoiseSchedule, num_steps: int | None = None) -> int:
        """See Sampler.num_evaluations."""
        timesteps = self.timesteps(schedule)[:num_steps]
        return len(timesteps) + (num_corrections(schedule, timesteps) if timesteps else 0)

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
        sigmas = _sigmas(chain.alpha_bar)
        sigmas_next = _sigmas(chain.alpha_bar_prev)
        rise = 1 + min(self.churn / chain.num_timesteps, _MAX_CHURN)
        x_t = x_T
        for draw, i in enumerate(reversed(range(0 if final_step else 1, chain.num_timesteps)), start=1):
            t, sigma, sigma_next = chain.timesteps[i], sigmas[i], sigmas_next[i]
            if rise > 1 and self.churn_interval[0] <= sigma <= self.churn_interval[1]:
                t_hat, sigma_hat = _raise_sigma(schedule, t, sigma * rise)
                if bool(t_hat > t):
                    added = self.churn_noise * math.sqrt(sigma_hat**2 - sigma**2) * noise(draw)
                    x_t = _signal(sigma_hat) * (x_t / _signal(sigma) + added)
                    t, sigma = t_hat, sigma_hat
            here = reporting(denoise, callback, draw)(x_t, t.expand(len(x_t)), label)
            # Of unit variance again: sqrt(alpha_bar') (x_0_hat + sigma' eps_hat), where DDIM steps to.
            signal, noisy = _signal(sigma_next), _signal(sigma_next) * sigma_next
            x_t = signal * here.x_0_hat + noisy * here.eps_hat
            if is_corrected(sigmas[i], sigma_next):
                there = denoise(x_t, chain.timesteps[i - 1].expand(len(x_t)), label)
                x_t = x_t + signal * (sigma_next - sigma) / 2 * (there.eps_hat - here.eps_hat)
        return x_t


def num_corrections(schedule: NoiseSchedule, timesteps: Sequence[int] | Sequence[float]) -> int:
    """How many steps of Heun's method take a second network evaluation."""
    chain = schedule.respace(timesteps)
    return sum(map(is_corrected, _sigmas(chain.alpha_bar), _sigmas(chain.alpha_bar_prev)))


def is_corrected(sigma: float, sigma_next: float) -> bool:
    """Whether the step from sigma to sigma_next has Heun's correction."""
    return sigma <= MAX_SIGMA_RATIO * sigma_next


def _sigmas(alpha_bar: Tensor) -> list[float]:
    return [float(sigma) for sigma in ((1 - alpha_bar) / alpha_bar).sqrt()]


def _signal(sigma: float) -> float:
    """sqrt(alpha_bar), from sigma."""
    return 1 / math.hypot(1, sigma)


def _raise_sigma(schedule: NoiseSchedule, t: Tensor, sigma: float) -> tuple[Tensor, float]:
    """The place with more noise, a trained step if t is one, and its sigma; at most the end of the chain."""
    t_hat = schedule.t_at_log_snr(torch.tensor([-2 * math.log(sigma)], dtype=torch.float64))
    if not t.is_floating_point():
        t_hat = t_hat.round().to(torch.int64)
    return t_hat[0], float(schedule.sigma(t_hat))
