"""What `python jobs/benchmark.py train` runs."""

import dataclasses

from jobs.cli import Job
from pipeline.benchmarks.train_benchmark import BenchmarkConfig, benchmark_train
from pipeline.data.prepare import OWN_SIZE
from pipeline.presets import Preset
from pipeline.progress import say


def _of_preset(preset: Preset) -> BenchmarkConfig:
    own_images = preset.prepare.source != "digits"
    lanes = max(4, preset.train.workers.num_workers)
    data = dataclasses.replace(preset.train.data, lanes=lanes, window_shards=2)
    return BenchmarkConfig(
        train=dataclasses.replace(preset.train, data=data),
        image_size=preset.prepare.image_size if own_images else OWN_SIZE,
    )


def _run(config: BenchmarkConfig) -> None:
    result = benchmark_train(config)
    say(
        f"done: the pipeline's speed is {result.ratio:.3f} of the bare processes'; longest stall of the loop at a "
        f"checkpoint {result.longest_stall_s:.2f} s"
    )
    if result.scaling is not None:
        pipeline, bare = result.scaling
        number = config.train.workers.num_workers
        say(f"{number} workers are {pipeline:.2f} times as fast as one; of the bare processes {bare:.2f} times")


def _plan(config: BenchmarkConfig) -> list[tuple[str, str]]:
    return [("runs", f"{config.rounds} of the pipeline and {config.rounds} bare, {config.steps} steps each")]


JOBS = {
    "train": Job(section="benchmark_train", reads=("prepare", "train"), of_preset=_of_preset, run=_run, describe=_plan)
}
