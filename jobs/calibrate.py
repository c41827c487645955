"""Measure what sampling with the analytic variance needs: `python jobs/calibrate.py --output calibration.json`."""

import sys

from jobs.cli import run_job
from pipeline.evaluation.studies.calibration import CalibrateConfig, calibrate, describe_plan
from pipeline.presets import Preset
from pipeline.progress import say


def _of_preset(preset: Preset) -> CalibrateConfig:
    output = f"{preset.train.output}/calibration.json"
    return CalibrateConfig(model=preset.sample.model, dataset=preset.evaluate.dataset, output=output)


def _run(config: CalibrateConfig) -> None:
    made = calibrate(config)
    say(f"done: {made.num_images:,} images, {len(made.x_0_error):,} steps in {config.output}")


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], _of_preset, _run, describe_plan))
