"""Measure a model on a labelled dataset: every figure beside real images and beside a naive model.

    label agreement     share of images that a classifier fitted to real training images reads as the class asked for
    Frechet distance    between Gaussians fitted to raw pixels in [0, 1], against the held-out images; it depends on the
                        number of images, which is the same for generated and real ones
    eps error           mean squared error of the predicted noise on held-out images, over all t
    bits per dimension  the variational bound of the held-out images, whole and by term; if asked for, that of the
                        probability flow, another model's

The naive model is a Gaussian per class (baselines.py). A figure that makes no sense for a dataset or
a model is left out: labels need classes, and pixel statistics need small images. An inpainting is measured like any
images, beside fills of the same hidden pixels that no model made (fills.py); a picture shows the first of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ddpm import (
    DiffusionModel,
    Estimate,
    LikelihoodConfig,
    ModelConfig,
    Moments,
    Network,
    agreement_standard_error,
    frechet_distance,
)
from pipeline.cluster import ClusterConfig
from pipeline.config_io import to_json
from pipeline.data.image_stream import LabelledImages, join_images, read_images, stream_images
from pipeline.errors import ConfigError, PipelineError, TrackingUnavailableError
from pipeline.evaluation.baselines import ClassGaussians, draw_images
from pipeline.evaluation.fills import Fills
from pipeline.evaluation.report import Evaluation, EvaluationRecord, Figure
from pipeline.generation.output.manifest import read_shards, write_if_changed
from pipeline.generation.sample import SampleResult, sample
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan as sampling_plan
from pipeline.measuring.bound import BoundMeter, eps_network
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.measuring.measures import PixelClassifier, eps_mse, pixel_moments
from pipeline.measuring.pixel_distance import PixelDistance, pixel_distance, real_distance
from pipeline.models.model_files import load_model, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.models.version_records import log_version_metrics
from pipeline.progress import say
from pipeline.stores.storage import check_uris, join_uri
from pipeline.tracking.tracking import TrackingConfig

REPORT_KEY = "evaluation.json"
FILLS_KEY = "completions.png"
_MAX_COVARIANCE_ENTRIES = 2**28  # of pixels, all classes together: 2 GiB
_SIGNIFICANT_DIGITS = 6  # what lies beyond depends on the order of summation

_OpenStream = Callable[[], Iterator[LabelledImages]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuresConfig:
    """What to measure, and how exactly."""

    seed: int = 0
    """Seed of the noise of the eps error and the bound, and of the naive model's images, in [0, 2^64)."""
    eps_images_per_t: int = 4
    """Images on which the eps error is measured, for each diffusion step and split; 1,000 steps on the digits' held-out
    images have a standard error of 0.0009 with 4."""
    batch_size: int = 250
    """Images per evaluation of the network in the eps error and the bound."""
    bound: LikelihoodConfig = field(default_factory=lambda: LikelihoodConfig(terms="importance", terms_per_image=20))
    """Which variational bound of the held-out images; a learned variance is used where the model has one."""
    max_bound_images: int = 1_000
    """Held-out images, spread over the split, whose bound is measured."""
    max_flow_images: int = 0
    """Held-out images, spread over the split, whose bits per dimension are measured by the probability flow as well: a
    bound for another model, which draws images by the flow and the decoder; it shares network, decoder and noise with
    the variational one. 0 leaves it out."""
    flow_steps: int = 100
    """Nodes of the probability flow, closer where there is less noise, each an evaluation of the network and its
    gradient; half as many again for the share of discretisation, which the report gives beside the bits."""
    max_train_images: int = 50_000
    """Training images, spread over the split, for the real-against-real distance and the naive model."""
    max_classifier_images: int = 10_000
    """Training images, spread over the split, to which the classifier is fitted."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: must be in [0, 2^64), got {self.seed}; choose another seed")
        if self.eps_images_per_t < 2:
            raise ValueError(f"eps_images_per_t: must be at least 2 (for an error bar), got {self.eps_images_per_t}")
        for name in ("batch_size", "max_bound_images", "max_train_images", "max_classifier_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        if self.max_flow_images < 0:
            raise ValueError(f"max_flow_images: must be at least 0, got {self.max_flow_images}; 0 leaves it out")
        if self.flow_steps < 3:
            raise ValueError(
                f"flow_steps: must be at least 3, both ends and one between, got {self.flow_steps}; 100 is a good start"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(MeasuresConfig):
    """What to measure, on what."""

    dataset: str
    """Folder or s3://bucket/prefix of a prepared dataset with a held-out split."""
    sample: ImagesConfig
    """The model, and the images to measure; those that exist already are not made again."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        MeasuresConfig.__post_init__(self)
        check_uris(self, "dataset")

    @property
    def sampling(self) -> SampleConfig:
        """The job that makes the images."""
        return SampleConfig.of(self.sample, self.tracking, self.cluster, trust_model_code=self.trust_model_code)


def evaluate(config: EvaluateConfig, *, model: ResolvedModel | None = None) -> Evaluation:
    """Make the images that are missing, measure them and the model, and record the figures.

    Args:
        config: What to measure.
        model: The model that config.sample.model names, if it has been resolved already.

    Returns:
        The figures, and where the report is. They are logged to the model's version if it comes from a registry.

    Raises:
        DatasetMissingError: If there is no dataset, or it has no held-out split.
        ConfigError: If the model makes other images, or has other classes, than the dataset holds.
        PipelineError: As sample.
    """
    dataset = EvaluationDataset(config.dataset)
    if model is None:
        model = resolve_model(config.sample.model, config.tracking, trust_model_code=config.trust_model_code)
    warnings = (*dataset.check_fits(read_card(model.files, model.uri), model.uri), *config.sample.format.warnings)
    for warning in warnings:
        say(f"warning: {warning}")
    made = sample(config.sampling, model=model)
    for warning in made.labels.warnings:
        say(f"warning: {warning}")
    num_images = made.num_asked
    card, diffusion = load_model(model.files, model.uri)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = _measure(config, dataset, card.config, diffusion.to(device), made, device)
    if made.edit is not None and made.edit.known is not None:
        train = dataset.stream("train", config.max_train_images)
        fills = Fills.fit(made.edit, num_images, train, card.config.num_classes)
        figures |= _fill_figures(config, dataset, fills, figures)
        num_shown = min(config.sample.contact_sheet_columns, num_images)
        first = read_images(made.store, read_shards(made.store, made.manifest.parts), num_shown).images
        write_if_changed(made.store, FILLS_KEY, fills.picture(first))
    record = EvaluationRecord(
        model=model.uri,
        model_digest=model.files.digest,
        spec_digest=made.manifest.spec_digest,
        dataset_digest=dataset.manifest.digest,
        num_images=num_images,
        figures=figures,
        warnings=warnings + made.labels.warnings,
    )
    write_if_changed(made.store, REPORT_KEY, to_json(record))
    evaluation = Evaluation(uri=join_uri(made.store.uri, REPORT_KEY), record=record)
    _log(evaluation, model)
    return evaluation


def _measure(
    config: EvaluateConfig,
    dataset: EvaluationDataset,
    network_config: ModelConfig,
    model: DiffusionModel,
    made: SampleResult,
    device: torch.device,
) -> dict[str, Figure]:
    """Every figure that makes sense for this dataset and model."""
    image_shape, num_classes = model.image_shape, network_config.num_classes
    num_entries = (num_classes or 1) * math.prod(image_shape) ** 2
    gaussians = None
    figures = {}
    if not dataset.too_large_for_pixels:
        by_class = num_classes if num_entries <= _MAX_COVARIANCE_ENTRIES else None
        train = _class_moments(dataset, config, by_class)
        if by_class == num_classes:
            gaussians = ClassGaussians.fit([_in_x_0_scale(moments) for moments in train], image_shape)
        draw = None if gaussians is None else functools.partial(draw_images, gaussians, config.seed, num_classes)
        figures["frechet_pixels"] = _frechet(config, dataset, made, sum(moments.count for moments in train), draw)
        if num_classes is not None and num_classes > 1:
            naive = None if draw is None else functools.partial(draw, made.num_asked)
            figures["label_agreement"] = _label_agreement(config, dataset, made.images, naive)
    else:
        say(f"{dataset.too_large_for_pixels}: only the eps error and the bound are measured")
    figures["eps_mse"] = _eps_error(config, dataset, model, gaussians, device)
    return figures | _bound_figures(config, dataset, model, device)


def _class_moments(dataset: EvaluationDataset, config: EvaluateConfig, num_classes: int | None) -> list[Moments]:
    try:
        return pixel_moments(dataset.stream("train", config.max_train_images), num_classes)
    except ValueError as error:
        raise ConfigError(f"max_train_images: {error} among {config.max_train_images}; take more") from error


def _in_x_0_scale(moments: Moments) -> Moments:
    """Moments of 2 p - 1 from those of p."""
    return Moments(count=moments.count, mean=2 * moments.mean - 1, m2=4 * moments.m2)


def _frechet(
    config: EvaluateConfig,
    dataset: EvaluationDataset,
    made: SampleResult,
    num_train: int,
    draw: Callable[[int], Iterator[LabelledImages]] | None,
) -> Figure:
    """The distances of equally many images: the first of the generated ones where there are fewer training images."""
    held_out = pixel_moments(dataset.stream("held_out"), None)[0]
    real = real_distance(lambda: dataset.stream("train", config.max_train_images), num_train, made.num_asked, held_out)

    def first() -> Iterator[LabelledImages]:
        return stream_images(made.store, read_shards(made.store, made.manifest.parts), stop=real.num_images)

    of_model = pixel_distance(first, held_out)
    of_naive = None if draw is None else pixel_distance(functools.partial(draw, real.num_images), held_out)
    return Figure(
        model=_figure(of_model.value),
        real=_figure(real.distance.value),
        gaussian=None if of_naive is None else _figure(of_naive.value),
        # The error is that of images drawn by themselves; those of an edit share their inputs with the held-out ones.
        standard_error=_error_of(of_model) if made.is_independent else None,
        real_standard_error=_figure(real.distance.standard_error),
        gaussian_standard_error=None if of_naive is None else _error_of(of_naive),
        num_images=real.num_images,
        num_real_sets=real.num_sets,
    )


def _error_of(distance: PixelDistance) -> float | None:
    return None if distance.standard_error is None else _figure(distance.standard_error)


def _label_agreement(
    config: EvaluateConfig, dataset: EvaluationDataset, generated: _OpenStream, naive: _OpenStream | None
) -> Figure:
    classifier = PixelClassifier(join_images(list(dataset.stream("train", config.max_classifier_images))))

    def measure(open_stream: _OpenStream | None) -> tuple[float | None, float | None]:
        if open_stream is None:
            return None, None
        agreement = classifier.agreement(open_stream())
        error = agreement_standard_error(agreement, sum(map(len, open_stream())))
        return _figure(agreement), _figure(error)

    model, standard_error = measure(generated)
    real, real_standard_error = measure(lambda: dataset.stream("held_out"))
    gaussian, gaussian_standard_error = measure(naive)
    return Figure(
        model=model,
        real=real,
        gaussian=gaussian,
        standard_error=standard_error,
        real_standard_error=real_standard_error,
        gaussian_standard_error=gaussian_standard_error,
    )


def _fill_figures(
    config: EvaluateConfig, dataset: EvaluationDataset, fills: Fills, figures: Mapping[str, Figure]
) -> dict[str, Figure]:
    """Those figures of an inpainting that are about images, of fills that no model made."""
    more = {}
    for name, open_stream in fills.streams.items():
        if "label_agreement" in figures:
            agreement = _label_agreement(config, dataset, open_stream, None)
            more[f"label_agreement_{name}"] = Figure(
                model=agreement.model, real=None, gaussian=None, standard_error=agreement.standard_error
            )
        if "frechet_pixels" in figures:
            num_images = figures["frechet_pixels"].num_images
            assert num_images is not None, "that of the completions, which the fills stand beside"
            held_out = pixel_moments(dataset.stream("held_out"), None)[0]
            of_as_many = dataclasses.replace(fills, num_images=num_images).streams[name]
            of_fill = _figure(frechet_distance(pixel_moments(of_as_many(), None)[0], held_out))
            more[f"frechet_pixels_{name}"] = Figure(model=of_fill, real=None, gaussian=None)
    return more


def _eps_error(
    config: EvaluateConfig,
    dataset: EvaluationDataset,
    model: DiffusionModel,
    gaussians: ClassGaussians | None,
    device: torch.device,
) -> Figure:
    schedule = model.schedule

    def measure(split: str, networks: list[Network]) -> list[Estimate]:
        def open_stream() -> Iterator[LabelledImages]:
            stream = dataset.stream(split, schedule.num_timesteps * config.eps_images_per_t)
            return stream if model.null_label is not None else (group.without_labels() for group in stream)

        return eps_mse(
            networks,
            schedule,
            open_stream,
            images_per_t=config.eps_images_per_t,
            seed=config.seed,
            batch_size=config.batch_size,
            device=device,
        )

    naive = [] if gaussians is None else [functools.partial(gaussians.eps_hat, schedule)]
    predictor = eps_network(model)
    of_model, *of_naive = measure("held_out", [predictor, *naive])
    return Figure(
        model=_figure(of_model.value),
        real=_figure(measure("train", [predictor])[0].value),
        gaussian=_figure(of_naive[0].value) if of_naive else None,
        standard_error=_figure(of_model.standard_error),
    )


def _bound_figures(
    config: EvaluateConfig, dataset: EvaluationDataset, model: DiffusionModel, device: torch.device
) -> dict[str, Figure]:
    """How likely the held-out images are: the variational bound, whole and by term, and the flow's."""
    meter = BoundMeter(model=model, seed=config.seed, batch_size=config.batch_size, device=device)
    bound = meter.bound(dataset.stream("held_out", config.max_bound_images), config.bound)
    estimates = {
        "bits_per_dim": bound.bits_per_dim,
        "bits_per_dim_prior": bound.prior,
        "bits_per_dim_denoising": bound.denoising,
        "bits_per_dim_decoder": bound.decoder,
    }
    if config.max_flow_images:
        flow = meter.probability_flow(dataset.stream("held_out", config.max_flow_images), config.flow_steps)
        estimates["bits_per_dim_flow"] = flow.estimate(0)
        estimates["bits_per_dim_flow_discretisation"] = flow.estimate(1)
    return {
        name: Figure(
            model=_figure(estimate.value),
            real=None,
            gaussian=None,
            standard_error=_figure(estimate.standard_error),
        )
        for name, estimate in estimates.items()
    }


