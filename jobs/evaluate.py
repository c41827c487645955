"""Measure a model against its dataset: `python jobs/evaluate.py --sample.model models:/ddpm-digits@candidate`."""

import sys

from jobs.cli import run_job
from pipeline.evaluation.evaluate import EvaluateConfig, describe_plan, evaluate
from pipeline.progress import say


def _run(config: EvaluateConfig) -> None:
    report = evaluate(config)
    say(report.table())
    say(f"done: report in {report.uri}")


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], lambda preset: preset.evaluate, _run, describe_plan))
