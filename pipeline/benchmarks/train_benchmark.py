"""Training speed of the pipeline beside bare DDP processes, interleaved in one run.

The bare side is what one would write without a pipeline: the same number of torch processes with gloo or NCCL, the same
network, batch, optimiser and threads, the whole dataset as one tensor in memory, torch's own random numbers. Machines
drift, so the two sides take turns and what counts is their ratio. The steady state is the median over the intervals of
a run after its first third. The pipeline writes checkpoints and logs to MLflow meanwhile, and measures none of them on
held-out images, which would take a processor's time.
"""

import dataclasses
import math
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

from ddpm import Ema, ModelConfig, build_network, images_to_x_0, make_schedule, q_sample, simple_loss
from pipeline.cluster import ray_session
from pipeline.data.image_size import parse_image_size
from pipeline.data.prepare import OWN_SIZE, PrepareConfig, prepare
from pipeline.data.shards import decode_png, read_shard
from pipeline.errors import TrainingFailedError
from pipeline.progress import say
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun
from pipeline.training.metrics.telemetry import STALL_METRIC
from pipeline.training.train import train
from pipeline.training.train_config import TrainConfig, ValidationConfig
from pipeline.training.train_plan import load_plan

_INTERVALS_PER_RUN = 15
_CHECKPOINT_STEPS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Compare the pipeline's training speed with bare DDP processes."""

    train: TrainConfig
    """The network, batch and workers to compare; its dataset is replaced by one made for the benchmark."""
    image_size: int | str = OWN_SIZE
    """Height x width of the benchmark's images, or one number for a square; own: scikit-learn's digits."""
    steps: int = 300
    """Optimiser steps of every run; the first third warms up."""
    rounds: int = 2
    """Runs of each side, in turn."""
    scaling: bool = False
    """Run both sides with one worker too, in turn: how much faster all workers are than one."""

    def __post_init__(self) -> None:
        if self.steps < _INTERVALS_PER_RUN:
            raise ValueError(f"steps: at least {_INTERVALS_PER_RUN}, got {self.steps}")
        if self.rounds < 1:
            raise ValueError(f"rounds: at least 1, got {self.rounds}")
        if self.image_size != OWN_SIZE:
            parse_image_size(self.image_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """Images per second of each run, in the order in which they ran."""

    pipeline: tuple[float, ...]
    """The pipeline's runs."""
    bare: tuple[float, ...]
    """The bare runs."""
    one_worker: tuple[float, ...]
    """The pipeline's with one worker; none without `scaling`."""
    bare_one_worker: tuple[float, ...]
    """The bare ones with one worker; none without `scaling`."""
    longest_stall_s: float
    """Seconds for which the pipeline's loop stood still at a checkpoint, at most."""

    @property
    def ratio(self) -> float:
        """Median of the pipeline over median of the bare processes."""
        return statistics.median(self.pipeline) / statistics.median(self.bare)

    @property
    def scaling(self) -> tuple[float, float] | None:
        """Median over the median with one worker, of the pipeline and of the bare processes; None: that was not run."""
        if not self.one_worker:
            return None
        sides = ((self.pipeline, self.one_worker), (self.bare, self.bare_one_worker))
        (pipeline, bare) = (statistics.median(all_of) / statistics.median(one) for all_of, one in sides)
        return pipeline, bare


def benchmark_train(config: BenchmarkConfig) -> BenchmarkResult:
    """Run both sides in turn and report each run.

    Args:
        config: What to compare.

    Returns:
        The figures; the ratio is what to quote.
    """
    pipeline, bare, one_worker, bare_one, stalls_s = (list[float]() for _ in range(5))
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder, ray_session(config.train.cluster):
        place = Path(folder)
        dataset = _make_dataset(config, place)
        for number in range(config.rounds):
            run = _pipeline_config(config, dataset, place / f"train-{number}", place)
            rate, stall_s = _pipeline_rate(run)
            pipeline.append(rate)
            stalls_s.append(stall_s)
            say(f"round {number + 1}: pipeline {rate:8.1f} img/s")
            say(f"round {number + 1}: longest stall of the loop at a checkpoint {stall_s:.2f} s")
            bare.append(_bare_rate(run, place / f"bare-{number}"))
            say(f"round {number + 1}: bare DDP {bare[-1]:8.1f} img/s")
            if config.scaling:
                workers = dataclasses.replace(run.workers, num_workers=1, min_workers=None)
                alone = dataclasses.replace(run, workers=workers, output=str(place / f"alone-{number}"))
                one_worker.append(_pipeline_rate(alone)[0])
                say(f"round {number + 1}: one worker {one_worker[-1]:8.1f} img/s")
                bare_one.append(_bare_rate(alone, place / f"bare-alone-{number}"))
                say(f"round {number + 1}: bare, one worker {bare_one[-1]:8.1f} img/s")
    return BenchmarkResult(
        pipeline=tuple(pipeline),
        bare=tuple(bare),
        one_worker=tuple(one_worker),
        bare_one_worker=tuple(bare_one),
        longest_stall_s=max(stalls_s),
    )


def _make_dataset(config: BenchmarkConfig, place: Path) -> str:
    """Digits, or the digits' scans enlarged in colour: their content does not change the speed."""
    dataset = str(place / "dataset")
    if config.image_size == OWN_SIZE:
        prepare(PrepareConfig(source="digits", dataset=dataset, shard_size=250))
        return dataset
    folder = place / "images"
    folder.mkdir()
    height, width = parse_image_size(config.image_size)
    for index, scan in enumerate(load_digits().images[:512]):
        grey = Image.fromarray(np.round(scan * 255 / 16).astype(np.uint8)).resize((width, height))
        Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180))).save(folder / f"{index:04d}.png")
    prepare(PrepareConfig(source=str(folder), dataset=dataset, image_size=config.image_size, shard_size=64))
    return dataset


