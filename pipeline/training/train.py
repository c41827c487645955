"""The driver of a training run: claims its output, runs the workers, registers the model.

Ray Train starts and replaces the workers. It is handed neither datasets nor checkpoints: each worker builds its own
stream and finds the newest good checkpoint itself, so that there is one authority on where a run stands.
"""

import dataclasses
import os
import signal
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.train
import ray.train.torch

from ddpm import ModelConfig, OwnNetworkConfig, build_network, flops_per_image
from ddpm.networks.cost import num_parameters
from pipeline.cluster import ray_session
from pipeline.config_io import plain, read_record, to_json
from pipeline.config_sections import write_section
from pipeline.data.ingest import check_read_buffer, read_buffer_bytes
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.shards import check_levels
from pipeline.errors import ConfigError, OutputExistsError, PipelineError, TrainingDivergedError, TrainingFailedError
from pipeline.models.model_source import collect_source
from pipeline.models.model_uri import check_model_name
from pipeline.models.registry import CHECKPOINT_TAG, RegisteredVersion, register_model
from pipeline.progress import format_bytes, say
from pipeline.ray_errors import own_error
from pipeline.stores.storage import ObjectStore, join_uri, open_store
from pipeline.tracking.tracking import TrackingRun, check_server, resolve_tracking
from pipeline.training.checkpoints import TRAIN_AGAIN, CheckpointStore
from pipeline.training.train_board import progress_board
from pipeline.training.train_config import RunIdentity, TrainConfig, data_order, model_config
from pipeline.training.train_loop import train_worker
from pipeline.training.train_task import TrainTask

RUN_RECORD = "run.json"
_GLOO_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What an output folder says about the run that it holds; created once."""

    format_version: int = 2
    """Version of this record's form."""
    run_id: str
    """The MLflow run."""
    identity: RunIdentity
    """What a resumed run must share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Where a finished training run left its results."""

    run_id: str
    """The MLflow run."""
    checkpoint_uri: str
    """The last checkpoint; `sample` takes it as a model."""
    steps: int
    """Steps behind it."""
    version: RegisteredVersion
    """The registered model."""


def train(config: TrainConfig) -> TrainResult:
    """Train, or go on training, and register the averaged weights under the alias `candidate`.

    Args:
        config: What to train on what; places may be relative.

    Returns:
        Where the results are.

    Raises:
        PipelineError: As its subclasses say; nothing that was recorded is lost, and `resume` goes on.
    """
    config = _absolute(config)
    manifest, network_config, source = load_plan(config)
    check_server(config.tracking)
    store = open_store(config.output)
    run = _claim(config, manifest, store)
    checkpoints = CheckpointStore.of_run(config.output)
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        finished = checkpoints.read_finished(config.steps)
        if finished is None:
            newest = checkpoints.newest()
            with ray_session(config.cluster):
                done = newest.step if newest else 0
                with progress_board("training", config.steps, done=done) as board:
                    _fit(
                        TrainTask(
                            config=config,
                            manifest=manifest,
                            model_config=network_config,
                            source=source,
                            run=run,
                            board=board,
                        )
                    )
            finished = checkpoints.read_finished(config.steps)
        if finished is None:
            raise TrainingFailedError(
                f"{config.output}: the workers ended before step {config.steps}; --resume goes on"
            )
        # Safe to repeat: a driver killed before this line leaves it to the resumed one.
        last, files = finished
        checkpoints.pin(last, config.register_as)
        where = {CHECKPOINT_TAG: checkpoints.uri(last)}
        version = register_model(run, files, config.register_as, tags=where)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.finish(status)
    return TrainResult(run_id=run.run_id, checkpoint_uri=checkpoints.uri(last), steps=last.step, version=version)


