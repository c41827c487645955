"""What of an edit decides the images: its spec, and how it is carried out. Pure: no storage, no Ray.

Image i of an edit belongs to fixed rows of the inputs, so that it is the same image in a run of few images and of many.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ddpm import DiffusionModel, NoiseSchedule, Sampler, interpolate_images, partial_diffusion, repaint
from ddpm.editing.interpolate import num_interpolation_evaluations
from ddpm.editing.partial import num_partial_steps
from ddpm.editing.repaint import num_repaint_evaluations
from ddpm.shapes import Images


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledInputs:
    """Input images in [-1, 1] and the classes to make of them."""

    x_0: Images
    """Images [B, C, H, W], on the model's device."""
    labels: list[int | None]
    """Class of each; None for models without classes."""

    @property
    def label(self) -> Tensor | None:
        """The classes as a tensor [B]; None for models without classes."""
        known = [label for label in self.labels if label is not None]
        return torch.tensor(known, device=self.x_0.device) if len(known) == len(self.labels) else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EditTools:
    """What an edit is made with, beside its spec."""

    model: DiffusionModel
    """The model."""
    sampler: Sampler
    """The sampler."""
    seed: int
    """Key of the noise."""
    guide: DiffusionModel | None
    """The weaker model of autoguidance."""
    x_0_error: Tensor | None
    """For the analytic variance [T]."""
    known: Bool[Tensor, "1 1 h w"] | None
    """Pixels that an inpainting keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditSpec(abc.ABC):
    """What all edits share."""

    current_revision: ClassVar[int] = 1
    """Raised whenever the same spec comes to give other images."""

    name: str
    """Which edit."""
    revision: int
    """The revision that the images are made by."""
    inputs_digest: str
    """Digest of the input shards, in order."""
    num_inputs: int
    """Input images."""
    label: int | None
    """The class that was asked for; None: each input's own, if the model has classes."""

    @property
    def num_images(self) -> int:
        """Images that the inputs give."""
        return self.num_inputs

    def rows(self, sample_id: int) -> tuple[int, ...]:
        """The inputs of an image: one, or the two of a pair. Ids beyond the last, which fill batches, go round."""
        return (sample_id % self.num_images,)

    @abc.abstractmethod
    def num_evaluations(self, schedule: NoiseSchedule, sampler: Sampler) -> int:
        """Evaluations of the network for each image; with guidance, as many again of the weaker answer."""

    @abc.abstractmethod
    def edit(
        self, tools: EditTools, ids: Int[Tensor, " b"], inputs: tuple[LabelledInputs, ...]
    ) -> tuple[Images, list[int | None]]:
        """Make the images of some ids.

        Args:
            tools: Model, sampler and what they need.
            ids: Sample ids [B], on the model's device.
            inputs: The inputs of each id: those of `rows`, in their order.

        Returns:
            Images in [-1, 1], and the class that each was made as.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class InpaintSpec(EditSpec):
    """An inpainting."""

    name: Literal["inpaint"] = "inpaint"
    """Which edit."""
    mask_digest: str
    """Digest of the region's pixels."""
    jump_length: int
    """Steps of a jump back."""
    num_resamples: int
    """How often each stretch is walked."""

    def num_evaluations(self, schedule: NoiseSchedule, sampler: Sampler) -> int:
        """See EditSpec.num_evaluations."""
        return num_repaint_evaluations(sampler.num_steps, self.jump_length, self.num_resamples)

    def edit(
        self, tools: EditTools, ids: Int[Tensor, " b"], inputs: tuple[LabelledInputs, ...]
    ) -> tuple[Images, list[int | None]]:
        """See EditSpec.edit."""
        assert tools.known is not None, "an inpainting has a mask"
        (given,) = inputs
        made = repaint(
            tools.model,
            tools.sampler,
            given.x_0,
            tools.known,
            given.label,
            jump_length=self.jump_length,
            num_resamples=self.num_resamples,
            seed=tools.seed,
            sample_ids=ids,
            guide=tools.guide,
            x_0_error=tools.x_0_error,
        )
        return made, given.labels


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialSpec(EditSpec):
    """A partial diffusion."""

    name: Literal["partial"] = "partial"
    """Which edit."""
    strength: float
    """Share of the steps."""

    def num_evaluations(self, schedule: NoiseSchedule, sampler: Sampler) -> int:
        """See EditSpec.num_evaluations."""
        return sampler.num_evaluations(schedule, num_partial_steps(sampler.num_steps, self.strength))

    def edit(
        self, tools: EditTools, ids: Int[Tensor, " b"], inputs: tuple[LabelledInputs, ...]
    ) -> tuple[Images, list[int | None]]:
        """See EditSpec.edit."""
        (given,) = inputs
        made = partial_diffusion(
            tools.model,
            tools.sampler,
            given.x_0,
            given.label,
            strength=self.strength,
            seed=tools.seed,
            sample_ids=ids,
            guide=tools.guide,
            x_0_error=tools.x_0_error,
        )
        return made, given.labels


@dataclass(frozen=True, kw_only=True, slots=True)
class InterpolateSpec(EditSpec):
    """Interpolations between pairs."""

    name: Literal["interpolate"] = "interpolate"
    """Which edit."""
    weights: tuple[float, ...]
    """Places between the two images of a pair."""

    @property
    def num_images(self) -> int:
        """See EditSpec.num_images."""
        return self.num_inputs // 2 * len(self.weights)

    def rows(self, sample_id: int) -> tuple[int, ...]:
        """See EditSpec.rows."""
        first = sample_id % self.num_images // len(self.weights) * 2
        return first, first + 1

    def weight(self, sample_id: int) -> float:
        """How far an image is from the first to the second of its pair."""
        return self.weights[sample_id % self.num_images % len(self.weights)]

    def num_evaluations(self, schedule: NoiseSchedule, sampler: Sampler) -> int:
        """See EditSpec.num_evaluations."""
        return num_interpolation_evaluations(schedule, sampler)

    def edit(
        self, tools: EditTools, ids: Int[Tensor, " b"], inputs: tuple[LabelledInputs, ...]
    ) -> tuple[Images, list[int | None]]:
        """See EditSpec.edit."""
        first, second = inputs
        weights = [self.weight(sample_id) for sample_id in ids.tolist()]
        made = interpolate_images(
            tools.model,
            tools.sampler,
            first.x_0,
            second.x_0,
            torch.tensor(weights, device=ids.device),
            first_label=first.label,
            second_label=second.label,
            sample_ids=ids,
            guide=tools.guide,
        )
        return made, [a if w <= 0.5 else b for a, b, w in zip(first.labels, second.labels, weights, strict=True)]


AnyEditSpec = InpaintSpec | PartialSpec | InterpolateSpec
"""One of the edits."""
