"""Compare samplers, the likelihoods of two models, or what several models make of the same noise.

`python jobs/compare.py samplers`, `jobs/compare.py bounds`, `jobs/compare.py models --models models:/ddpm-digits/1`.
"""

import dataclasses
import sys
from typing import Any

from jobs.cli import Job, run_subcommand
from pipeline.evaluation.studies import bound_comparison, model_comparison, sampler_comparison
from pipeline.evaluation.studies.bound_comparison import BoundComparisonConfig, compare_bounds
from pipeline.evaluation.studies.model_comparison import ModelComparisonConfig, compare_models
from pipeline.evaluation.studies.sampler_comparison import SamplerComparisonConfig, compare_samplers
from pipeline.generation.requests.requests import Generate
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri

_MAX_IMAGES_PER_CLASS = 1000
_MAX_IMAGES = 10_000


def samplers_of_preset(preset: Preset) -> SamplerComparisonConfig:
    """The preset's model and images from nothing, a moderate number of them."""
    base = preset.sample
    images = base.images.from_nothing()
    if images.images_per_class is not None:
        images = dataclasses.replace(images, images_per_class=min(images.images_per_class, _MAX_IMAGES_PER_CLASS))
    if isinstance(images.request, Generate) and images.request.label_plan is not None:
        images = dataclasses.replace(images, request=Generate())  # of a plan there are no fewer images
    if images.num_images is not None:
        images = dataclasses.replace(images, num_images=min(images.num_images, _MAX_IMAGES))
    return SamplerComparisonConfig(
        dataset=preset.evaluate.dataset,
        sample=images,
        tracking=base.tracking,
        cluster=base.cluster,
    )


def _bounds_of_preset(preset: Preset) -> BoundComparisonConfig:
    base = preset.sample
    return BoundComparisonConfig(
        dataset=preset.evaluate.dataset,
        model=base.model,
        baseline=base.model.replace("@candidate", "@champion"),
        output=join_uri(base.output, "bounds"),
        tracking=base.tracking,
    )


def _models_of_preset(preset: Preset) -> ModelComparisonConfig:
    """The preset's images, as many as fill one output shard: a run of whole shards grows."""
    base = preset.sample
    images = dataclasses.replace(base.images, calibration=None)  # it is one model's
    if isinstance(images.request, Generate) and images.request.label_plan is None:
        images = dataclasses.replace(images, images_per_class=None, num_images=images.shard_size)
    return ModelComparisonConfig(
        models=(base.model.replace("@candidate", "@champion"),),
        sample=images,
        tracking=base.tracking,
        cluster=base.cluster,
    )


def _run_samplers(config: SamplerComparisonConfig) -> None:
    say(compare_samplers(config).table())
    say(f"done: {sampler_comparison.REPORT_KEY} and {sampler_comparison.CHART_KEY} in {config.sample.output}")


def _run_models(config: ModelComparisonConfig) -> None:
    made = compare_models(config)
    say(made.table())
    say(f"done: {made.uri}")


def _run_bounds(config: BoundComparisonConfig) -> None:
    say(compare_bounds(config).table())
    say(f"done: {bound_comparison.REPORT_KEY} in {config.output}")


JOBS: dict[str, Job[Any]] = {
    "samplers": Job(
        section="compare_samplers",
        reads=("sample",),
        of_preset=samplers_of_preset,
        run=_run_samplers,
        describe=sampler_comparison.describe_plan,
    ),
    "bounds": Job(
        section="compare_bounds",
        reads=("sample",),
        of_preset=_bounds_of_preset,
        run=_run_bounds,
        describe=bound_comparison.describe_plan,
    ),
    "models": Job(
        section="compare_models",
        reads=("sample",),
        of_preset=_models_of_preset,
        run=_run_models,
        describe=model_comparison.describe_plan,
    ),
}

if __name__ == "__main__":
    sys.exit(run_subcommand(JOBS, sys.argv[1:], program="jobs/compare.py", doc=__doc__))