def _pipeline_config(config: BenchmarkConfig, dataset: str, output: Path, place: Path) -> TrainConfig:
    return dataclasses.replace(
        config.train,
        dataset=dataset,
        output=str(output),
        steps=config.steps,
        log_interval_steps=config.steps // _INTERVALS_PER_RUN,
        checkpoint_interval_steps=min(_CHECKPOINT_STEPS, -(-config.steps // 2)),  # one in the middle at least
        grid_interval_steps=0,
        validation=ValidationConfig(num_images=0),
        tracking=TrackingConfig(uri=f"sqlite:///{place / 'mlflow.db'}"),
    )


def _pipeline_rate(config: TrainConfig) -> tuple[float, float]:
    """Images per second, and the longest stall in seconds."""
    result = train(config)
    run = TrackingRun.join(config.tracking, result.run_id)
    stalls_s = [value for _, value in run.metric_history(STALL_METRIC)]
    return _steady([value for _, value in run.metric_history("images_per_s")]), max(stalls_s, default=math.nan)


def _bare_rate(config: TrainConfig, place: Path) -> float:
    place.mkdir()
    plan = load_plan(config)
    manifest, network = plan.manifest, plan.model_config
    store = open_store(config.dataset)
    samples = [sample for shard in manifest.splits["train"].shards for sample in read_shard(store, shard)]
    np.savez(
        place / "data.npz",
        images=np.stack([decode_png(sample.image) for sample in samples]),
        labels=np.array([sample.cls or 0 for sample in samples]),
    )
    workers = multiprocessing.get_context("spawn")
    processes = [
        workers.Process(target=_bare_worker, args=(rank, config, network, str(place)), daemon=True)  # ends with us
        for rank in range(config.workers.num_workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise TrainingFailedError(f"bare workers ended with {[process.exitcode for process in processes]}")
    return _steady([float(line) for line in (place / "rates").read_text().split()])


def _steady(rates: list[float]) -> float:
    return statistics.median(rates[len(rates) // 3 :])


def _bare_worker(rank: int, config: TrainConfig, model_config: ModelConfig, place: str) -> None:
    world = config.workers.num_workers
    torch.set_num_threads(config.workers.cpus_per_worker)
    device = torch.device("cuda", rank) if config.workers.use_gpu else torch.device("cpu")
    torch.distributed.init_process_group(
        "nccl" if config.workers.use_gpu else "gloo",
        init_method=f"file://{place}/rendezvous",
        rank=rank,
        world_size=world,
    )
    with np.load(f"{place}/data.npz") as arrays:
        data = images_to_x_0(torch.from_numpy(arrays["images"])).to(device)
        labels = torch.from_numpy(arrays["labels"]).long().to(device) if model_config.num_classes else None
    network = build_network(model_config).to(device)
    module: torch.nn.Module = network
    if world > 1:
        module = DistributedDataParallel(network, device_ids=[rank] if config.workers.use_gpu else None)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optimizer.learning_rate, fused=True)
    ema = Ema(network, config.optimizer.ema_halflife_images) if rank == 0 else None
    schedule = make_schedule(model_config.schedule)
    local_batch = config.global_batch // world
    rates: list[float] = []
    started_s = time.perf_counter()
    for step in range(1, config.steps + 1):
        chosen = torch.randint(len(data), (local_batch,), device=device)
        x_0, t = data[chosen], torch.randint(schedule.num_timesteps, (local_batch,), device=device)
        eps = torch.randn_like(x_0)
        eps_hat = module(q_sample(schedule, x_0, t, eps), t, None if labels is None else labels[chosen])
        torch.autograd.backward(simple_loss(eps, eps_hat).mean())
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.grad_clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(network, config.global_batch)
        if step % config.log_interval_steps == 0:
            elapsed_s, started_s = time.perf_counter() - started_s, time.perf_counter()
            rates.append(config.log_interval_steps * config.global_batch / elapsed_s)
    if rank == 0:
        Path(place, "rates").write_text(" ".join(map(str, rates)))
    torch.distributed.destroy_process_group()
