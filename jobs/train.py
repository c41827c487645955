"""Train a DDPM: `python jobs/train.py --preset digits`; on a cluster with s3:// places, see the README."""

import sys

from jobs.cli import Job, run_job
from pipeline.errors import LeaseHeldError
from pipeline.progress import say
from pipeline.training.train import train
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_plan import describe_plan


def _run(config: TrainConfig) -> None:
    try:
        result = train(config)
    except LeaseHeldError as held:
        if config.if_held == "fail":
            raise
        say(f"left: {held}")
        return
    say(f"done: {result.steps} steps; registered {result.version.uri}; last checkpoint {result.checkpoint_uri}")


JOB = Job(section="train", reads=("train",), of_preset=lambda preset: preset.train, run=_run, describe=describe_plan)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
