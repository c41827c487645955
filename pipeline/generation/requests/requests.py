"""What is asked of a generation run: images from nothing, or edits of given ones, as an operator writes it.

Variants of `Request`, told apart by `name`. What of an edit decides the images, digests instead of places, is its spec
(edits.py).
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ddpm import Sampler
from ddpm.editing.interpolate import check_deterministic
from ddpm.editing.partial import num_partial_steps
from ddpm.editing.repaint import resampling_path, single_step_sampler
from pipeline.config_io import refuse_empty
from pipeline.generation.requests.label_file import ENDINGS
from pipeline.generation.spec.edits import AnyEditSpec, InpaintSpec, InterpolateSpec, PartialSpec
from pipeline.stores.storage import check_file_uris, check_uris

REGIONS = ("upper_half", "lower_half", "left_half", "right_half", "centre")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request(abc.ABC):
    """Images from nothing, or edits of given ones."""

    name: str
    """Which."""

    def check_sampler(self, sampler: Sampler) -> None:  # noqa: B027 - plain generation takes any
        """Refuse a sampler that cannot do this, or options that so few steps leave without effect.

        Raises:
            ValueError: Names the field.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate(Request):
    """Images from nothing."""

    name: Literal["generate"] = "generate"
    """Images from nothing."""
    classes: tuple[str | int, ...] = ()
    """Make only these classes, in turn: names or numbers, such as cat dog, or 3,7; left out: all that the model has."""
    label_plan: str | None = None
    """A CSV or JSON-lines file (local or s3://...) that says each image's label, and so how many there are: columns
    label, and perhaps noise_id (whose noise it has; else its own) and id (yours, kept in the image's metadata)."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_file_uris(self, "label_plan")
        if "" in self.classes:
            raise ValueError(f"classes: must not be empty, got {self.classes}; name a class or leave it out")
        if self.label_plan is not None and not self.label_plan.endswith(ENDINGS):
            raise ValueError(
                f"label_plan: must be a file that ends in {', '.join(ENDINGS)}, got {self.label_plan!r}; name it so"
            )
        if self.classes and self.label_plan is not None:
            raise ValueError(
                f"classes: a label plan says each image's class, got {self.classes} beside {self.label_plan}; leave "
                "one of them out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit(Request):
    """Images made of given ones."""

    inputs: str
    """The images to edit: a prepared dataset, or the prefix of a finished generation run (local or s3://...)."""
    split: str | None = None
    """Split of the dataset to edit, such as held_out; left out: train. A generation run has none."""
    num_images: int | None = None
    """Images to make, from the first input on; left out: all that the inputs give."""
    label: int | None = None
    """The class to make, for models with classes; left out: each input's own."""

    def __post_init__(self) -> None:
        """Refuse impossible values of what all edits share; then, by `check`, of the edit's own options."""
        check_uris(self, "inputs")
        refuse_empty(self, "split")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images: must be at least 1, got {self.num_images}; leave it out for all")
        if self.label is not None and self.label < 0:
            raise ValueError(f"label: must be at least 0, got {self.label}; leave it out for the inputs' own")
        self.check()

    @abc.abstractmethod
    def check(self) -> None:
        """Refuse impossible values of the edit's own options.

        Raises:
            ValueError: Names the field.
        """

    @abc.abstractmethod
    def spec(self, *, inputs_digest: str, num_inputs: int, mask_digest: str | None) -> AnyEditSpec:
        """What of the request decides the images.

        Args:
            inputs_digest: Digest of the input shards, in order.
            num_inputs: Input images.
            mask_digest: Digest of the region that is made anew; None for an edit without one.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Inpaint(Edit):
    """A region made anew (RePaint), by a sampler whose steps look at x_t alone; best with quadratic spacing."""

    name: Literal["inpaint"] = "inpaint"
    """A region made anew (RePaint)."""
    mask: str
    """upper_half, lower_half, left_half, right_half or centre, or a PNG file (local or s3://...) of the images' size;
    its white pixels are made anew."""
    jump_length: int = 10
    """Steps of a jump back to more noise, fewer than the sampler has."""
    num_resamples: int = 10
    """How often each stretch of that length is walked; the cost is about as many times the steps."""

    def check(self) -> None:
        """See Edit.check."""
        check_file_uris(self, "mask")
        resampling_path(1, self.jump_length, self.num_resamples)

    def check_sampler(self, sampler: Sampler) -> None:
        """See Request.check_sampler."""
        _check(single_step_sampler, sampler)
        if self.num_resamples > 1 and self.jump_length >= sampler.num_steps:
            raise ValueError(
                f"request.jump_length: must be below sampler.num_steps, {sampler.num_steps}, to jump at all, got "
                f"{self.jump_length}; lower it, or set request.num_resamples to 1"
            )

    def spec(self, *, inputs_digest: str, num_inputs: int, mask_digest: str | None) -> AnyEditSpec:
        """See Edit.spec."""
        assert mask_digest is not None, "an inpainting has a mask"
        return InpaintSpec(
            revision=InpaintSpec.current_revision,
            inputs_digest=inputs_digest,
            num_inputs=num_inputs,
            label=self.label,
            mask_digest=mask_digest,
            jump_length=self.jump_length,
            num_resamples=self.num_resamples,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial(Edit):
    """Each image noised to some strength and denoised (SDEdit), by any sampler."""

    name: Literal["partial"] = "partial"
    """Images noised and denoised (SDEdit)."""
    strength: float = 0.5
    """Share of the sampler's steps to take, from 0 (the input) to 1 (nothing of it left)."""

    def check(self) -> None:
        """See Edit.check."""
        num_partial_steps(1, self.strength)

    def check_sampler(self, sampler: Sampler) -> None:
        """See Request.check_sampler."""
        if self.strength > 0.0 and num_partial_steps(sampler.num_steps, self.strength) == 0:
            raise ValueError(
                f"request.strength: takes none of the {sampler.num_steps} steps, got {self.strength}; 0 keeps the "
                "images on purpose"
            )

    def spec(self, *, inputs_digest: str, num_inputs: int, mask_digest: str | None) -> AnyEditSpec:
        """See Edit.spec."""
        return PartialSpec(
            revision=PartialSpec.current_revision,
            inputs_digest=inputs_digest,
            num_inputs=num_inputs,
            label=self.label,
            strength=self.strength,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpolate(Edit):
    """Images between the 1st and 2nd, the 3rd and 4th, ... of the inputs, by a sampler that adds no noise."""

    name: Literal["interpolate"] = "interpolate"
    """Images between pairs of inputs."""
    weights: tuple[float, ...] = (0.25, 0.5, 0.75)
    """How far from the first to the second image of a pair, one image for each number in [0, 1]."""

    def check(self) -> None:
        """See Edit.check."""
        if not self.weights or not all(0.0 <= weight <= 1.0 for weight in self.weights):
            raise ValueError(f"weights: must be numbers in [0, 1], at least one, got {self.weights}; try 0.5")

    def check_sampler(self, sampler: Sampler) -> None:
        """See Request.check_sampler."""
        _check(check_deterministic, sampler)

    def spec(self, *, inputs_digest: str, num_inputs: int, mask_digest: str | None) -> AnyEditSpec:
        """See Edit.spec."""
        return InterpolateSpec(
            revision=InterpolateSpec.current_revision,
            inputs_digest=inputs_digest,
            num_inputs=num_inputs,
            label=self.label,
            weights=self.weights,
        )


def _check(rule: Callable[[Sampler], object], sampler: Sampler) -> None:
    """A rule of the library's about the sampler alone, named from where it stands beside the request."""
    try:
        rule(sampler)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from error


AnyRequest = Generate | Inpaint | Partial | Interpolate
"""One of the requests, with its options."""
