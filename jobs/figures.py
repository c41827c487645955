"""Draw the method's and a model's pictures: `python jobs/figures.py --sample.model models:/ddpm-digits@candidate`."""

import dataclasses
import sys

from jobs.cli import Job, run_job
from jobs.compare import samplers_of_preset
from pipeline.evaluation.pictures.figures import FiguresConfig, describe_plan, draw_figures
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri


def _of_preset(preset: Preset) -> FiguresConfig:
    compared = samplers_of_preset(preset)
    options = {field.name: getattr(compared, field.name) for field in dataclasses.fields(compared)}
    output = join_uri(compared.sample.output, "figures")
    return FiguresConfig(output=output, **options)


def _run(config: FiguresConfig) -> None:
    for uri in draw_figures(config):
        say(uri)
    say(f"done: pictures in {config.output}")


JOB = Job(section="figures", reads=("sample",), of_preset=_of_preset, run=_run, describe=describe_plan)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
