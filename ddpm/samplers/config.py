"""Which sampler, with which options: the one config that names them all."""

from dataclasses import dataclass
from typing import Literal, get_args

from ddpm.process.denoiser import check_dynamic_threshold
from ddpm.process.diffusion import Variance
from ddpm.process.guidance import check_guidance
from ddpm.process.spacing import Spacing

SamplerName = Literal[
    "ancestral",
    "ddim",
    "dpm_solver_2m",
    "dpm_solver_2m_sde",
    "dpm_solver_3m",
    "dpm_solver_3m_common",
    "heun",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How images are drawn from a network."""

    name: SamplerName = "ddim"
    """ancestral: Ho et al., best with many steps. ddim: Song et al., from deterministic to ancestral by eta.
    dpm_solver_3m: Lu et al., best with few steps where spacing is trailing or linspace; with quadratic, karras or
    log_snr from about 20 steps on. dpm_solver_3m_common: as it is commonly implemented, of second order only.
    dpm_solver_2m: two places instead of three; dpm_solver_2m_sde: the same with noise. heun: Karras et al."""
    num_steps: int = 50
    """Steps per image, at most as many as were trained. Each is one network evaluation; heun's are two."""
    eta: float = 1.0
    """ddim only: noise per step, from 0 (deterministic) to 1 (as much as ancestral sampling)."""
    variance: Variance = "fixed_small"
    """ancestral only: variance of a step, the posterior's (fixed_small), beta (fixed_large), learned_range, or the best
    of one for all pixels (analytic), which needs an error measured beforehand, without guidance."""
    spacing: Spacing = "linspace"
    """Which trained steps are visited: linspace has both ends, leading has the first, trailing has the last; quadratic,
    karras and log_snr have both and visit more steps with little noise, in this order (karras starts at sigma 80)."""
    clip_x_0: bool = True
    """Limit each predicted image to [-1, 1] before the step is taken."""
    dynamic_threshold: float | None = None
    """Limit by dividing by this quantile of the image's magnitudes where it exceeds 1, such as 0.995, instead of by
    clipping; for strong guidance."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: how much to exaggerate the label, 1 for none (Ho and Salimans' w is this less 1)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise per unit of signal, sigma, is above the first and at most the second number."""
    guidance_rescale: float = 0.0
    """Share in [0, 1] by which guidance keeps the standard deviation of the prediction, against overexposed images."""
    churn: float = 0.0
    """heun only: S_churn of Karras et al., new noise in all steps together, in units of the noise there is."""
    churn_interval: tuple[float, float] = (0.05, 50.0)
    """heun only: S_tmin and S_tmax, the sigmas at which there is churn."""
    churn_noise: float = 1.003
    """heun only: S_noise, factor on the new noise."""

    def __post_init__(self) -> None:
        """Refuse impossible values, and options that the chosen sampler would ignore."""
        _check_choice("name", self.name, get_args(SamplerName))
        _check_choice("variance", self.variance, get_args(Variance))
        _check_choice("spacing", self.spacing, get_args(Spacing))
        if self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {self.num_steps}; 50 is a good start")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta: must be in [0, 1], got {self.eta}; 0 is deterministic, 1 ancestral")
        if self.name != "ddim" and self.eta != 1.0:
            raise ValueError(f"eta: is for ddim only, got {self.eta} with {self.name}; leave it out or choose ddim")
        if self.name != "ancestral" and self.variance != "fixed_small":
            raise ValueError(
                f"variance: is for ancestral only, got {self.variance} with {self.name}; leave it out or choose "
                "ancestral (ddim has eta)"
            )
        if self.dynamic_threshold is not None:
            check_dynamic_threshold(self.dynamic_threshold, clip_x_0=self.clip_x_0)
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_rescale)
        if self.guidance_scale == 1.0 and (self.guidance_interval is not None or self.guidance_rescale != 0.0):
            raise ValueError("guidance_scale: is 1, no guidance, got an interval or a rescale for it; leave them out")
        self._check_churn()
        if self.variance == "analytic" and (self.guidance_scale != 1.0 or self.dynamic_threshold is not None):
            raise ValueError(
                "variance: analytic is measured without guidance or dynamic threshold, got guidance_scale "
                f"{self.guidance_scale} and dynamic_threshold {self.dynamic_threshold}; leave them out or choose "
                "fixed_small"
            )

    @property
    def is_deterministic(self) -> bool:
        """Whether an image is a function of its x_T and label alone."""
        match self.name:
            case "ddim":
                return self.eta == 0.0
            case "heun":
                return self.churn == 0.0
        return self.name in ("dpm_solver_2m", "dpm_solver_3m", "dpm_solver_3m_common")

    def _check_churn(self) -> None:
        if not self.churn >= 0.0:
            raise ValueError(f"churn: must be at least 0, got {self.churn}; 0 is deterministic, 40 much")
        if self.name != "heun" and self.churn != 0.0:
            raise ValueError(f"churn: is for heun only, got {self.churn} with {self.name}; leave it out or choose heun")
        if not 0.0 <= self.churn_interval[0] < self.churn_interval[1]:
            raise ValueError(f"churn_interval: must be two ascending sigmas from 0 up, got {self.churn_interval}")
        if not self.churn_noise >= 0.0:
            raise ValueError(f"churn_noise: must be at least 0, got {self.churn_noise}; 1 is exact noise")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: must be {' or '.join(choices)}, got {value!r}; choose one of them")
