"""What is asked of a generation run: images from nothing, or edits of given ones. Pure: no storage, no Ray.

`RequestConfig` is what an operator writes, `EditSpec` what of it decides the images: digests instead of places. Image i
of an edit belongs to fixed rows of the inputs, so that it is the same image in a run of few images and of many.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ddpm import SamplerConfig, num_partial_steps
from ddpm.editing.repaint import resampling_path
from pipeline.config_io import refuse_empty

RequestKind = Literal["generate", "inpaint", "partial", "interpolate"]
REGIONS = ("upper_half", "lower_half", "left_half", "right_half", "centre")
_ONLY_FOR = {
    "mask": "inpaint",
    "jump_length": "inpaint",
    "num_resamples": "inpaint",
    "strength": "partial",
    "weights": "interpolate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestConfig:
    """Whether to make images from nothing or to edit given ones, and how."""

    kind: RequestKind = "generate"
    """generate: from nothing. inpaint: make a region anew (RePaint), best with sampler.spacing quadratic. partial:
    noise each image to some strength and denoise it (SDEdit). interpolate: images between the 1st and 2nd, the 3rd and
    4th, ... of the inputs. inpaint walks with ancestral or ddim; interpolate with what adds no noise: ddim with eta 0,
    heun with churn 0, dpm_solver_2m, dpm_solver_3m or dpm_solver_3m_common; partial with any."""
    inputs: str | None = None
    """The images to edit: a prepared dataset, or the prefix of a finished generation run (local or s3://...)."""
    split: str | None = None
    """Split of the dataset to edit, such as held_out; left out: train. A generation run has none."""
    num_images: int | None = None
    """Images to make, from the first input on; left out: all that the inputs give."""
    label: int | None = None
    """The class to make, for models with classes; left out: each input's own."""
    mask: str | None = None
    """inpaint only: upper_half, lower_half, left_half, right_half or centre, or a PNG file (local or s3://...) of the
    images' size; its white pixels are made anew."""
    jump_length: int = 10
    """inpaint only: steps of a jump back to more noise, fewer than the sampler has."""
    num_resamples: int = 10
    """inpaint only: how often each stretch of that length is walked; the cost is about as many times the steps."""
    strength: float = 0.5
    """partial only: share of the sampler's steps to take, from 0 (the input) to 1 (nothing of it left)."""
    weights: tuple[float, ...] = (0.25, 0.5, 0.75)
    """interpolate only: how far from the first to the second image of a pair, one image for each number in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse impossible values, and options that the request would ignore."""
        if self.kind not in get_args(RequestKind):
            raise ValueError(f"kind: must be {' or '.join(get_args(RequestKind))}, got {self.kind!r}; choose one")
        refuse_empty(self, "inputs", "split", "mask")
        defaults = {field: type(self).__dataclass_fields__[field].default for field in _ONLY_FOR}
        for field, kind in _ONLY_FOR.items():
            value = getattr(self, field)
            if kind != self.kind and value != defaults[field]:
                raise ValueError(f"{field}: is for kind {kind} only, got {value} with {self.kind}; leave it out")
        if self.kind == "generate":
            for field in ("inputs", "split", "num_images", "label"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"{field}: is for edits, got {getattr(self, field)!r} with generate; choose a kind"
                    )
        elif self.inputs is None:
            raise ValueError(f"inputs: {self.kind} needs images to edit, got none; name a dataset or a generation run")
        if self.kind == "inpaint" and self.mask is None:
            raise ValueError(f"mask: inpaint needs one, got none; choose {', '.join(REGIONS)} or name a PNG file")
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"num_images: must be at least 1, got {self.num_images}; leave it out for all")
        if self.label is not None and self.label < 0:
            raise ValueError(f"label: must be at least 0, got {self.label}; leave it out for the inputs' own")
        resampling_path(1, self.jump_length, self.num_resamples)
        num_partial_steps(1, self.strength)
        if not self.weights or not all(0.0 <= weight <= 1.0 for weight in self.weights):
            raise ValueError(f"weights: must be numbers in [0, 1], at least one, got {self.weights}; try 0.5")


def check_steps(request: RequestConfig, sampler: SamplerConfig) -> None:
    """Refuse options of an edit that so few steps leave without effect.

    Raises:
        ValueError: If an inpainting would never jump back, or a strength above 0 takes no step.
    """
    steps = sampler.num_steps
    if request.kind == "inpaint" and request.num_resamples > 1 and request.jump_length >= steps:
        raise ValueError(
            f"request.jump_length: must be below sampler.num_steps, {steps}, to jump at all, got "
            f"{request.jump_length}; lower it, or set request.num_resamples to 1"
        )
    if request.kind == "partial" and request.strength > 0.0 and num_partial_steps(steps, request.strength) == 0:
        raise ValueError(
            f"request.strength: takes none of the {steps} steps, got {request.strength}; 0 keeps the images on purpose"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EditSpec:
    """What of a request decides the images, beside the sampler and the seed."""

    kind: Literal["inpaint", "partial", "interpolate"]
    """Which edit."""
    inputs_digest: str
    """Digest of the input shards, in order."""
    num_inputs: int
    """Input images."""
    label: int | None
    """The class that was asked for; None: each input's own, if the model has classes."""
    mask_digest: str | None = None
    """inpaint: digest of the region's pixels."""
    jump_length: int | None = None
    """inpaint: steps of a jump back."""
    num_resamples: int | None = None
    """inpaint: how often each stretch is walked."""
    strength: float | None = None
    """partial: share of the steps."""
    weights: tuple[float, ...] = ()
    """interpolate: places between the two images of a pair."""

    @property
    def num_images(self) -> int:
        """Images that the inputs give."""
        return self.num_inputs // 2 * len(self.weights) if self.kind == "interpolate" else self.num_inputs

    def rows(self, sample_id: int) -> tuple[int, ...]:
        """The inputs of an image: one, or the two of a pair. Ids beyond the last, which fill batches, go round."""
        place = sample_id % self.num_images
        if self.kind != "interpolate":
            return (place,)
        first = place // len(self.weights) * 2
        return first, first + 1

    def weight(self, sample_id: int) -> float:
        """interpolate: how far an image is from the first to the second of its pair."""
        return self.weights[sample_id % self.num_images % len(self.weights)]
