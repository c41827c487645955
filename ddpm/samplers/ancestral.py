"""Ancestral sampling: walk the reverse process step by step (Ho et al., Algorithm 2), over all steps or a subset."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ddpm.process.denoiser import Denoiser
from ddpm.process.diffusion import Variance, p_mean_variance
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.sampler import SingleStepSampler, check_choice
from ddpm.shapes import Images, Labels, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestral(SingleStepSampler):
    """Ho et al.'s own, best with many steps; over a subset of them as Nichol & Dhariwal 2021, section 4."""

    order: ClassVar[int] = 1

    name: Literal["ancestral"] = "ancestral"
    """Ho et al.: noise in every step, best with many of them."""
    variance: Variance = "fixed_small"
    """Variance of a step, the posterior's (fixed_small), beta (fixed_large), the network's own (learned_range), or the
    best of one for all pixels (analytic), which needs an error measured beforehand, without guidance."""

    def check(self) -> None:
        """See Sampler.check."""
        check_choice("variance", self.variance, get_args(Variance))
        if self.variance == "analytic" and (self.guidance_scale != 1.0 or self.dynamic_threshold is not None):
            raise ValueError(
                "variance: analytic is measured without guidance or dynamic threshold, got guidance_scale "
                f"{self.guidance_scale} and dynamic_threshold {self.dynamic_threshold}; leave them out or choose "
                "fixed_small"
            )

    @property
    def is_deterministic(self) -> bool:
        """See Sampler.is_deterministic."""
        return False

    @property
    def needs_learned_variance(self) -> bool:
        """See Sampler.needs_learned_variance."""
        return self.variance == "learned_range"

    @property
    def needs_x_0_error(self) -> bool:
        """See Sampler.needs_x_0_error."""
        return self.variance == "analytic"

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
        return p_sample(chain, denoise, x_t, t, label, variance=self.variance, eps=eps, x_0_error=x_0_error)


def p_sample(
    schedule: NoiseSchedule,
    denoise: Denoiser,
    x_t: Images,
    t: Steps,
    label: Labels | None,
    *,
    variance: Variance,
    eps: Images,
    x_0_error: Table | None = None,
) -> Images:
    """Draw x_{t-1} from p(x_{t-1} | x_t): mean + sqrt(variance) eps, and the mean alone at t = 0.

    Args:
        schedule: The chain that is walked.
        denoise: Predicts x_0_hat.
        x_t: Noised images [B, C, H, W].
        t: Index [B] into schedule.
        label: Class [B], or None.
        variance: Which variance the step has.
        eps: Standard normal noise, same shape as x_t; not used where t = 0.
        x_0_error: E |x_0 - x_0_hat|^2 / D at every entry of schedule [T]; only variance = analytic reads it.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), Algorithm 2, lines 3-4.
    """
    step = p_mean_variance(schedule, denoise, x_t, t, label, variance=variance, x_0_error=x_0_error)
    noisy = (t > 0).to(x_t, non_blocking=True)[:, None, None, None]
    return step.mean + noisy * step.variance.sqrt() * eps
