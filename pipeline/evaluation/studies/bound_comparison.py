"""Is one model's variational bound lower than another's? Both are measured on the same images.

Where their chains have the same length, noise and t are the same too. What the two share cancels in their difference,
image by image, so that its standard error is far smaller than that of either bound.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ddpm import Estimate, ImageBound, LikelihoodConfig, RunningMoments
from ddpm.added_field import added_field
from pipeline.config_io import to_json
from pipeline.errors import ConfigError
from pipeline.generation.output.manifest import write_if_changed
from pipeline.measuring.bound import BoundMeter
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.models.model_files import load_model, read_card
from pipeline.models.model_uri import check_model_uris
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.progress import say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import check_uris, join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig

REPORT_KEY = "bounds.json"
_TERMS = ("bits_per_dim", "prior", "denoising", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundComparisonConfig:
    """Compare the variational bounds of two models on the held-out images."""

    dataset: str
    """Folder or s3://bucket/prefix of a prepared dataset with a held-out split."""
    model: str
    """models:/name@alias, models:/name/3, or a checkpoint's folder."""
    baseline: str
    """The model that it is compared with, named in the same way; the alias champion is yours to set in MLflow."""
    output: str
    """Folder or s3://bucket/prefix for the report."""
    bound: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """Which bound; a learned variance is used where a model has one."""
    max_images: int = 1_000
    """Held-out images, spread over the split."""
    batch_size: int = 250
    """Images per evaluation of a network."""
    seed: int = 0
    """Seed of the noise and of random t, in [0, 2^64)."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""

    def __post_init__(self) -> None:
        check_model_uris(self, "model", "baseline")
        check_uris(self, "dataset", "output")
        for name in ("max_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")
        if self.bound.terms == "importance":
            raise ValueError("bound.terms: must be the same t for both models, got importance; choose all")


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundComparison:
    """The content of `bounds.json`: bits per dimension, whole and by term."""

    format_version: int = 2
    """Version of this record."""
    model: str
    """The model's URI, resolved."""
    baseline: str
    """The baseline's URI, resolved."""
    dataset_digest: str
    """Digest of the dataset's manifest."""
    num_images: int
    """Images that were measured."""
    of_model: dict[str, Estimate]
    """Mean and standard error over images: bits_per_dim, prior, denoising, decoder."""
    of_baseline: dict[str, Estimate]
    """The same of the baseline."""
    difference: dict[str, Estimate]
    """Model minus baseline, image by image."""
    warnings: tuple[str, ...] = added_field(default=(), pin=())
    """What may make the figures wrong, one line each."""

    def table(self) -> str:
        """The figures as aligned text."""
        rows = [["bits per dimension", "model", "baseline", "difference"]]
        for name in _TERMS:
            of_each = (self.of_model[name], self.of_baseline[name], self.difference[name])
            rows.append([name, *(f"{estimate.value:.4f} +- {estimate.standard_error:.4f}" for estimate in of_each)])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def compare_bounds(config: BoundComparisonConfig) -> BoundComparison:
    """Measure both models and write the report.

    Args:
        config: What to compare.

    Returns:
        The figures; they are in `output` too.

    Raises:
        DatasetMissingError: If there is no dataset, or it has no held-out split.
        ConfigError: If a model makes other images or has other classes than the dataset, or has fewer steps than the
            bound asks for.
        ModelMissingError, CheckpointError, StorageError: If models or dataset cannot be read.
    """
    dataset, model, baseline, warnings = _resolve(config)
    check_conditions(open_store(config.output))
    for warning in warnings:
        say(f"warning: {warning}")
    pairs = zip(_bounds(model, dataset, config), _bounds(baseline, dataset, config))
    moments = functools.reduce(RunningMoments.__add__, (_side_by_side(ours, theirs) for ours, theirs in pairs))
    of_model, of_baseline, difference = (
        {name: moments.estimate(len(_TERMS) * side + k) for k, name in enumerate(_TERMS)} for side in range(3)
    )
    comparison = BoundComparison(
        model=model.uri,
        baseline=baseline.uri,
        dataset_digest=dataset.manifest.digest,
        num_images=int(moments.count[0]),
        of_model=of_model,
        of_baseline=of_baseline,
        difference=difference,
        warnings=warnings,
    )
    write_if_changed(open_store(config.output), REPORT_KEY, to_json(comparison))
    return comparison


def _resolve(
    config: BoundComparisonConfig,
) -> tuple[EvaluationDataset, ResolvedModel, ResolvedModel, tuple[str, ...]]:
    """Dataset, model and baseline, checked against each other, and warnings."""
    warnings: list[str] = []
    dataset = EvaluationDataset(config.dataset)
    model, baseline = (
        resolve_model(uri, config.tracking, trust_model_code=config.trust_model_code)
        for uri in (config.model, config.baseline)
    )
    for found in (model, baseline):
        card = read_card(found.files, found.uri)
        warnings += dataset.check_fits(card, found.uri)
        most = card.config.schedule.num_timesteps
        if config.bound.num_steps is not None and config.bound.num_steps > most:
            raise ConfigError(
                f"bound.num_steps: must be in [1, {most}], the trained steps of {found.uri}, got "
                f"{config.bound.num_steps}; choose fewer"
            )
    if model.files.digest == baseline.files.digest:
        raise ConfigError(f"baseline: must be another model, got {baseline.uri}, which is the model; name another")
    return dataset, model, baseline, tuple(warnings)


def _bounds(model: ResolvedModel, dataset: EvaluationDataset, config: BoundComparisonConfig) -> Iterator[ImageBound]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model.files, model.uri)[1].to(device)
    meter = BoundMeter(model=loaded, seed=config.seed, batch_size=config.batch_size, device=device)
    return meter.image_bounds(dataset.stream("held_out", config.max_images), config.bound)


def _side_by_side(ours: ImageBound, theirs: ImageBound) -> RunningMoments:
    """Of one batch: the model's terms, the baseline's, and the differences, image by image."""
    of_each = [torch.stack([getattr(bound, name) for name in _TERMS], dim=1) for bound in (ours, theirs)]
    return RunningMoments.from_samples(torch.cat((*of_each, of_each[0] - of_each[1]), dim=1))


def describe_plan(config: BoundComparisonConfig) -> list[tuple[str, str]]:
    """What a comparison would do, as names and values; reads manifest and models, starts nothing."""
    dataset, model, baseline, warnings = _resolve(config)
    num_images = min(config.max_images, dataset.manifest.splits["held_out"].num_samples)
    rows = [("dataset", f"{config.dataset}: about {num_images:,} held-out images")]
    for name, found in (("model", model), ("baseline", baseline)):
        schedule = read_card(found.files, found.uri).config.schedule
        evaluations = config.bound.terms_per_image or config.bound.num_steps or schedule.num_timesteps
        rows.append((name, f"{found.uri}: {evaluations:,} evaluations of the network per image"))
    rows.append(("report", join_uri(config.output, REPORT_KEY)))
    return [*rows, *(("warning", warning) for warning in warnings)]
