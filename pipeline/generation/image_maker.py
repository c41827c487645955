"""The images of some sample ids: generated from nothing, or edited from the inputs, as the sampling spec says."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddpm import (
    Guide,
    NoiseSchedule,
    SamplerConfig,
    generate,
    images_to_x_0,
    interpolate_images,
    make_schedule,
    num_evaluations,
    num_interpolation_evaluations,
    num_partial_steps,
    num_repaint_evaluations,
    partial_diffusion,
    repaint,
    sampling_denoiser,
)
from pipeline.errors import ConfigError
from pipeline.generation.edit_inputs import InputImages, RowReader
from pipeline.generation.requests import EditSpec
from pipeline.generation.sampling_plan import SamplingSpec
from pipeline.models.model_files import ModelCard, ModelFiles, load_network


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ingredients:
    """What images are made of, beside the spec that names it by digests; travels to the actors once."""

    model: ModelFiles
    """The model."""
    guide: ModelFiles | None = None
    """The weaker model of autoguidance."""
    inputs: InputImages | None = None
    """The images to edit: where they are, not the images."""
    known: Bool[np.ndarray, "h w"] | None = None
    """Pixels that an inpainting keeps."""
    x_0_error: tuple[float, ...] | None = None
    """Mean squared error of x_0_hat, one per trained step, for the analytic variance."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MadeBatch:
    """Images of some ids."""

    x_0: Float[Tensor, "b c h w"]
    """Images in [-1, 1]."""
    labels: list[int | None]
    """Class that each was made as; None for models without classes."""


class ImageMaker:
    """Makes images with one network, and perhaps a guide, on one device."""

    def __init__(self, ingredients: Ingredients, device: torch.device) -> None:
        """Load the networks.

        Raises:
            CheckpointError: If a model's files are damaged.
            ConfigError: If a network of your own cannot be built here.
        """
        self._device = device
        card, self._network = self._load(ingredients.model, "model")
        self._config = card.config
        self._schedule = make_schedule(card.config.schedule)
        self._guide: Guide | None = None
        if ingredients.guide is not None:
            guide_card, guide = self._load(ingredients.guide, "guide_model")
            self._guide = Guide(
                network=guide,
                schedule=make_schedule(guide_card.config.schedule),
                prediction_type=guide_card.config.prediction_type,
            )
        self._rows = None if ingredients.inputs is None else RowReader(ingredients.inputs)
        self._known = None
        if ingredients.known is not None:
            self._known = torch.from_numpy(ingredients.known)[None, None].to(device)
        error = ingredients.x_0_error
        self._x_0_error = None if error is None else torch.tensor(error, dtype=torch.float64)

    def _load(self, files: ModelFiles, field: str) -> tuple[ModelCard, torch.nn.Module]:
        try:
            card, network = load_network(files)
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from error
        return card, network.to(self._device)

    def __call__(self, spec: SamplingSpec, ids: range) -> MadeBatch:
        """Make the images of some ids: a function of spec and ids.

        Raises:
            ShardCorruptError, StorageError: If inputs cannot be read.
            ValueError: As generate and the edits.
        """
        return self._generate(spec, ids) if spec.request is None else self._edit(spec, spec.request, ids)

    def _generate(self, spec: SamplingSpec, ids: range) -> MadeBatch:
        labels = [spec.label(sample_id) for sample_id in ids]
        x_0 = generate(
            self._network,
            self._schedule,
            spec.sampler,
            seed=spec.seed,
            sample_ids=self._ids(ids),
            label=self._label(labels),
            image_shape=(spec.channels, spec.image_size, spec.image_size),
            prediction_type=self._config.prediction_type,
            learned_variance=self._config.learned_variance,
            null_label=spec.num_classes,
            guide=self._guide,
            x_0_error=self._x_0_error,
        )
        return MadeBatch(x_0=x_0, labels=labels)

    def _edit(self, spec: SamplingSpec, edit: EditSpec, ids: range) -> MadeBatch:
        denoise = sampling_denoiser(
            self._network,
            self._schedule,
            spec.sampler,
            prediction_type=self._config.prediction_type,
            learned_variance=self._config.learned_variance,
            null_label=spec.num_classes,
            guide=self._guide,
        )
        x_0, labels = self._inputs(spec, edit, [edit.rows(sample_id)[0] for sample_id in ids])
        arguments = (denoise, self._schedule, spec.sampler, x_0)
        sample_ids = self._ids(ids)
        if edit.kind == "interpolate":
            second, second_labels = self._inputs(spec, edit, [edit.rows(sample_id)[1] for sample_id in ids])
            weights = [edit.weight(sample_id) for sample_id in ids]
            made = interpolate_images(
                *arguments,
                second,
                torch.tensor(weights, device=self._device),
                first_label=self._label(labels),
                second_label=self._label(second_labels),
                sample_ids=sample_ids,
            )
            nearer = [a if weight <= 0.5 else b for a, b, weight in zip(labels, second_labels, weights)]
            return MadeBatch(x_0=made, labels=nearer)
        label = self._label(labels)
        if edit.kind == "partial":
            assert edit.strength is not None
            made = partial_diffusion(
                *arguments,
                label,
                strength=edit.strength,
                seed=spec.seed,
                sample_ids=sample_ids,
                x_0_error=self._x_0_error,
            )
        else:
            assert self._known is not None and edit.jump_length is not None and edit.num_resamples is not None
            made = repaint(
                *arguments,
                self._known,
                label,
                jump_length=edit.jump_length,
                num_resamples=edit.num_resamples,
                seed=spec.seed,
                sample_ids=sample_ids,
                x_0_error=self._x_0_error,
            )
        return MadeBatch(x_0=made, labels=labels)

    def _inputs(self, spec: SamplingSpec, edit: EditSpec, rows: list[int]) -> tuple[Tensor, list[int | None]]:
        """Input images in [-1, 1] and the classes to make of them."""
        assert self._rows is not None
        found = self._rows.read(rows)
        x_0 = images_to_x_0(torch.from_numpy(found.images)).to(self._device)
        if spec.num_classes is None:
            return x_0, [None] * len(rows)
        if edit.label is not None:
            return x_0, [edit.label] * len(rows)
        if found.labels is None or not ((found.labels >= 0) & (found.labels < spec.num_classes)).all():
            raise ValueError(
                f"request.inputs: each needs a label below {spec.num_classes}, got {found.labels}; make them again"
            )
        return x_0, [int(label) for label in found.labels]

    def _ids(self, ids: range) -> Tensor:
        return torch.arange(ids.start, ids.stop, device=self._device)

    def _label(self, labels: list[int | None]) -> Tensor | None:
        """The labels as a tensor [B]; None for models without classes."""
        return None if None in labels else torch.tensor(labels, device=self._device)


def evaluations_per_image(schedule: NoiseSchedule, sampler: SamplerConfig, edit: EditSpec | None) -> int:
    """Evaluations of the network for each image; with guidance, as many again of the weaker answer.

    With a guidance interval the latter is an upper bound.

    Raises:
        ValueError: If the sampler asks for more steps than were trained.
    """
    if edit is None:
        return num_evaluations(schedule, sampler)
    if edit.kind == "interpolate":
        return num_interpolation_evaluations(schedule, sampler)
    if edit.kind == "partial":
        assert edit.strength is not None
        return num_evaluations(schedule, sampler, num_partial_steps(sampler.num_steps, edit.strength))
    assert edit.jump_length is not None and edit.num_resamples is not None
    return num_repaint_evaluations(sampler.num_steps, edit.jump_length, edit.num_resamples)
