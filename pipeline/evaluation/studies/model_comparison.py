"""What do several models make of the same noise? Their images side by side, one row for each model.

Each model's images are a generation run of its own, made as `sample` makes any, below its own prefix of the output. All
noise is a function of seed and id, so that the same id is the same noise in every one of them.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.cluster import ClusterConfig
from pipeline.data.image_stream import read_images
from pipeline.data.pictures import image_grid
from pipeline.errors import ConfigError
from pipeline.generation.output.manifest import read_shards, write_if_changed
from pipeline.generation.sample import SampleResult, sample
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.generation.sample_job import SampleJob, resolve_job
from pipeline.models.model_uri import check_model_uris
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.progress import say
from pipeline.stores.storage import join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig

PICTURE_KEY = "models.png"
_COMPARED = ("image_size", "channels", "num_levels", "num_classes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelComparisonConfig:
    """Make images with several models from the same noise, and draw them side by side."""

    models: tuple[str, ...]
    """The models that sample.model is compared with, each named like it."""
    sample: ImagesConfig
    """The first model, the images that each makes, and where they go; a model's images lie where `sample` looks for
    them, and those that exist are not made again."""
    columns: int = 16
    """Images of each model in the picture, those with the first ids."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: must name at least one more model, got none; name it like sample.model")
        for uri in self.models:
            check_model_uris(_Named(models=uri), "models")
        if self.columns < 1:
            raise ValueError(f"columns: must be at least 1, got {self.columns}; choose a positive number")
        if self.sample.calibration is not None:
            raise ValueError(
                f"sample.calibration: is one model's, got {self.sample.calibration}; leave it out, and choose another "
                "sampler.variance"
            )


@dataclass(frozen=True)
class _Named:
    """One of the models, for the rule about a single one."""

    models: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelComparison:
    """What was made."""

    uri: str
    """The picture."""
    rows: tuple[tuple[str, str], ...]
    """Of each row, from above: the model's URI, resolved, and the prefix of its images."""

    def table(self) -> str:
        """The rows as text."""
        return "\n".join(f"row {number}: {model}, {prefix}" for number, (model, prefix) in enumerate(self.rows, 1))


def compare_models(config: ModelComparisonConfig) -> ModelComparison:
    """Make the images that are missing, and draw the first of them.

    Returns:
        Where the picture is, and which row is whose; a place without an image is white.

    Raises:
        ConfigError: If two of the models are the same, or make other images or have other classes than the first.
        PipelineError: As sample.
    """
    jobs = _resolve(config)
    made: list[SampleResult] = []
    for number, job in enumerate(jobs, start=1):
        say(f"{number} of {len(jobs)}: {job.model.uri}")
        made.append(sample(_config_of(config, job.model), model=job.model))
    write_if_changed(open_store(config.sample.output), PICTURE_KEY, _picture(config, made))
    rows = tuple((job.model.uri, one.store.uri) for job, one in zip(jobs, made, strict=True))
    return ModelComparison(uri=join_uri(config.sample.output, PICTURE_KEY), rows=rows)


def _config_of(config: ModelComparisonConfig, model: ResolvedModel) -> SampleConfig:
    """The run of one model; its alias is followed once."""
    sampling = SampleConfig.of(config.sample, config.tracking, config.cluster, trust_model_code=config.trust_model_code)
    return replace(sampling, model=model.uri)


def _resolve(config: ModelComparisonConfig) -> list[SampleJob]:
    """Look up everything that any of the runs needs, so that none of them fails after hours of others."""
    jobs: list[SampleJob] = []
    for uri in (config.sample.model, *config.models):
        model = resolve_model(uri, config.tracking, trust_model_code=config.trust_model_code)
        job = resolve_job(_config_of(config, model), model)
        for other in jobs:
            if other.model.files.digest == job.model.files.digest:
                raise ConfigError(f"models: {job.model.uri} is the same model as {other.model.uri}; name another")
        _check_like(jobs[0] if jobs else job, job)
        jobs.append(job)
    return jobs


def _check_like(first: SampleJob, job: SampleJob) -> None:
    """Refuse a model whose images cannot stand below those of the first."""
    for name in _COMPARED:
        ours, theirs = getattr(first.card.config, name), getattr(job.card.config, name)
        if ours != theirs:
            raise ConfigError(
                f"models: {job.model.uri} has the {name} {theirs}, {first.model.uri} {ours}; compare models of the same"
            )
    if first.card.class_names != job.card.class_names:
        raise ConfigError(
            f"models: {job.model.uri} has other classes than {first.model.uri}; compare models of the same"
        )


def _picture(config: ModelComparisonConfig, made: list[SampleResult]) -> bytes:
    """One row for each model, one column for each id."""
    num_shown = min(config.columns, made[0].num_asked)
    rows = [read_images(one.store, read_shards(one.store, one.manifest.parts), num_shown).images for one in made]
    return image_grid(np.concatenate(rows), columns=num_shown)


def describe_plan(config: ModelComparisonConfig) -> list[tuple[str, str]]:
    """What a comparison would do, as names and values; reads the models and the inputs, starts nothing."""
    jobs = _resolve(config)
    evaluations = sum(job.num_asked * job.evaluations_per_image for job in jobs)
    return [
        *((f"row {number}", f"{job.model.uri} into {job.store.uri}") for number, job in enumerate(jobs, start=1)),
        *([] if jobs[0].labels.text is None else [("labels", jobs[0].labels.text)]),
        ("images", f"{jobs[0].num_asked:,} of each model"),
        ("network evaluations", f"{evaluations:,} images at most; what exists is not made again"),
        ("picture", join_uri(config.sample.output, PICTURE_KEY)),
    ]
