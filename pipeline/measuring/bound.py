"""How likely a model finds images, in bits per dimension: by the variational bound, and by the probability flow."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ddpm import (
    BoundStatistics,
    DiffusionModel,
    ImageBound,
    LikelihoodConfig,
    Network,
    RunningMoments,
    bound_of_images,
    images_to_x_0,
    probability_flow_bound,
)
from ddpm.shapes import Images, Labels, Steps
from pipeline.data.image_stream import LabelledImages, regroup

FEW_PILOT_IMAGES = 2
"""For a measurement that is to be cheap: enough to know which of the steps matter."""
_PILOT_FIRST_ID = 2**40  # ids, and so noise, that no image of the measurement has: the estimate stays unbiased


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundMeter:
    """A model, ready to be asked how likely it finds images."""

    model: DiffusionModel
    """Its network on the device."""
    seed: int
    """Key of the counter-based noise: two models measured with one seed share it."""
    batch_size: int
    """Images per evaluation of the network."""
    device: torch.device
    """Where the network is."""
    pilot_images: int = 16
    """Images of whose every term the probabilities come, where t is drawn by importance; few make them less good, and
    the estimate no less true."""

    def image_bounds(self, stream: Iterable[LabelledImages], config: LikelihoodConfig) -> Iterator[ImageBound]:
        """The variational bound of a stream of images, batch by batch; the id of an image is its place in the stream.

        Where t is drawn by importance, the probabilities come from every term of the stream's first images.

        Args:
            stream: Images, with labels where the model has classes.
            config: Which bound, and how much of it per image; a learned variance is used where the model has one.

        Raises:
            ValueError: If the config asks for more steps than were trained.
        """
        if self.model.learned_variance:
            config = dataclasses.replace(config, variance=self.model.variance)
        batches, first, probabilities = self._batches(stream), list[_Batch](), None
        if config.terms == "importance":
            while sum(len(batch.ids) for batch in first) < self.pilot_images and (batch := next(batches, None)):
                first.append(batch)
            if first:
                probabilities = self._probabilities(first, config)
        for batch in itertools.chain(first, batches):
            yield self._bound(batch, config, probabilities)

    def bound(self, stream: Iterable[LabelledImages], config: LikelihoodConfig) -> BoundStatistics:
        """Statistics of the variational bound over images and over t, in bits per dimension.

        Raises:
            ValueError: If there is no image, or as image_bounds.
        """
        statistics = None
        for bound in self.image_bounds(stream, config):
            more = BoundStatistics.of(bound)
            statistics = more if statistics is None else statistics + more
        if statistics is None:
            raise ValueError("stream: must have images, got none; name a split that has some")
        return statistics

    def probability_flow(self, stream: Iterable[LabelledImages], num_steps: int) -> RunningMoments:
        """Two quantities, in bits per dimension: the bound of the probability flow, and what of it half the nodes miss.

        It has one probe per image for its divergence, and the decoder's term and noise of the variational bound.

        Args:
            stream: At least one image.
            num_steps: Nodes of the flow, at least 3.

        Raises:
            ValueError: If there is no image, or num_steps is below 3 or more than were trained.
        """
        moments = None
        for batch in self._batches(stream):
            found = probability_flow_bound(
                self.model,
                seed=self.seed,
                sample_ids=batch.ids,
                x_0=batch.x_0,
                label=batch.label,
                num_steps=num_steps,
            )
            more = RunningMoments.from_samples(torch.stack((found.bits_per_dim, found.discretisation), dim=1))
            moments = more if moments is None else moments + more
        if moments is None:
            raise ValueError("stream: must have images, got none; name a split that has some")
        return moments

    def _batches(self, stream: Iterable[LabelledImages]) -> "Iterator[_Batch]":
        start = 0
        for group in regroup(stream, self.batch_size):
            label = None
            if self.model.null_label is not None and group.labels is not None:
                label = torch.from_numpy(group.labels).to(self.device)
            yield _Batch(
                ids=torch.arange(start, start + len(group), device=self.device),
                x_0=images_to_x_0(torch.from_numpy(group.images).to(self.device), self.model.num_levels),
                label=label,
            )
            start += len(group)

    def _bound(
        self, batch: "_Batch", config: LikelihoodConfig, probabilities: Float64[Tensor, " T"] | None
    ) -> ImageBound:
        return bound_of_images(
            self.model,
            config,
            seed=self.seed,
            sample_ids=batch.ids,
            x_0=batch.x_0,
            label=batch.label,
            probabilities=probabilities,
        )

    def _probabilities(self, batches: "list[_Batch]", config: LikelihoodConfig) -> Float64[Tensor, " T"]:
        """From every term of the first images, however they are cut into batches."""
        every_term = dataclasses.replace(config, terms="all", terms_per_image=0)
        labels = [batch.label for batch in batches if batch.label is not None]
        pilot = _Batch(
            ids=torch.arange(_PILOT_FIRST_ID, _PILOT_FIRST_ID + self.pilot_images, device=self.device),
            x_0=torch.cat([batch.x_0 for batch in batches]),
            label=torch.cat(labels) if labels else None,
        )
        cuts = [
            *range(0, min(self.pilot_images, len(pilot.x_0)), self.batch_size),
            min(self.pilot_images, len(pilot.x_0)),
        ]
        parts = (self._bound(pilot.rows(*cut), every_term, None) for cut in itertools.pairwise(cuts))
        statistics = map(BoundStatistics.of, parts)
        return functools.reduce(BoundStatistics.__add__, statistics).importance(uniform_share=0.01)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Batch:
    """Some images as the network sees them."""

    ids: Steps
    x_0: Images
    label: Labels | None

    def rows(self, start: int, stop: int) -> "_Batch":
        """Some of them."""
        label = None if self.label is None else self.label[start:stop]
        return _Batch(ids=self.ids[start:stop], x_0=self.x_0[start:stop], label=label)


def eps_network(model: DiffusionModel) -> Network:
    """The model's network as one that predicts eps, whatever it was trained to predict."""
    denoise = model.denoiser(clip_x_0=False)
    return lambda x_t, t, label: denoise(x_t, t, label).eps_hat
