"""Compare samplers, or the likelihoods of two models: `python jobs/compare.py samplers`, `jobs/compare.py bounds`."""

import dataclasses
import sys

from jobs.cli import run_subcommand
from pipeline.evaluation.studies import bound_comparison, sampler_comparison
from pipeline.evaluation.studies.bound_comparison import BoundComparisonConfig, compare_bounds
from pipeline.evaluation.studies.sampler_comparison import SamplerComparisonConfig, compare_samplers
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri

_MAX_IMAGES_PER_CLASS = 1000


def samplers_of_preset(preset: Preset) -> SamplerComparisonConfig:
    """The preset's model and images, a moderate number of them."""
    images_per_class = min(preset.sample.images_per_class, _MAX_IMAGES_PER_CLASS)
    sample = dataclasses.replace(preset.sample, images_per_class=images_per_class)
    return SamplerComparisonConfig(dataset=preset.evaluate.dataset, sample=sample)


def _bounds_of_preset(preset: Preset) -> BoundComparisonConfig:
    return BoundComparisonConfig(
        dataset=preset.evaluate.dataset,
        model=preset.sample.model,
        baseline=preset.sample.model.replace("@candidate", "@champion"),
        output=join_uri(preset.sample.output, "bounds"),
    )


def _run_samplers(config: SamplerComparisonConfig) -> None:
    say(compare_samplers(config).table())
    say(f"done: {sampler_comparison.REPORT_KEY} and {sampler_comparison.CHART_KEY} in {config.sample.output}")


def _run_bounds(config: BoundComparisonConfig) -> None:
    say(compare_bounds(config).table())
    say(f"done: {bound_comparison.REPORT_KEY} in {config.output}")


def main(argv: list[str]) -> int:
    """Read what to compare, then the flags."""
    return run_subcommand(
        argv,
        "jobs/compare.py",
        {
            "samplers": (samplers_of_preset, _run_samplers, sampler_comparison.describe_plan),
            "bounds": (_bounds_of_preset, _run_bounds, bound_comparison.describe_plan),
        },
        __doc__,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
