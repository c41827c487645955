"""Compare samplers, or the likelihoods of two models: `python jobs/compare.py samplers`, `jobs/compare.py bounds`."""

import dataclasses
import sys
from typing import Any

from jobs.cli import Job, run_subcommand
from pipeline.evaluation.studies import bound_comparison, sampler_comparison
from pipeline.evaluation.studies.bound_comparison import BoundComparisonConfig, compare_bounds
from pipeline.evaluation.studies.sampler_comparison import SamplerComparisonConfig, compare_samplers
from pipeline.generation.requests.requests import Generate
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri

_MAX_IMAGES_PER_CLASS = 1000


def samplers_of_preset(preset: Preset) -> SamplerComparisonConfig:
    """The preset's model and images from nothing, a moderate number of them."""
    base = preset.sample
    images_per_class = min(preset.sample.images_per_class, _MAX_IMAGES_PER_CLASS)
    return SamplerComparisonConfig(
        dataset=preset.evaluate.dataset,
        sample=dataclasses.replace(base.images, images_per_class=images_per_class, request=Generate()),
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


def _run_samplers(config: SamplerComparisonConfig) -> None:
    say(compare_samplers(config).table())
    say(f"done: {sampler_comparison.REPORT_KEY} and {sampler_comparison.CHART_KEY} in {config.sample.output}")


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
}

if __name__ == "__main__":
    sys.exit(run_subcommand(JOBS, sys.argv[1:], program="jobs/compare.py", doc=__doc__))