def load_plan(config: TrainConfig) -> tuple[DatasetManifest, ModelConfig, bytes | None]:
    """Everything that can be checked before a cluster is touched.

    Returns:
        The dataset, the network's configuration, and the source of a network of one's own.

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
        check_read_buffer(manifest, data_order(config, manifest), config.data, config.workers.num_workers)
        if isinstance(config.network, OwnNetworkConfig):  # of others the config knows all that can be wrong
            build_network(network_config, gradient_checkpointing=config.gradient_checkpointing)
        source = collect_source(config.network)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return manifest, network_config, source


def describe_plan(config: TrainConfig) -> list[tuple[str, str]]:
    """What a run would do and cost, for `--dry-run`: names and values."""
    manifest, network_config, _ = load_plan(config)
    split = manifest.splits["train"]
    parameters, flops = num_parameters(network_config), flops_per_image(network_config)
    images = config.steps * config.global_batch
    buffer_bytes = read_buffer_bytes(manifest, data_order(config, manifest), config.workers.num_workers)
    return [
        ("network", f"{parameters:,} parameters"),
        ("forward pass", f"{flops / 1e9:.3f} GFLOP per image"),
        ("training", f"{3 * flops * images / 1e15:.3f} PFLOP in all (a step costs about three forward passes)"),
        ("images", f"{images:,} ({images / split.num_samples:.1f} epochs of {split.num_samples:,})"),
        ("steps", f"{config.steps:,} of {config.global_batch} images"),
        ("workers", f"{config.workers.num_workers} with {'a GPU' if config.workers.use_gpu else 'CPUs only'}"),
        ("shards", f"{len(split.shards)}, {format_bytes(sum(shard.size_bytes for shard in split.shards))}"),
        ("read buffer", f"about {format_bytes(buffer_bytes)} per worker"),
        ("MLflow", str(resolve_tracking(config.tracking).uri)),
        ("checkpoints", f"{-(-config.steps // config.checkpoint_interval_steps)}, {config.keep_checkpoints} kept"),
        *_snapshot_plan(config, parameters),
    ]


def _snapshot_plan(config: TrainConfig, parameters: int) -> list[tuple[str, str]]:
    interval, lengths = config.post_hoc_ema.snapshot_interval_steps, config.post_hoc_ema.tracked
    if not interval:
        return []
    number, width_bytes = -(-config.steps // interval), {"float32": 4, "float16": 2}[config.post_hoc_ema.dtype]
    size = format_bytes(number * len(lengths) * parameters * width_bytes)
    return [("EMA snapshots", f"{number} of {len(lengths)} averages, {size} in all")]


def _absolute(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        config,
        dataset=open_store(config.dataset).uri,
        output=open_store(config.output).uri,
        tracking=resolve_tracking(config.tracking),
    )


def read_run_record(store: ObjectStore) -> RunRecord:
    """What an output folder says about its run.

    Raises:
        ObjectMissingError: If it holds none.
        ConfigError: If the record is damaged.
        FormatVersionError: If it is of another version.
    """
    return read_record(RunRecord, store.read(RUN_RECORD), join_uri(store.uri, RUN_RECORD), remedy=TRAIN_AGAIN)


def _claim(config: TrainConfig, manifest: DatasetManifest, store: ObjectStore) -> TrackingRun:
    """The MLflow run of this output folder: a new one, or the one to go on with."""
    asked = RunIdentity.of(config, manifest)
    if store.stat(RUN_RECORD) is not None:
        record = read_run_record(store)
        if not config.resume:
            raise OutputExistsError(
                f"output: {store.uri} already holds a training run; "
                "pass --resume to go on with it, or name another output"
            )
        _refuse_changes(record.identity, asked, store.uri)
        return TrackingRun.join(config.tracking, record.run_id)
    run = TrackingRun.create(
        config.tracking,
        config.run_name,
        params=_flat(plain(config)) | {"dataset_digest": manifest.digest},
        tags={"ddpm.output": config.output},
    )
    try:
        created = store.create(RUN_RECORD, to_json(RunRecord(run_id=run.run_id, identity=asked)))
    except PipelineError:
        run.finish("FAILED")
        raise
    if not created:
        run.finish("KILLED")
        raise OutputExistsError(f"output: another driver has just started a run in {store.uri}; name another output")
    run.log_text(write_section(config, "train"), "config.toml")
    return run


def _refuse_changes(recorded: RunIdentity, asked: RunIdentity, where: str) -> None:
    theirs, ours = (_flat(plain(identity)) for identity in (recorded, asked))
    # The name of a variant first: it is why its options differ.
    for name in sorted(theirs.keys() | ours.keys(), key=lambda name: (not name.endswith(".name"), name)):
        before, now = theirs.get(name), ours.get(name)
        if before != now:
            raise ConfigError(
                f"{name}: the run in {where} has {before!r}, got {now!r}; "
                "a resumed run keeps it, a new one needs another output"
            )


def _fit(task: TrainTask) -> None:
    workers = task.config.workers
    _check_resources(task.config)
    resources = {"CPU": float(workers.cpus_per_worker)} | ({"GPU": 1.0} if workers.use_gpu else {})
    with tempfile.TemporaryDirectory(prefix="ddpm-train-", ignore_cleanup_errors=True) as scratch:
        trainer = ray.train.torch.TorchTrainer(
            lambda loop_config: train_worker(loop_config["task"]),
            train_loop_config={"task": task},
            torch_config=ray.train.torch.TorchConfig(timeout_s=_GLOO_TIMEOUT_S),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=task.run.run_id,
                storage_path=scratch,  # Ray Train's own snapshots, which nothing here reads
                failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            ),
        )
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise (own_error(error) or _failed(error)) from error
        except SystemExit as stop:  # Ray Train's own handler of Ctrl-C, which it leaves in place
            raise KeyboardInterrupt from stop
        finally:
            signal.signal(signal.SIGINT, interrupt)
    failure = ray.get(task.board.failure.remote())
    if failure:
        raise TrainingDivergedError(failure)


def _check_resources(config: TrainConfig) -> None:
    """Ray waits without a word for what it does not have: refuse it, or where a cluster may grow, say it."""
    workers, there = config.workers, ray.cluster_resources()  # type: ignore[no-untyped-call]
    asked = {"CPU": workers.num_workers * workers.cpus_per_worker}
    if workers.use_gpu:
        asked["GPU"] = workers.num_workers
    num_nodes = sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]
    for kind, amount in asked.items():
        if there.get(kind, 0) < amount:
            lacking = f"workers: {workers.num_workers} need {amount} {kind}s, Ray has {there.get(kind, 0):.0f}"
            if config.cluster.address is None and "RAY_ADDRESS" not in os.environ:
                raise ConfigError(f"{lacking}; choose a smaller workers.num_workers, or another cluster")
            say(f"{lacking}: waiting until the cluster has them")
    if num_nodes > 1 and "://" not in config.output:
        say(f"{config.output} is a folder and the cluster has {num_nodes} nodes: it must be the same on all of them")


def _failed(error: Exception) -> TrainingFailedError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return TrainingFailedError(
        f"the training workers failed ({lines[-1].strip()}); --resume goes on from the last checkpoint"
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names, which MLflow can show and a message can name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat
