"""Make a dataset of WebDataset shards: `python jobs/prepare_data.py --source FOLDER --image-size 64 --dataset ...`."""

import sys

from jobs.cli import Job, run_job
from pipeline.data.prepare import PrepareConfig, describe_plan, prepare
from pipeline.progress import say


def _run(config: PrepareConfig) -> None:
    manifest = prepare(config)
    for name, split in manifest.splits.items():
        say(f"{name}: {split.num_samples:,} images in {len(split.shards)} shards")
    say(f"done: dataset {manifest.name!r} (digest {manifest.digest[:16]}) in {config.dataset}")


JOB = Job(
    section="prepare", reads=("prepare",), of_preset=lambda preset: preset.prepare, run=_run, describe=describe_plan
)

if __name__ == "__main__":
    sys.exit(run_job(JOB, sys.argv[1:]))
