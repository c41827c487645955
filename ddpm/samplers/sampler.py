"""What a sampler is: options, and a function of them that walks from noise to images.

Each method is a file of its own with its variant of `Sampler`; `registry.py` lists them. A sampler knows neither seeds
nor ids: noise comes in as a function of the draw.

Steps are counted on the host: t is a tensor on the CPU, wherever the images are, and so are the tables. Who needs to
know where in the chain a step is looks at them there, and nothing waits for the device in a walk.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from ddpm.model import DiffusionModel
from ddpm.noise import Stream
from ddpm.process.denoiser import Denoiser, NetworkDenoiser, Prediction, check_dynamic_threshold
from ddpm.process.guidance import check_guidance
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.process.spacing import Spacing, spaced_timesteps
from ddpm.shapes import Images, Labels, Steps, Times
from ddpm.variants import check_variant_name

StepNoise = Callable[[int], Tensor]
"""noise(draw): the standard normal noise of a step, x_T's shape; draw counts the steps from 1."""
Callback = Callable[[int, Times, Images, Images], None]
"""callback(step, t, x_t, x_0_hat), before each step: step counts from 1, t [B], on the CPU, is the place in the
training chain."""


def no_noise(draw: int) -> Tensor:
    """Stands for noise that was not given.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"noise: step {draw} draws noise, got none to draw from; give a function of the draw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler(abc.ABC):
    """How images are drawn: what all samplers share. Variants add their own options."""

    revision: ClassVar[int] = 1
    """Raised whenever the same options come to give other images: part of what names a generation run."""
    order: ClassVar[int]
    """Order of convergence in the length of the steps for a smooth denoiser; with noise, that of the distribution."""
    noise_stream: ClassVar[Stream] = Stream.STEP
    """Where the noise of the steps is drawn from."""

    name: str
    """Which sampler."""
    num_steps: int = 50
    """Steps per image, at most as many as were trained."""
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

    def __post_init__(self) -> None:
        """Refuse impossible values of what all samplers share; then, by `check`, of the sampler's own options."""
        check_variant_name(self)
        check_choice("spacing", self.spacing, get_args(Spacing))
        if self.num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, got {self.num_steps}; 50 is a good start")
        if self.dynamic_threshold is not None:
            check_dynamic_threshold(self.dynamic_threshold, clip_x_0=self.clip_x_0)
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_rescale)
        if self.guidance_scale == 1.0 and (self.guidance_interval is not None or self.guidance_rescale != 0.0):
            raise ValueError("guidance_scale: is 1, no guidance, got an interval or a rescale for it; leave them out")
        self.check()

    def check(self) -> None:  # noqa: B027 - not every sampler has options of its own
        """Refuse impossible values of the sampler's own options.

        Raises:
            ValueError: Names the field.
        """

    @property
    @abc.abstractmethod
    def is_deterministic(self) -> bool:
        """Whether an image is a function of its x_T and label alone."""

    @property
    def needs_learned_variance(self) -> bool:
        """Whether the network must answer with the variance of a step too."""
        return False

    @property
    def needs_x_0_error(self) -> bool:
        """Whether the error of x_0_hat must have been measured beforehand (see analytic.py)."""
        return False

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The steps of the training chain that are visited, ascending.

        Raises:
            ValueError: If there are more than were trained.
        """
        return spaced_timesteps(schedule, self.num_steps, self.spacing)

    def revision_on(self, schedule: NoiseSchedule) -> int:
        """The revision by which the images of a model with this training chain are made."""
        # Two steps in log-SNR were T-2 and T-1 in revision 1 where no signal is left, instead of both ends.
        are_others = self.num_steps == 2 and self.spacing == "log_snr" and float(schedule.alpha_bar[-1]) == 0
        return self.revision + are_others

    def num_evaluations(self, schedule: NoiseSchedule, num_steps: int | None = None) -> int:
        """Calls of the denoiser per batch of images; where guidance is on, each evaluates every image twice.

        Args:
            schedule: The training chain.
            num_steps: How many of the steps are walked, the least noisy ones; None walks them all.

        Raises:
            ValueError: If the sampler asks for more steps than were trained.
        """
        return len(self.timesteps(schedule)[:num_steps])

    def denoiser(self, model: DiffusionModel, guide: DiffusionModel | None = None) -> NetworkDenoiser:
        """The model as these options say: guided and limited; errors as DiffusionModel.denoiser."""
        return model.denoiser(
            clip_x_0=self.clip_x_0,
            dynamic_threshold=self.dynamic_threshold,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guidance_rescale=self.guidance_rescale,
            guide=guide,
        )

    @abc.abstractmethod
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
        """Draw x_0.

        Args:
            denoise: Predicts x_0_hat and eps_hat.
            schedule: The training chain.
            x_T: Where to start [B, C, H, W]: standard normal noise, or images noised to timesteps[-1].
            label: Class [B], or None.
            timesteps: Steps of the training chain to visit, ascending; T of them.
            noise: The noise of the steps; not called where a step has none: a deterministic sampler needs no noise.
            x_0_error: E |x_0 - x_0_hat|^2 / D at each of timesteps [T], where needs_x_0_error.
            callback: Told what each step starts from, and the x_0_hat of it.
            final_step: Go on from timesteps[0] to x_0; if not, x_t of timesteps[0] is returned.

        Returns:
            x_0 [B, C, H, W].
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleStepSampler(Sampler):
    """A sampler that looks at nothing but x_t: its steps can be taken one by one, in any order."""

    @abc.abstractmethod
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
        """One step from x_t to x_{t-1}.

        Args:
            chain: The chain that is walked, respaced.
            denoise: Predicts x_0_hat and eps_hat; it is given the index in the training chain.
            x_t: Noised images [B, C, H, W].
            t: Index [B] into chain.
            label: Class [B], or None.
            eps: Standard normal noise, same shape as x_t; without effect where the step has none.
            x_0_error: As in sample, at every entry of chain.
        """

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
        chain, x_t = schedule.respace(timesteps), x_T
        for draw, i in enumerate(reversed(range(0 if final_step else 1, chain.num_timesteps)), start=1):
            t = torch.full((len(x_t),), i)
            eps = noise(draw) if i > 0 and not self.is_deterministic else torch.zeros_like(x_t)
            told = reporting(denoise, callback, draw)
            x_t = self.step(chain, told, x_t, t, label, eps=eps, x_0_error=x_0_error)
        return x_t


def reporting(denoise: Denoiser, callback: Callback | None, step: int) -> Denoiser:
    """The denoiser, whose answer at the start of a step the callback is told."""
    if callback is None:
        return denoise

    def denoise_and_tell(x_t: Images, t: Times, label: Labels | None) -> Prediction:
        prediction = denoise(x_t, t, label)
        callback(step, t, x_t, prediction.x_0_hat)
        return prediction

    return denoise_and_tell


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices, by the field's name."""
    if value not in choices:
        raise ValueError(f"{field}: must be {' or '.join(choices)}, got {value!r}; choose one of them")
