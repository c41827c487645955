"""The group of training workers: started by Ray Train, replaced when lost, and the end of a run put into one line."""

import os
import signal
import tempfile

import ray
import ray.train
import ray.train.torch

from pipeline.errors import ConfigError, TrainingDivergedError, TrainingFailedError
from pipeline.progress import say
from pipeline.ray_errors import own_error
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_loop import train_worker
from pipeline.training.train_task import TrainTask

_GLOO_TIMEOUT_S = 1800


def run_workers(task: TrainTask) -> None:
    """Run the workers to the last step, inside a Ray session.

    Raises:
        PipelineError: What ended them, as the class of its cause.
        KeyboardInterrupt: At Ctrl-C.
    """
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
                name=task.run.run_key or task.run.run_id,
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
