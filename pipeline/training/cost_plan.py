"""What a run will take, foretold for --dry-run: memory, hours, money."""

import json
import math
from pathlib import Path

import psutil

from ddpm import ModelConfig
from ddpm.networks.cost import cost_key, num_parameters
from ddpm.networks.memory import step_memory
from pipeline.data.data_order import DataOrder
from pipeline.errors import ConfigError, PipelineError
from pipeline.progress import format_bytes, format_duration
from pipeline.stores.storage import open_store
from pipeline.training.run_record import RUN_RECORD, read_run_record
from pipeline.training.train_config import TrainConfig

GPU_BENCHMARK = "artifacts/benchmark_gpu/gpu.json"
"""Where `jobs/benchmark.py gpu` leaves its figures, unless told otherwise."""
_GPU_SIZES_GIB = (24, 40, 80)
_USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's, kernels' workspaces, and what an allocator cannot reuse."""
_BYTES = 4
_MEASURED_SIZES = (2, 8)
"""Images at once whose memory is counted; that of others follows, for it grows by the same with each image."""


def memory_plan(config: TrainConfig, model_config: ModelConfig, order: DataOrder) -> list[tuple[str, str]]:
    """Most memory of a worker, and what to change where that is much.

    Args:
        config: The run.
        model_config: Its network.
        order: The order of its data.
    """
    workers = config.workers.num_workers
    rows = max(len(order.rank_lanes(rank, workers)) for rank in range(workers)) * order.lane_rows_per_step
    at_once = rows if config.micro_batch is None else min(config.micro_batch, rows)
    fixed = fixed_bytes(config, model_config)
    try:
        peak = _peak(config, model_config, at_once)
        parts = (
            f"{format_bytes(fixed)} weights, optimiser and averages, {format_bytes(peak)} for {at_once} images at once"
        )
        lines = [("memory", f"about {format_bytes(fixed + peak)} per worker: {parts}")]
        if config.workers.use_gpu:
            sizes = [(gib, largest_within(gib * 2**30, config, model_config, rows)) for gib in _GPU_SIZES_GIB]
            fits = ", ".join(f"{gib} GiB {f'at most {size} at once' if size else 'not even 1'}" for gib, size in sizes)
            lines.append(("of a GPU's", f"{fits}{_advice(config) if None in dict(sizes).values() else ''}"))
        elif config.cluster.address is None and (there := psutil.virtual_memory().total) < workers * (fixed + peak):
            size = largest_within(there / workers, config, model_config, rows)
            smaller = (
                f"--micro-batch {size} would fit" if size else f"not even 1 image at once would fit{_advice(config)}"
            )
            lines.append(("too much", f"this machine has {format_bytes(there)} for {workers} workers: {smaller}"))
        return lines
    except Exception as error:  # a network of the user's own may look at values, which fails in many ways
        return [("memory", f"not foretold, since the network looks at values ({type(error).__name__})")]


def fixed_bytes(config: TrainConfig, model_config: ModelConfig) -> int:
    """Of the worker that keeps the averages: weights, gradient, two moments, averages."""
    averages = len(config.optimizer.ema_halflives_images) + len(config.post_hoc_ema.tracked)
    return num_parameters(model_config) * _BYTES * (4 + averages)


def largest_within(num_bytes: float, config: TrainConfig, model_config: ModelConfig, rows: int) -> int | None:
    """The largest divisor of a worker's images that passes through the network in so much memory; None: not even 1."""
    few, more = (_peak(config, model_config, size) for size in _MEASURED_SIZES)
    fewest, most = _MEASURED_SIZES
    of_one = (more - few) / (most - fewest)
    room = num_bytes * _USABLE - fixed_bytes(config, model_config)
    fitting = [size for size in range(1, rows + 1) if rows % size == 0 and few + (size - fewest) * of_one <= room]
    return max(fitting, default=None)


def time_plan(config: TrainConfig, model_config: ModelConfig) -> list[tuple[str, str]]:
    """Hours and money, where a speed is known.

    Raises:
        ConfigError: If a stored benchmark is damaged.
    """
    found = _throughput(config, model_config)
    if found is None:
        return [("time", "not known before it is measured; --throughput IMAGES_PER_S foretells it")]
    rate, source = found
    seconds = config.steps * config.global_batch / rate
    lines = [("time", f"about {format_duration(seconds)} at {rate:,.0f} img/s, {source}")]
    if config.price_per_device_hour is not None:
        devices = config.workers.num_workers * (1 if config.workers.use_gpu else config.workers.cpus_per_worker)
        money = seconds / 3600 * devices * config.price_per_device_hour
        each = f"{config.price_per_device_hour:,.4g} an hour for each of {devices} devices"
        lines.append(("cost", f"about {money:,.2f}, at {each}"))
    return lines


def _peak(config: TrainConfig, model_config: ModelConfig, size: int) -> int:
    checkpointing, is_bf16 = config.gradient_checkpointing, config.precision == "bf16"
    return step_memory(model_config, size, gradient_checkpointing=checkpointing, bf16=is_bf16).peak


def _advice(config: TrainConfig) -> str:
    ways = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += [] if config.precision == "bf16" else ["--precision bf16"]
    return f"; {' or '.join(ways)} takes less" if ways else "; take a smaller network"


def _throughput(config: TrainConfig, model_config: ModelConfig) -> tuple[float, str] | None:
    """Images per second of all workers, and where that is from."""
    if config.throughput is not None:
        return config.throughput, "as given"
    workers = config.workers.num_workers
    if (rate := _rate_of_run(config)) is not None:
        of_one, before = rate
        scaled = (
            ""
            if before == workers
            else f", with {before} worker{'s' if before > 1 else ''}, times {workers / before:g}"
        )
        return of_one * workers, f"as the run in {config.output} had{scaled}"
    if config.workers.use_gpu and (of_one_gpu := _rate_of_benchmark(config, model_config)) is not None:
        return of_one_gpu * workers, f"as one GPU had in {GPU_BENCHMARK}, times {workers}"
    return None


def _rate_of_run(config: TrainConfig) -> tuple[float, int] | None:
    """Images per second of one worker of the run in this output, and how many it had."""
    store = open_store(config.output)
    try:
        rate = read_run_record(store).rate if store.stat(RUN_RECORD) is not None else None
    except PipelineError:  # --dry-run says elsewhere what is wrong with it
        return None
    return None if rate is None else (rate.images_per_s / rate.num_workers, rate.num_workers)


def _rate_of_benchmark(config: TrainConfig, model_config: ModelConfig) -> float | None:
    file = Path(GPU_BENCHMARK)
    if not file.exists():
        return None
    try:
        rates = {
            (row["cost_key"], row["precision"], row["compile"], row["channels_last"]): float(row["images_per_s_median"])
            for row in json.loads(file.read_text())["figures"]
            if row["network"] == "ours"
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: not what jobs/benchmark.py gpu writes ({error}); run it again, or remove it"
        ) from error
    rate = rates.get((cost_key(model_config), config.precision, config.compile, config.channels_last), math.nan)
    return None if math.isnan(rate) else rate
