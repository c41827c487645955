"""Which sampler is best for how many evaluations of the network? All of them on one model, from the same noise.

Each sampler with each number of steps is a generation run of its own, made as `sample` makes any: over the whole
cluster, exactly once. A comparison that was cut off goes on with what is missing, and one that gets another sampler
makes only that one's images. As many real images stand beside the figures. Samplers are compared image by image, where
what they share in noise and in held-out images cancels.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ddpm import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    DPMSolver2MSDE,
    DPMSolver3M,
    DPMSolver3MCommon,
    Heun,
    NoiseSchedule,
    Sampler,
    make_schedule,
)
from ddpm.samplers.registry import AnySampler
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.config_io import to_json
from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.errors import ConfigError
from pipeline.evaluation.studies.sampler_judge import JudgedImages, SamplerJudge, rows_of
from pipeline.evaluation.studies.sampler_table import SamplerComparison, draw_comparison
from pipeline.generation.output.manifest import write_if_changed
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import ImagesConfig, SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.measuring.evaluation_dataset import EvaluationDataset
from pipeline.measuring.measures import pixels
from pipeline.models.model_files import ModelCard, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.progress import say
from pipeline.stores.probe import check_conditions
from pipeline.stores.storage import check_uris, join_uri, open_store
from pipeline.tracking.tracking import TrackingConfig

REPORT_KEY, CHART_KEY = "samplers.json", "samplers.png"
REFERENCE = DPMSolver2M(spacing="log_snr", num_steps=500)
"""What deterministic samplers are to agree with: its own error at 500 steps is about 0.0003 on the digits."""

# Each with the spacing that suits it best on the digits; the solvers have one for few steps and one for more.
COMPARED: dict[str, AnySampler] = {
    "ancestral, fixed_small": Ancestral(variance="fixed_small"),
    "ancestral, fixed_large": Ancestral(variance="fixed_large"),
    "ancestral, learned_range": Ancestral(variance="learned_range"),
    "ancestral, analytic": Ancestral(variance="analytic"),
    "ddim, eta 1": DDIM(eta=1.0),
    "ddim, eta 0": DDIM(eta=0.0),
    "dpm_solver_2m, trailing": DPMSolver2M(spacing="trailing"),
    "dpm_solver_2m, log_snr": DPMSolver2M(spacing="log_snr"),
    "dpm_solver_2m_sde": DPMSolver2MSDE(spacing="trailing"),
    "dpm_solver_3m, trailing": DPMSolver3M(spacing="trailing"),
    "dpm_solver_3m, log_snr": DPMSolver3M(spacing="log_snr"),
    "dpm_solver_3m_common": DPMSolver3MCommon(spacing="trailing"),
    "heun": Heun(spacing="trailing"),
    "heun, churn 10": Heun(spacing="trailing", churn=10.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerComparisonConfig:
    """Compare samplers by the quality of their images at equal numbers of network evaluations."""

    dataset: str
    """Folder or s3://bucket/prefix of a prepared dataset with classes and a held-out split, of small images."""
    sample: ImagesConfig
    """The model, the number of images and where they go; of its sampler only clipping and guidance are used. With a
    calibration, ancestral sampling with the analytic variance is compared too."""
    samplers: tuple[str, ...] = ()
    """Which to compare, each name in quotes, such as "ddim, eta 0" heun; a wrong one is answered with all names. None
    given: all that fit the model."""
    evaluations: tuple[int, ...] = (5, 10, 20, 50, 250, 1000)
    """Numbers of network evaluations per image; a sampler takes as many steps as these allow."""
    num_seeds: int = 1
    """Seeds, from sample.seed on: each makes as many images once more, from other noise, and the figures are means. The
    Frechet distance stays that of one seed's number of images."""
    max_train_images: int = 10_000
    """Training images, spread over the split, for the classifier and the real figures."""
    trust_model_code: bool = False
    """Run the code that a model brings, a network of its maker's own, with your rights; trust who made it first. Given
    for this run alone, by the flag: files neither hold nor set it."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the model registry is."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        check_uris(self, "dataset")
        unknown = [name for name in self.samplers if name not in COMPARED]
        if unknown:
            raise ValueError(
                f"samplers: each must be one of {'; '.join(COMPARED)}, got {unknown[0]!r}; choose of these"
            )
        if not isinstance(self.sample.request, Generate):
            raise ValueError(
                f"sample.request.name: samplers are compared on images from nothing, got {self.sample.request.name}; "
                "leave it out"
            )
        if not self.evaluations or min(self.evaluations) < 1:
            raise ValueError(f"evaluations: at least one number, each at least 1, got {self.evaluations}; try 10 20 50")
        for name in ("num_seeds", "max_train_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        if self.sample.seed + self.num_seeds > 2**64:
            raise ValueError(f"num_seeds: seeds end at 2^64, got {self.num_seeds} from sample.seed on; choose fewer")


def compare_samplers(config: SamplerComparisonConfig, *, model: ResolvedModel | None = None) -> SamplerComparison:
    """Make the images that are missing, measure them, and write table and chart beside them.

    Args:
        config: What to compare.
        model: The model that config.sample.model names, if it has been resolved already.

    Returns:
        The figures; they are in the output as `samplers.json` and `samplers.png` too.

    Raises:
        ConfigError: If model and dataset do not belong together or have no classes, or the images are too large.
        PipelineError: As sample.
    """
    started_s = time.monotonic()
    found = _resolve(config, model)
    check_conditions(open_store(config.sample.output))
    for warning in found.warnings:
        say(f"warning: {warning}")
    judge = SamplerJudge(found.dataset, config.max_train_images, found.num_images)
    judged = []
    with ray_session(config.cluster):
        references = [_images(config, found.reference, found, k) for k in range(config.num_seeds)]
        for number, run in enumerate(found.runs, start=1):
            say(f"{number} of {len(found.runs)}: {run.name}, {run.num_evaluations} evaluations")
            judged.append(_judge(config, run, judge, found, references))
    comparison = SamplerComparison(
        model=found.model.uri,
        model_digest=found.model.files.digest,
        dataset_digest=found.dataset.manifest.digest,
        num_images=found.num_images,
        wall_s=round(time.monotonic() - started_s),
        real_frechet_pixels=judge.real.distance.value,
        real_label_agreement=judge.real_agreement,
        rows=rows_of(judged),
        num_seeds=config.num_seeds,
        num_compared_images=judge.real.num_images,
        num_real_sets=judge.real.num_sets,
        real_frechet_standard_error=judge.real.distance.standard_error,
        real_agreement_standard_error=judge.real_agreement_standard_error,
        warnings=found.warnings,
    )
    store = open_store(config.sample.output)
    write_if_changed(store, REPORT_KEY, to_json(comparison))
    write_if_changed(store, CHART_KEY, draw_comparison(comparison))
    return comparison


def _judge(
    config: SamplerComparisonConfig,
    run: "_Run",
    judge: SamplerJudge,
    found: "_Comparison",
    references: list[LabelledImages],
) -> JudgedImages:
    """Make and measure a run's images, of every seed."""
    parts, squares = [], []
    for k, reference in enumerate(references):
        made = _images(config, run.sampler, found, k)
        parts.append(judge.judge(made))
        squares.append(float(np.mean((pixels(made) - pixels(reference)) ** 2)))
    return JudgedImages(
        sampler=run.name,
        max_evaluations=run.max_evaluations,
        num_evaluations=run.num_evaluations,
        seeds=tuple(parts),
        rms_to_reference=float(np.sqrt(np.mean(squares))) if run.sampler.is_deterministic else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One sampler with one number of steps."""

    name: str
    sampler: AnySampler
    max_evaluations: int
    num_evaluations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """A resolved comparison."""

    dataset: EvaluationDataset
    model: ResolvedModel
    card: ModelCard
    reference: AnySampler
    runs: tuple[_Run, ...]
    num_images: int
    """Of each seed."""
    warnings: tuple[str, ...]


def _resolve(config: SamplerComparisonConfig, model: ResolvedModel | None) -> _Comparison:
    """Look up everything that any of the runs needs, so that none of them fails after hours of others."""
    dataset = EvaluationDataset(config.dataset)
    dataset.check_pixel_statistics()
    if model is None:
        model = resolve_model(config.sample.model, config.tracking, trust_model_code=config.trust_model_code)
    card = read_card(model.files, model.uri)
    warnings = dataset.check_fits(card, model.uri)
    if (card.config.num_classes or 0) < 2:
        raise ConfigError(f"sample.model: {model.uri} has no classes to read in its images; compare one that has")
    obstacles = {name: _obstacle(name, config, card) for name in config.samplers or COMPARED}
    for name in config.samplers:
        if obstacles[name]:
            raise ConfigError(f"samplers: {name!r} does not fit, {obstacles[name]}")
    runs = tuple(run for name, obstacle in obstacles.items() if not obstacle for run in _runs(name, config, card))
    num_steps = min(REFERENCE.num_steps, card.config.schedule.num_timesteps)
    reference = dataclasses.replace(_with_options(REFERENCE, config.sample.sampler), num_steps=num_steps)
    for sampler in (*{run.name: run.sampler for run in runs}.values(), reference):
        job = resolve_job(_sample_config(config, sampler, 0), model)
    return _Comparison(
        dataset=dataset,
        model=model,
        card=card,
        reference=reference,
        runs=runs,
        num_images=job.num_asked,
        warnings=warnings + job.labels.warnings,
    )


def _obstacle(name: str, config: SamplerComparisonConfig, card: ModelCard) -> str | None:
    """Why a sampler cannot be compared, if so."""
    base, sampler = config.sample.sampler, COMPARED[name]
    if sampler.needs_learned_variance and not card.config.network.learned_variance:
        return "the model has not learned a variance; leave it out"
    if sampler.needs_x_0_error and config.sample.calibration is None:
        return "it needs sample.calibration; make it with jobs/calibrate.py"
    if sampler.needs_x_0_error and (base.guidance_scale != 1.0 or base.dynamic_threshold is not None):
        return "calibrations are without guidance and dynamic threshold; leave it out"
    return None


def _runs(name: str, config: SamplerComparisonConfig, card: ModelCard) -> Iterator[_Run]:
    schedule = make_schedule(card.config.schedule)
    sampler = _with_options(COMPARED[name], config.sample.sampler)
    for max_evaluations in config.evaluations:
        num_steps = most_steps(schedule, sampler, max_evaluations)
        if num_steps:
            chosen = dataclasses.replace(sampler, num_steps=num_steps)
            yield _Run(
                name=name,
                sampler=chosen,
                max_evaluations=max_evaluations,
                num_evaluations=chosen.num_evaluations(schedule),
            )


def most_steps(schedule: NoiseSchedule, sampler: Sampler, evaluations: int) -> int:
    """Most steps that a sampler takes with a number of network evaluations; 0 if one step takes more."""
    for num_steps in range(min(evaluations, schedule.num_timesteps), 0, -1):
        if dataclasses.replace(sampler, num_steps=num_steps).num_evaluations(schedule) <= evaluations:
            return num_steps
    return 0


def _with_options(sampler: AnySampler, base: Sampler) -> AnySampler:
    """A sampler with the clipping and guidance of another."""
    return dataclasses.replace(
        sampler,
        clip_x_0=base.clip_x_0,
        dynamic_threshold=base.dynamic_threshold,
        guidance_scale=base.guidance_scale,
        guidance_interval=base.guidance_interval,
        guidance_rescale=base.guidance_rescale,
    )


def _sample_config(config: SamplerComparisonConfig, sampler: AnySampler, seed: int) -> SampleConfig:
    calibration = config.sample.calibration if sampler.needs_x_0_error else None
    images = dataclasses.replace(
        config.sample, sampler=sampler, calibration=calibration, seed=config.sample.seed + seed
    )
    return SampleConfig.of(images, config.tracking, config.cluster, trust_model_code=config.trust_model_code)


def _images(config: SamplerComparisonConfig, sampler: AnySampler, found: _Comparison, seed: int) -> LabelledImages:
    """The images of one sampler and seed, made if they are missing."""
    return join_images(list(sample(_sample_config(config, sampler, seed), model=found.model).images()))


def describe_plan(config: SamplerComparisonConfig) -> list[tuple[str, str]]:
    """What a comparison would do, as names and values; reads manifest and models, starts nothing."""
    found = _resolve(config, None)
    num_images = found.num_images * config.num_seeds
    evaluations = sum(run.num_evaluations for run in found.runs)
    evaluations += found.reference.num_evaluations(make_schedule(found.card.config.schedule))
    guided = 1 if config.sample.sampler.guidance_scale == 1.0 else 2
    return [
        ("model", found.model.uri),
        ("samplers", "; ".join(dict.fromkeys(run.name for run in found.runs))),
        ("runs", f"{len(found.runs)} of {num_images:,} images each, and the reference"),
        ("network evaluations", f"{num_images * evaluations * guided:,} images at most; what exists is not made again"),
        ("report", join_uri(config.sample.output, REPORT_KEY)),
        *(("warning", warning) for warning in found.warnings),
    ]
