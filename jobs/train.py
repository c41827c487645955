"""Train a DDPM: `python jobs/train.py --preset digits`; on a cluster with s3:// places, see the README."""

import sys

from jobs.cli import run_job
from pipeline.progress import say
from pipeline.training.train import describe_plan, train
from pipeline.training.train_config import TrainConfig


def _run(config: TrainConfig) -> None:
    result = train(config)
    say(f"done: {result.steps} steps; registered {result.version.uri}; last checkpoint {result.checkpoint_uri}")


if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], lambda preset: preset.train, _run, describe_plan))
