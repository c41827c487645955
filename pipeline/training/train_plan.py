"""What a training run would do, and everything about it that can be checked before a cluster is touched."""

from dataclasses import dataclass

from ddpm import ModelConfig, OwnNetworkConfig, build_network, flops_per_image
from ddpm.networks.cost import num_parameters
from pipeline.data.ingest import check_read_buffer, read_buffer_bytes
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.shards import check_levels
from pipeline.errors import ConfigError
from pipeline.models.model_source import collect_source
from pipeline.models.model_uri import check_model_name
from pipeline.progress import format_bytes
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import resolve_tracking
from pipeline.training.cost_plan import memory_plan, time_plan
from pipeline.training.fork import check_fork
from pipeline.training.metrics.matrix_rate import PASSES_PER_STEP
from pipeline.training.train_config import TrainConfig, data_order, model_config

_SHARE_OF_NOISE = 0.01
"""Of random weights in an average, above which it is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """What a run works with."""

    manifest: DatasetManifest
    """Its dataset."""
    model_config: ModelConfig
    """Its network, in the shape of the dataset."""
    source: bytes | None
    """Source of a network of one's own."""


def load_plan(config: TrainConfig) -> TrainPlan:
    """Everything that can be checked before a cluster is touched.

    Raises:
        ConfigError: If the configuration does not fit the dataset, or its network cannot be built.
        DatasetMissingError: If there is no dataset.
        DatasetError: If its pixels have more levels than can be read.
    """
    check_model_name(config.register_as)
    manifest = load_manifest(open_store(config.dataset))
    check_levels(manifest, config.dataset)
    try:
        network_config = model_config(config, manifest)
        check_read_buffer(manifest, data_order(config, manifest), config.data, config.workers.fewest)
        if isinstance(config.network, OwnNetworkConfig):  # of others the config knows all that can be wrong
            build_network(network_config, gradient_checkpointing=config.gradient_checkpointing)
        source = collect_source(config.network)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return TrainPlan(manifest=manifest, model_config=network_config, source=source)


def describe_plan(config: TrainConfig) -> list[tuple[str, str]]:
    """What a run would do and cost, for `--dry-run`: names and values."""
    plan = load_plan(config)
    manifest, network_config = plan.manifest, plan.model_config
    if not config.resume:  # a run that goes on needs the model no more
        check_fork(config, network_config)
    kept = f"{config.keep_checkpoints} kept"
    if config.keep_every_steps:
        kept += f", and those of every {config.keep_every_steps:,} steps"
    split = manifest.splits["train"]
    parameters, flops = num_parameters(network_config), flops_per_image(network_config)
    images = config.steps * config.global_batch
    workers = config.workers
    order = data_order(config, manifest)
    buffer_bytes = read_buffer_bytes(manifest, order, workers.fewest)
    number = (
        f"{workers.num_workers}"
        if workers.fewest == workers.num_workers
        else f"{workers.fewest} to {workers.num_workers}"
    )
    return [
        ("network", f"{parameters:,} parameters"),
        *([("begins with", f"the weights of {config.fork_from}")] if config.fork_from else []),
        ("forward pass", f"{flops / 1e9:.3f} GFLOP per image"),
        (
            "training",
            f"{PASSES_PER_STEP * flops * images / 1e15:.3f} PFLOP in all (a step costs three forward passes)",
        ),
        ("images", f"{images:,} ({images / split.num_samples:.1f} epochs of {split.num_samples:,})"),
        ("steps", f"{config.steps:,} of {config.global_batch} images"),
        ("workers", f"{number} with {'a GPU' if workers.use_gpu else 'CPUs only'}"),
        ("shards", f"{len(split.shards)}, {format_bytes(split.size_bytes)}"),
        ("read buffer", f"about {format_bytes(buffer_bytes)} per worker"),
        *memory_plan(config, network_config, order),
        *time_plan(config, network_config),
        ("MLflow", str(resolve_tracking(config.tracking).uri)),
        *([("average", note)] if (note := noisy_average(config)) else []),
        ("checkpoints", f"{-(-config.steps // config.checkpoint_interval_steps)}, {kept}"),
        *_snapshot_plan(config, parameters),
        *_validation_plan(config, manifest, flops),
    ]


def noisy_average(config: TrainConfig) -> str | None:
    """What is to be said of a run whose registered average remembers the random weights it began with."""
    share = config.optimizer.share_of_first_weights(config.steps * config.global_batch)
    if share <= _SHARE_OF_NOISE or config.fork_from is not None:
        return None
    return (
        f"{share:.0%} of the registered average are the random weights before training, at the end of this run, which "
        "shows as noise: leave --optimizer.ema-ramp-up-ratio at 0.05, or give an --optimizer.ema-halflife-images far "
        f"below the {config.steps * config.global_batch:,} images trained on (it is "
        f"{config.optimizer.ema_halflife_images:,})"
    )


def _snapshot_plan(config: TrainConfig, parameters: int) -> list[tuple[str, str]]:
    interval, lengths = config.post_hoc_ema.snapshot_interval_steps, config.post_hoc_ema.tracked
    if not interval:
        return []
    number, width_bytes = -(-config.steps // interval), {"float32": 4, "float16": 2}[config.post_hoc_ema.dtype]
    size = format_bytes(number * len(lengths) * parameters * width_bytes)
    return [("EMA snapshots", f"{number} of {len(lengths)} averages, {size} in all")]


def _validation_plan(config: TrainConfig, manifest: DatasetManifest, flops: int) -> list[tuple[str, str]]:
    validation, held_out = config.validation, manifest.splits.get("held_out")
    if validation.num_images == 0 or held_out is None or not held_out.shards:
        return []
    num_images = min(validation.num_images, held_out.num_samples)
    work = (
        f"{2 * validation.draws * num_images * flops / 1e12:.3g} TFLOP on {'a GPU' if validation.use_gpu else 'CPUs'}"
    )
    return [("validation", f"{num_images} held-out images every {validation.interval_s:g} s at most, each time {work}")]
