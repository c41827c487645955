"""Which sampler is best for how many evaluations of the network? All of them on one model, from the same noise.

Each sampler with each number of steps is a generation run of its own, made as `sample` makes any: over the whole
cluster, exactly once. A comparison that was cut off goes on with what is missing, and one that gets another sampler
makes only that one's images. Real images stand beside the figures.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddpm import Moments, NoiseSchedule, SamplerConfig, frechet_distance, make_schedule, num_evaluations
from pipeline.cluster import ray_session
from pipeline.config_io import to_json
from pipeline.data.image_stream import LabelledImages, join_images, stream_images
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluation_dataset import EvaluationDataset
from pipeline.evaluation.measures import PixelClassifier, pixel_moments, pixels
from pipeline.evaluation.sampler_table import SamplerComparison, SamplerRow, draw_comparison
from pipeline.generation.inventory import load_generation_manifest, write_if_changed
from pipeline.generation.sample import SampleConfig, sample
from pipeline.models.model_files import ModelCard, read_card
from pipeline.models.registry import ResolvedModel, resolve_model
from pipeline.progress import say
from pipeline.stores.storage import join_uri, open_store

REPORT_KEY, CHART_KEY = "samplers.json", "samplers.png"
REFERENCE = SamplerConfig(name="dpm_solver_2m", spacing="log_snr", num_steps=500)
"""What deterministic samplers are to agree with: its own error at 500 steps is about 0.0003 on the digits."""

# Each with the spacing that suits it best on the digits; the solvers have one for few steps and one for more.
SAMPLERS = {
    "ancestral, fixed_small": SamplerConfig(name="ancestral", variance="fixed_small"),
    "ancestral, fixed_large": SamplerConfig(name="ancestral", variance="fixed_large"),
    "ancestral, learned_range": SamplerConfig(name="ancestral", variance="learned_range"),
    "ancestral, analytic": SamplerConfig(name="ancestral", variance="analytic"),
    "ddim, eta 1": SamplerConfig(name="ddim", eta=1.0),
    "ddim, eta 0": SamplerConfig(name="ddim", eta=0.0),
    "dpm_solver_2m, trailing": SamplerConfig(name="dpm_solver_2m", spacing="trailing"),
    "dpm_solver_2m, log_snr": SamplerConfig(name="dpm_solver_2m", spacing="log_snr"),
    "dpm_solver_2m_sde": SamplerConfig(name="dpm_solver_2m_sde", spacing="trailing"),
    "dpm_solver_3m, trailing": SamplerConfig(name="dpm_solver_3m", spacing="trailing"),
    "dpm_solver_3m, log_snr": SamplerConfig(name="dpm_solver_3m", spacing="log_snr"),
    "dpm_solver_3m_common": SamplerConfig(name="dpm_solver_3m_common", spacing="trailing"),
    "heun": SamplerConfig(name="heun", spacing="trailing"),
    "heun, churn 10": SamplerConfig(name="heun", spacing="trailing", churn=10.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerComparisonConfig:
    """Compare samplers by the quality of their images at equal numbers of network evaluations."""

    dataset: str
    """Folder or s3://bucket/prefix of a prepared dataset with classes and a held-out split, of small images."""
    sample: SampleConfig
    """The model, the number of images and where they go; of its sampler only clipping and guidance are used. With a
    calibration, ancestral sampling with the analytic variance is compared too."""
    samplers: tuple[str, ...] = ()
    """Names of samplers as in the table; none for all that fit the model."""
    evaluations: tuple[int, ...] = (5, 10, 20, 50, 250, 1000)
    """Numbers of network evaluations per image; a sampler takes as many steps as these allow."""
    max_train_images: int = 10_000
    """Training images, spread over the split, for the classifier and the real figures."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown:
            raise ValueError(
                f"samplers: each must be one of {'; '.join(SAMPLERS)}, got {unknown[0]!r}; choose of these"
            )
        if not self.evaluations or min(self.evaluations) < 1:
            raise ValueError(f"evaluations: at least one number, each at least 1, got {self.evaluations}; try 10 20 50")
        if self.max_train_images < 1:
            raise ValueError(f"max_train_images: must be at least 1, got {self.max_train_images}; take 10000")


def compare_samplers(config: SamplerComparisonConfig, *, model: ResolvedModel | None = None) -> SamplerComparison:
    """Make the images that are missing, measure them, and write table and chart beside them.

    Args:
        config: What to compare.
        model: The model that config.sample.model names, if it has been resolved already.

    Returns:
        The figures; they are in the output as `samplers.json` and `samplers.png` too.

    Raises:
        ConfigError: If model and dataset do not belong together, or have no classes.
        PipelineError: As sample.
    """
    started_s = time.monotonic()
    dataset, model, card = _resolve(config, model)
    runs = list(_runs(config, card))
    judge = _Judge(config, dataset)
    rows = []
    with ray_session(config.sample.cluster):
        reference = _images(config, _reference(config, card), model, card)
        for number, run in enumerate(runs, start=1):
            say(f"{number} of {len(runs)}: {run.name}, {run.num_evaluations} evaluations")
            made = _images(config, run.sampler, model, card)
            rows.append(judge.row(run, made, reference if run.sampler.is_deterministic else None))
    comparison = SamplerComparison(
        model=model.uri,
        model_digest=model.files.digest,
        dataset_digest=dataset.manifest.digest,
        num_images=config.sample.images_per_class * (card.config.num_classes or 1),
        wall_s=round(time.monotonic() - started_s),
        real_frechet_pixels=judge.real_frechet,
        real_label_agreement=judge.real_agreement,
        rows=tuple(rows),
    )
    store = open_store(config.sample.output)
    write_if_changed(store, REPORT_KEY, to_json(comparison))
    write_if_changed(store, CHART_KEY, draw_comparison(comparison))
    return comparison


class _Judge:
    """The figures of merit; real images are read once."""

    def __init__(self, config: SamplerComparisonConfig, dataset: EvaluationDataset) -> None:
        train = join_images(list(dataset.stream("train", config.max_train_images)))
        self._classifier = PixelClassifier(train)
        self._held_out = self._moments(dataset.stream("held_out"))
        self.real_frechet = frechet_distance(self._moments([train]), self._held_out)
        self.real_agreement = self._classifier.agreement(dataset.stream("held_out"))

    def row(self, run: "_Run", made: LabelledImages, reference: LabelledImages | None) -> SamplerRow:
        """Measure a run's images."""
        rms = None if reference is None else float(np.sqrt(np.mean((pixels(made) - pixels(reference)) ** 2)))
        return SamplerRow(
            sampler=run.name,
            max_evaluations=run.max_evaluations,
            num_evaluations=run.num_evaluations,
            frechet_pixels=float(frechet_distance(self._moments([made]), self._held_out)),
            label_agreement=self._classifier.agreement([made]),
            rms_to_reference=rms,
        )

    @staticmethod
    def _moments(stream: "list[LabelledImages] | Iterator[LabelledImages]") -> Moments:
        return pixel_moments(stream, None)[0]


