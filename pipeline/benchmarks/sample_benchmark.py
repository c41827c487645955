"""Sampling speed of the job beside the network in a bare loop, and beside diffusers' pipeline, in turn in one run.

The bare side evaluates the same network on the same batch in a process of its own with as many threads, again and
again: no noise, no steps, no images. Diffusers' pipeline has the same weights, sampler and steps. The job's rate is
that of its generating phase, from the shard given to its actor, which has loaded the model, to the commit; the first
batch is slower and part of it, so that a run must be long enough for that not to count. Machines drift, so the sides
take turns and what counts are ratios of one round.
"""

import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ddpm import DDIM, ModelConfig, ScheduleConfig, UNetConfig, build_network, flops_per_image
from ddpm.networks.registry import AnyNetwork
from ddpm.samplers.registry import AnySampler
from pipeline.benchmarks.diffusers_pipeline import diffusers_pipeline
from pipeline.cluster import ClusterConfig, ray_session
from pipeline.generation.making.network_setup import set_up
from pipeline.generation.sample import sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import SampleJob, resolve_job
from pipeline.models.model_files import ModelCard, encode_model, load_model
from pipeline.models.model_source import collect_source
from pipeline.models.network_pass import Precision
from pipeline.progress import say
from pipeline.stores.storage import check_uris, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBenchmarkConfig:
    """Compare the sampling job's speed with the bare network's, and with diffusers' pipeline."""

    network: AnyNetwork = field(default_factory=UNetConfig)
    """The network; its weights are new ones, which are as fast as trained ones."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The training chain."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the images."""
    channels: int = 3
    """Channels of the images."""
    num_classes: int | None = None
    """Classes of the model; none: images have no label."""
    sampler: AnySampler = field(default_factory=DDIM)
    """Sampling method and its steps."""
    batch_size: int = 125
    """Images per network evaluation."""
    num_batches: int = 10
    """Batches of a run of the job, one output shard; enough for a minute or more."""
    num_bare_batches: int = 2
    """Batches of a turn of the other sides."""
    precision: Precision = "float32"
    """As in sample; diffusers' pipeline is in float32."""
    channels_last: bool = False
    """As in sample."""
    compile: bool = False
    """As in sample."""
    num_threads: int = 1
    """Threads of torch of each side."""
    use_gpu: bool = False
    """Give each side a GPU."""
    rounds: int = 5
    """Turns of each side."""
    output: str = "artifacts/benchmark_sample"
    """Folder or s3://bucket/prefix for sample.json."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the job runs."""

    def __post_init__(self) -> None:
        check_uris(self, "output")
        for name in ("batch_size", "num_batches", "num_bare_batches", "num_threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; choose a positive number")
        images = self.batch_size * self.num_batches
        if images % (self.num_classes or 1):
            raise ValueError(
                f"num_classes: must divide the {images} images of a run, got {self.num_classes}; choose another "
                "num_batches, or fewer classes: how many there are does not change the speed"
            )

    @property
    def model(self) -> ModelConfig:
        """The model that is sampled from."""
        return ModelConfig(
            network=self.network,
            schedule=self.schedule,
            image_size=self.image_size,
            channels=self.channels,
            num_classes=self.num_classes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBenchmarkResult:
    """Evaluations (images times evaluations of each, img·NFE) per second, of each round."""

    job: tuple[float, ...]
    """The job's generating phase."""
    bare: tuple[float, ...]
    """The network in a bare loop."""
    diffusers: tuple[float, ...]
    """Diffusers' pipeline; none where it takes no part."""
    evaluations_per_image: int
    """Network evaluations of an image."""
    flops_per_evaluation: int
    """Operations of one."""
    without_diffusers: str
    """Why diffusers takes no part; empty where it does."""

    def ratios(self, others: tuple[float, ...]) -> tuple[float, float, float] | None:
        """The job's rate over another's in the same round: median, least and most; None if that has none."""
        each = [ours / theirs for ours, theirs in zip(self.job, others)]
        return (statistics.median(each), min(each), max(each)) if each else None


def benchmark_sample(config: SampleBenchmarkConfig) -> SampleBenchmarkResult:
    """Run all sides in turn, report each round, and write sample.json; the ratios are what to quote."""
    job_rates, bare_rates, peer_rates = (list[float]() for _ in range(3))
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder, ray_session(config.cluster):
        job_config = _job_config(config, Path(folder))
        job = resolve_job(job_config)
        why_not = _why_without_diffusers(config)
        if why_not:
            say(f"without diffusers: {why_not}")
        for number in range(config.rounds):
            run = dataclasses.replace(job_config, output=str(Path(folder, f"images-{number}")))
            job_rates.append(sample(run).evaluations_per_s)
            bare_rates.append(_in_a_process(_bare_rate, run, config))
            if not why_not:
                peer_rates.append(_in_a_process(_diffusers_rate, run, config))
            beside = f", diffusers {peer_rates[-1]:.5g}" if not why_not else ""
            say(f"round {number + 1}: job {job_rates[-1]:.5g} img·NFE/s, bare loop {bare_rates[-1]:.5g}{beside}")
    result = SampleBenchmarkResult(
        job=tuple(job_rates),
        bare=tuple(bare_rates),
        diffusers=tuple(peer_rates),
        evaluations_per_image=job.evaluations_per_image,
        flops_per_evaluation=flops_per_image(config.model),
        without_diffusers=why_not,
    )
    _write(config, result)
    return result


def _write(config: SampleBenchmarkConfig, result: SampleBenchmarkResult) -> None:
    whole = {
        "config": dataclasses.asdict(config),
        "img_nfe_per_s": dataclasses.asdict(result),
        "job_over_bare": result.ratios(result.bare),
        "job_over_diffusers": result.ratios(result.diffusers),
    }
    open_store(config.output).write("sample.json", (json.dumps(whole, indent=2) + "\n").encode())


def _job_config(config: SampleBenchmarkConfig, place: Path) -> SampleConfig:
    """One actor and one shard, of a model with new weights."""
    model = place / "model"
    model.mkdir()
    weights, source = build_network(config.model).state_dict(), collect_source(config.network)
    for name, data in encode_model(ModelCard(config=config.model), weights, source).as_dict().items():
        (model / name).write_bytes(data)
    num_images = config.batch_size * config.num_batches
    return SampleConfig(
        model=str(model),
        output=str(place / "images"),
        images_per_class=num_images // (config.num_classes or 1),
        sampler=config.sampler,
        shard_size=num_images,
        batch_size=config.batch_size,
        precision=config.precision,
        channels_last=config.channels_last,
        compile=config.compile,
        cpus_per_actor=config.num_threads,
        use_gpu=config.use_gpu,
        cluster=config.cluster,
    )


def _why_without_diffusers(config: SampleBenchmarkConfig) -> str:
    if find_spec("diffusers") is None:
        return "it is not installed (pip install diffusers)"
    try:
        weights = build_network(config.model).state_dict()
        diffusers_pipeline(config.model, weights, config.sampler, device=torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return ""


def _in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """Where no thread of Ray's is beside it, with threads of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def _bare_rate(run: SampleConfig, config: SampleBenchmarkConfig) -> float:
    job, device = _prepared(run, config)
    model = set_up(load_model(job.model.files)[1], job.spec, device)
    batch = config.batch_size
    label = None if config.num_classes is None else torch.arange(batch, device=device) % config.num_classes
    x_t, t = torch.randn(batch, *model.image_shape, device=device), torch.full((batch,), 500, device=device)
    num_evaluations = job.evaluations_per_image * config.num_bare_batches

    def evaluate(number: int) -> None:
        with torch.no_grad():
            for _ in range(number):
                model.network(x_t, t, label)

    evaluate(2)
    return batch * num_evaluations / _seconds(lambda: evaluate(num_evaluations), device)


def _diffusers_rate(run: SampleConfig, config: SampleBenchmarkConfig) -> float:
    job, device = _prepared(run, config)
    network: Any = load_model(job.model.files)[1].network
    images = diffusers_pipeline(config.model, network.state_dict(), config.sampler, device=device)
    images(1)

    def draw() -> None:
        for _ in range(config.num_bare_batches):
            images(config.batch_size)

    num_images = config.batch_size * config.num_bare_batches
    return num_images * job.evaluations_per_image / _seconds(draw, device)


def _prepared(run: SampleConfig, config: SampleBenchmarkConfig) -> tuple[SampleJob, torch.device]:
    torch.set_num_threads(config.num_threads)
    return resolve_job(run), torch.device("cuda" if config.use_gpu else "cpu")


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
