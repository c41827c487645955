"""What `python jobs/benchmark.py sample` runs."""

from jobs.cli import Job
from pipeline.benchmarks.sample_benchmark import SampleBenchmarkConfig, benchmark_sample
from pipeline.data.image_size import parse_image_size
from pipeline.presets import Preset
from pipeline.progress import say

_NUM_CLASSES = 10  # of every model with classes: how many there are does not change the speed


def _of_preset(preset: Preset) -> SampleBenchmarkConfig:
    train, is_digits = preset.train, preset.prepare.source == "digits"
    return SampleBenchmarkConfig(
        network=train.network,
        schedule=train.schedule,
        image_size=(8, 8) if is_digits else parse_image_size(preset.prepare.image_size),
        channels=1 if is_digits else 3,
        num_classes=_NUM_CLASSES if train.class_conditional else None,
        sampler=preset.sample.sampler,
        batch_size=preset.sample.batch_size,
        num_threads=preset.sample.cpus_per_actor,
        use_gpu=preset.sample.use_gpu,
        cluster=preset.sample.cluster,
    )


def _run(config: SampleBenchmarkConfig) -> None:
    result = benchmark_sample(config)
    for name, others in (("the bare loop", result.bare), ("diffusers' pipeline", result.diffusers)):
        if ratios := result.ratios(others):
            median, least, most = ratios
            say(f"the job makes {median:.3f} times the img·NFE/s of {name} ({least:.3f} to {most:.3f})")
    say(f"done: {config.output}/sample.json")


def _plan(config: SampleBenchmarkConfig) -> list[tuple[str, str]]:
    images = config.batch_size * config.num_batches
    return [("rounds", f"{config.rounds}, each of {images:,} images of the job, the bare network and diffusers")]


JOBS = {
    "sample": Job(
        section="benchmark_sample", reads=("prepare", "train", "sample"), of_preset=_of_preset, run=_run, describe=_plan
    )
}
