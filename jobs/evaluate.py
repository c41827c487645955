"""Measure a model against its dataset: `python jobs/evaluate.py --sample.model models:/ddpm-digits@candidate`."""

import sys

from jobs.cli import Job, run_job
from pipeline.evaluation.evaluate import EvaluateConfig, describe_plan, evaluate
from pipeline.progress import say


def _run(config: EvaluateConfig) -> None:
    report = evaluate(config)
    say(report.table())
    say(f"done: report in {report.uri}")


JOB = Job(
    section="evaluate", reads=("evaluate",), of_preset=lambda preset: preset.evaluate, run=_run, describe=describe_plan
)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
