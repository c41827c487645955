"""Make images with a model: `python jobs/sample.py --model models:/ddpm-digits@candidate`."""

import sys

from jobs.cli import run_job
from pipeline.generation.sample import SampleConfig, describe_plan, sample
from pipeline.progress import say


def _run(config: SampleConfig) -> None:
    result = sample(config)
    made = f"{result.num_made:,} made now" if result.num_made else "all of them there already, nothing written"
    say(f"done: {result.num_images:,} images ({made}) in {result.uri}; contact sheet {result.contact_sheet_uri}")


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], lambda preset: preset.sample, _run, describe_plan))