def _resolve(
    config: SamplerComparisonConfig, model: ResolvedModel | None
) -> tuple[EvaluationDataset, ResolvedModel, ModelCard]:
    dataset = EvaluationDataset(config.dataset)
    model = model or resolve_model(config.sample.model, config.sample.tracking)
    card = read_card(model.files, model.uri)
    dataset.check_fits(card, model.uri)
    if (card.config.num_classes or 0) < 2:
        raise ConfigError(f"sample.model: {model.uri} has no classes to read in its images; compare one that has")
    return dataset, model, card


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One sampler with one number of steps."""

    name: str
    sampler: SamplerConfig
    max_evaluations: int
    num_evaluations: int


def _runs(config: SamplerComparisonConfig, card: ModelCard) -> Iterator[_Run]:
    schedule = make_schedule(card.config.schedule)
    for name in config.samplers or SAMPLERS:
        variance = SAMPLERS[name].variance
        if (variance == "learned_range" and not card.config.learned_variance) or (
            variance == "analytic" and config.sample.calibration is None
        ):
            continue
        sampler = _with_options(SAMPLERS[name], config.sample.sampler)
        for max_evaluations in config.evaluations:
            num_steps = most_steps(schedule, sampler, max_evaluations)
            if num_steps:
                chosen = dataclasses.replace(sampler, num_steps=num_steps)
                yield _Run(
                    name=name,
                    sampler=chosen,
                    max_evaluations=max_evaluations,
                    num_evaluations=num_evaluations(schedule, chosen),
                )


def most_steps(schedule: NoiseSchedule, sampler: SamplerConfig, evaluations: int) -> int:
    """Most steps that a sampler takes with a number of network evaluations; 0 if one step takes more."""
    for num_steps in range(min(evaluations, schedule.num_timesteps), 0, -1):
        if num_evaluations(schedule, dataclasses.replace(sampler, num_steps=num_steps)) <= evaluations:
            return num_steps
    return 0


def _reference(config: SamplerComparisonConfig, card: ModelCard) -> SamplerConfig:
    num_steps = min(REFERENCE.num_steps, card.config.schedule.num_timesteps)
    return dataclasses.replace(_with_options(REFERENCE, config.sample.sampler), num_steps=num_steps)


def _with_options(sampler: SamplerConfig, base: SamplerConfig) -> SamplerConfig:
    """A sampler with the clipping and guidance of another."""
    return dataclasses.replace(
        sampler,
        clip_x_0=base.clip_x_0,
        dynamic_threshold=base.dynamic_threshold,
        guidance_scale=base.guidance_scale,
        guidance_interval=base.guidance_interval,
        guidance_rescale=base.guidance_rescale,
    )


def _images(
    config: SamplerComparisonConfig, sampler: SamplerConfig, model: ResolvedModel, card: ModelCard
) -> LabelledImages:
    """The images of one sampler, made if they are missing."""
    calibration = config.sample.calibration if sampler.variance == "analytic" else None
    made = sample(dataclasses.replace(config.sample, sampler=sampler, calibration=calibration), model=model)
    store = open_store(made.uri)
    manifest = load_generation_manifest(store)
    assert manifest is not None, "sample publishes it"
    num_images = config.sample.images_per_class * (card.config.num_classes or 1)
    return join_images(list(stream_images(store, manifest.shards, stop=num_images)))


def describe_plan(config: SamplerComparisonConfig) -> list[tuple[str, str]]:
    """What a comparison would do, as names and values; reads manifest and model, starts nothing."""
    _, model, card = _resolve(config, None)
    schedule = make_schedule(card.config.schedule)
    runs = list(_runs(config, card))
    num_images = config.sample.images_per_class * (card.config.num_classes or 1)
    evaluations = sum(run.num_evaluations for run in runs)
    evaluations += num_evaluations(schedule, _reference(config, card))
    return [
        ("model", model.uri),
        ("samplers", "; ".join(dict.fromkeys(run.name for run in runs))),
        ("runs", f"{len(runs)} of {num_images:,} images each, and the reference"),
        ("network evaluations", f"{num_images * evaluations:,} images at most; what exists is not made again"),
        ("report", join_uri(config.sample.output, REPORT_KEY)),
    ]
