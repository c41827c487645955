"""Draw the method's and a model's pictures: `python jobs/figures.py --samplers.sample.model models:/ddpm@candidate`."""

import sys

from jobs.cli import run_job
from jobs.compare import samplers_of_preset
from pipeline.evaluation.pictures.figures import FiguresConfig, describe_plan, draw_figures
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri


def _of_preset(preset: Preset) -> FiguresConfig:
    output = join_uri(preset.sample.output, "figures")
    return FiguresConfig(output=output, samplers=samplers_of_preset(preset), batch_size=preset.evaluate.batch_size)


def _run(config: FiguresConfig) -> None:
    for uri in draw_figures(config):
        say(uri)
    say(f"done: pictures in {config.output}")


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], _of_preset, _run, describe_plan))
