"""Averages of a trained run by their length: `python jobs/ema.py reconstruct`, `python jobs/ema.py sweep`.

`reconstruct` makes a model of one length; `sweep` draws the quality of several. The run must have taken snapshots:
`jobs/train.py --post-hoc-ema.snapshot-interval-steps ...`.
"""

import dataclasses
import sys
from typing import Any

from jobs.cli import Job, run_subcommand
from pipeline.evaluation.evaluate import MeasuresConfig
from pipeline.evaluation.studies import ema_sweep
from pipeline.evaluation.studies.ema_sweep import EmaSweepConfig, sweep_ema
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri
from pipeline.training import post_hoc_ema
from pipeline.training.post_hoc_ema import ReconstructConfig, reconstruct


def _reconstruct_of_preset(preset: Preset) -> ReconstructConfig:
    return ReconstructConfig(
        run=preset.train.output, output=join_uri(preset.train.output, "ema"), tracking=preset.train.tracking
    )


def _sweep_of_preset(preset: Preset) -> EmaSweepConfig:
    base = preset.evaluate
    measures = {field.name: getattr(base, field.name) for field in dataclasses.fields(MeasuresConfig)}
    return EmaSweepConfig(
        run=preset.train.output,
        output=join_uri(preset.train.output, "ema"),
        dataset=base.dataset,
        sample=preset.sample.images.from_nothing(),
        evaluate=MeasuresConfig(**measures),
        tracking=base.tracking,
        cluster=base.cluster,
    )


def _run_reconstruct(config: ReconstructConfig) -> None:
    made = reconstruct(config)
    registered = "" if made.version is None else f"; registered {made.version.uri}"
    say(f"done: sigma_rel {config.sigma_rel} in {made.uri}, profile within {made.residual:.2%}{registered}")


def _run_sweep(config: EmaSweepConfig) -> None:
    result = sweep_ema(config)
    say(result.table())
    say(f"done: {ema_sweep.REPORT_KEY} and {ema_sweep.CHART_KEY} in {config.output}")


JOBS: dict[str, Job[Any]] = {
    "reconstruct": Job(
        section="ema_reconstruct",
        reads=("train",),
        of_preset=_reconstruct_of_preset,
        run=_run_reconstruct,
        describe=post_hoc_ema.describe_plan,
    ),
    "sweep": Job(
        section="ema_sweep",
        reads=("train", "sample", "evaluate"),
        of_preset=_sweep_of_preset,
        run=_run_sweep,
        describe=ema_sweep.describe_plan,
    ),
}

if __name__ == "__main__":
    sys.exit(run_subcommand(JOBS, sys.argv[1:], program="jobs/ema.py", doc=__doc__))
