"""One group of training workers, from its start to its end: run by Ray Train, which is told not to replace it.

What follows an end is decided by supervisor.py, which knows why it came, how far training got, and what room there is.
"""

import signal
import tempfile

import ray
import ray.train
import ray.train.torch

from pipeline.cluster_nodes import avoiding
from pipeline.ray_errors import innermost, own_error
from pipeline.stores.object_store import one_line
from pipeline.training.driver.failures import Failure
from pipeline.training.hang_timeout import peer_timeout_s
from pipeline.training.train_board import BoardState
from pipeline.training.train_config import WorkerConfig
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.train_loop import train_worker


def resources_of(workers: WorkerConfig) -> dict[str, float]:
    """What one worker needs, by Ray's names."""
    return {"CPU": float(workers.cpus_per_worker)} | ({"GPU": 1.0} if workers.use_gpu else {})


def run_group(task: TrainTask, num_workers: int, avoided: list[str]) -> Exception | None:
    """Run a group of workers until it ends, inside a Ray session.

    Args:
        task: What the workers get.
        num_workers: How many.
        avoided: Ids of nodes that are left out.

    Returns:
        What went wrong; None: they have returned.

    Raises:
        KeyboardInterrupt: At Ctrl-C.
    """
    workers = task.config.workers
    with tempfile.TemporaryDirectory(prefix="ddpm-train-", ignore_cleanup_errors=True) as scratch:
        trainer = ray.train.torch.TorchTrainer(
            # Ray puts the function into its object store, once for all workers: the columns of a million shards are
            # 48 MB, which the workers of a node share. A train_loop_config is sent to each of them.
            lambda: train_worker(task),
            torch_config=ray.train.torch.TorchConfig(timeout_s=round(peer_timeout_s(workers))),
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # mypy sees the one before version 2
                num_workers=num_workers,
                use_gpu=workers.use_gpu,
                resources_per_worker=resources_of(workers),
                label_selector=avoiding(avoided),
            ),
            run_config=ray.train.RunConfig(
                name=f"{task.run.run_key or task.run.run_id}-{task.group}",
                storage_path=scratch,  # Ray Train's own snapshots, which nothing here reads
                failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:  # of the group; of its keeper
            return error
        except SystemExit as stop:  # Ray Train's own handler of Ctrl-C, which it leaves in place
            raise KeyboardInterrupt from stop
        finally:
            signal.signal(signal.SIGINT, interrupt)
    return None


def found_no_room(error: Exception) -> bool:
    """Whether a group did not start because its places were not there after all, or went while it started."""
    return type(getattr(error, "controller_failure", None)).__name__.startswith("WorkerGroupStartup")


def was_preempted(error: Exception) -> bool:
    """Whether a group ended because a node that had given notice was taken away."""
    return isinstance(error, ray.train.PreemptionError)


def failure_of(error: Exception, state: BoardState) -> Failure:
    """Why a group failed: what a worker said first, or that its process was lost."""
    said, lost = state.failure, _lost_ranks(error)
    step = max((member.step for member in state.members.values()), default=-1)
    if said is not None:
        message = f"worker {said.rank}: {said.message}"
        failure = Failure(error=said.error, kind=said.kind, message=message, step=said.step)
        if not (lost and failure.is_of_lost_peer):
            return failure
    if own := own_error(error):
        return Failure(error=own, kind=type(own).__name__, message=str(own), step=step)
    if lost:
        ranks, reason = ", ".join(map(str, sorted(lost))), one_line(next(iter(lost.values())))
        return Failure(error=None, kind="", message=f"lost worker {ranks} ({reason[:300]})", step=step)
    cause = innermost(getattr(error, "controller_failure", error))
    return Failure(error=None, kind=type(cause).__name__, message=one_line(cause), step=step)


def _lost_ranks(error: Exception) -> dict[int, Exception]:
    """The workers whose processes have gone, and what Ray says of them."""
    failures = getattr(error, "worker_failures", {})
    return {rank: failure for rank, failure in failures.items() if hasattr(failure, "health_check_failure")}
