"""DDIM: the family of samplers with the same marginals, from deterministic (eta = 0) to ancestral (eta = 1).

The deterministic sampler is Euler's method for the probability-flow equation, and can be walked the other way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule, gather
from ddpm.samplers.sampler import SingleStepSampler
from ddpm.shapes import Images, Labels, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class DDIM(SingleStepSampler):
    """Song et al.'s family, from deterministic to ancestral by eta."""

    order: ClassVar[int] = 1

    name: Literal["ddim"] = "ddim"
    """Song et al.: from deterministic to ancestral by eta."""
    eta: float = 1.0
    """Noise per step, from 0 (deterministic) to 1 (as much as ancestral sampling)."""

    def check(self) -> None:
        """See Sampler.check."""
        _check_eta(self.eta)

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return self.eta == 0.0

    def step(
        self,
        chain: NoiseSchedule,
        denoise: Denoiser,
        x_t: Images,
        t: Steps,
        label: Labels | None,
        *,
        eps: Images,
        x_0_error: Table | None = None,
    ) -> Images:
        """See SingleStepSampler.step."""
        return ddim_step(chain, denoise, x_t, t, label, eta=self.eta, eps=eps)


def ddim_step(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_t: Images,
    t: Steps,
    label: Labels | None,
    *,
    eta: float,
    eps: Images,
) -> Images:
    """One step from x_t to x_{t-1}: towards x_0_hat, along eps_hat, plus noise of standard deviation sigma.

    Args:
        schedule: The chain that is walked, usually respaced.
        denoise: Predicts x_0_hat and eps_hat; it is given the index in the training chain.
        x_t: Noised images [B, C, H, W].
        t: Index [B] into schedule.
        label: Class [B], or None.
        eta: Share of the posterior's standard deviation, in [0, 1].
        eps: Standard normal noise, same shape as x_t; without effect where eta = 0 or t = 0.

    Raises:
        ValueError: If eta is outside [0, 1].

    Source:
        Song et al. 2021 (arXiv:2010.02502), Eq. 12 and 16.
    """
    _check_eta(eta)
    prediction = denoise(x_t, schedule.timesteps.to(t.device, non_blocking=True)[t], label)
    # Eq. 16 is eta times the standard deviation of q(x_{t-1} | x_t, x_0); it is 0 at t = 0.
    sigma = eta * schedule.posterior_variance.sqrt()
    # What the noise adds is taken from eps_hat, so that the variance stays 1 - alpha_bar_prev; rounding may go below 0.
    direction = (1 - schedule.alpha_bar_prev - sigma.square()).clamp(min=0).sqrt()
    return (
        gather(schedule.alpha_bar_prev.sqrt(), t, x_t) * prediction.x_0_hat
        + gather(direction, t, x_t) * prediction.eps_hat
        + gather(sigma, t, x_t) * eps
    )


def ddim_invert(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    x_0: Images,
    label: Labels | None,
    *,
    timesteps: Sequence[int] | Sequence[float],
    first_step: bool = True,
) -> Images:
    """The x_T from which deterministic DDIM makes these images, nearly: the same steps walked upwards.

    A step up takes x_0_hat and eps_hat where it starts, a step down where that ends: the round trip errs by as much as
    they change within a step, and the error falls with the number of steps. In the first step x_0 is known and only
    eps_hat is asked for. Clipping cannot be undone: switch it off in the denoiser.

    Args:
        denoise: Predicts x_0_hat and eps_hat.
        schedule: The training chain.
        x_0: Clean images [B, C, H, W] in [-1, 1].
        label: Class [B], or None.
        timesteps: Steps of the training chain to visit, ascending.
        first_step: Start from clean images; if not, what is given as x_0 is x_t of timesteps[0].

    Returns:
        x_t of timesteps[-1], [B, C, H, W].

    Source:
        Song et al. 2021 (arXiv:2010.02502), Eq. 13-14 and section 5.4.
    """
    chain = schedule.respace(timesteps)
    x_t = x_0
    for i in range(0 if first_step else 1, chain.num_timesteps):
        # No network was trained on images without any noise: the first step asks about its end, where x_0 is too clean.
        t = torch.full((len(x_t),), max(i - 1, 0))
        prediction = denoise(x_t, chain.timesteps[t], label)
        alpha_bar, clean = float(chain.alpha_bar[i]), x_0 if i == 0 else prediction.x_0_hat
        x_t = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * prediction.eps_hat
    return x_t


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: must be in [0, 1], got {eta}; 0 is deterministic, 1 ancestral")
