"""Averages of a trained run by their length: `python jobs/ema.py reconstruct`, `python jobs/ema.py sweep`.

`reconstruct` makes a model of one length; `sweep` draws the quality of several. The run must have taken snapshots:
`jobs/train.py --post-hoc-ema.snapshot-interval-steps ...`.
"""

import sys

from jobs.cli import run_subcommand
from pipeline.evaluation.studies import ema_sweep
from pipeline.evaluation.studies.ema_sweep import EmaSweepConfig, sweep_ema
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.training import post_hoc_ema
from pipeline.training.post_hoc_ema import ReconstructConfig, reconstruct


def _beside(train: str) -> str:
    """artifacts/digits/ema for artifacts/digits/train."""
    return f"{train.rpartition('/')[0]}/ema"


def _reconstruct_of_preset(preset: Preset) -> ReconstructConfig:
    return ReconstructConfig(
        train=preset.train.output, output=_beside(preset.train.output), tracking=preset.train.tracking
    )


def _sweep_of_preset(preset: Preset) -> EmaSweepConfig:
    return EmaSweepConfig(
        train=preset.train.output, output=_beside(preset.train.output), evaluate=preset.evaluate, run_name="ema-sweep"
    )


def _run_reconstruct(config: ReconstructConfig) -> None:
    made = reconstruct(config)
    registered = "" if made.version is None else f"; registered {made.version.uri}"
    say(f"done: sigma_rel {config.sigma_rel} in {made.uri}, profile within {made.residual:.2%}{registered}")


def _run_sweep(config: EmaSweepConfig) -> None:
    result = sweep_ema(config)
    say(result.table())
    say(f"done: {ema_sweep.REPORT_KEY} and {ema_sweep.CHART_KEY} in {config.output}")


def main(argv: list[str]) -> int:
    """Read what to do, then the flags."""
    return run_subcommand(
        argv,
        "jobs/ema.py",
        {
            "reconstruct": (_reconstruct_of_preset, _run_reconstruct, post_hoc_ema.describe_plan),
            "sweep": (_sweep_of_preset, _run_sweep, ema_sweep.describe_plan),
        },
        __doc__,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
