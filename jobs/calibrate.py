"""Measure what sampling with the analytic variance needs: `python jobs/calibrate.py --output calibration.json`."""

import sys

from jobs.cli import Job, run_job
from pipeline.evaluation.studies.calibration import CalibrateConfig, calibrate, describe_plan
from pipeline.presets import Preset
from pipeline.progress import say
from pipeline.stores.storage import join_uri


def _of_preset(preset: Preset) -> CalibrateConfig:
    return CalibrateConfig(
        model=preset.sample.model,
        dataset=preset.train.dataset,
        output=join_uri(preset.train.output, "calibration.json"),
        tracking=preset.sample.tracking,
    )


def _run(config: CalibrateConfig) -> None:
    made = calibrate(config)
    say(f"done: {made.num_images:,} images, {len(made.x_0_error):,} steps in {config.output}")


JOB = Job(section="calibrate", reads=("train", "sample"), of_preset=_of_preset, run=_run, describe=describe_plan)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