def _figure(value: float) -> float:
    if not math.isfinite(value):
        raise PipelineError(f"evaluation: a figure is {value}; the network has diverged, choose an earlier checkpoint")
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def _log(evaluation: Evaluation, model: ResolvedModel) -> None:
    if model.version is None:
        return
    metrics = {f"eval/{name}": value for name, value in evaluation.figures.items()}
    try:
        warnings = "; ".join(evaluation.record.warnings) or "none"
        log_version_metrics(
            model.version, metrics, {"ddpm.evaluation": evaluation.uri, "ddpm.evaluation_warnings": warnings}
        )
    except TrackingUnavailableError as error:
        say(f"the figures are in {evaluation.uri} but not in MLflow ({error}); evaluate again to log them")


def describe_plan(config: EvaluateConfig) -> list[tuple[str, str]]:
    """What an evaluation would do, as names and values; reads the dataset's manifest and the model, starts nothing."""
    dataset = EvaluationDataset(config.dataset)
    splits = {name: split.num_samples for name, split in dataset.manifest.splits.items()}
    job = resolve_job(config.sampling)
    warnings = dataset.check_fits(job.card, job.model.uri) + job.labels.warnings + config.sample.format.warnings
    num_evaluated = job.card.config.schedule.num_timesteps * config.eps_images_per_t
    return [
        *sampling_plan(config.sampling),
        ("dataset", f"{config.dataset}: {splits['train']:,} training, {splits['held_out']:,} held-out images"),
        ("eps error", f"{num_evaluated:,} held-out and as many training images, one evaluation each"),
        *(("warning", warning) for warning in warnings),
    ]
