"""Train a DDPM: `python jobs/train.py --preset digits`; on a cluster with s3:// places, see the README."""

import sys

from jobs.cli import Job, run_job
from pipeline.progress import say
from pipeline.training.train import describe_plan, train
from pipeline.training.train_config import TrainConfig


def _run(config: TrainConfig) -> None:
    result = train(config)
    say(f"done: {result.steps} steps; registered {result.version.uri}; last checkpoint {result.checkpoint_uri}")


JOB = Job(section="train", reads=("train",), of_preset=lambda preset: preset.train, run=_run, describe=describe_plan)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
