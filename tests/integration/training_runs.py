"""Training runs of the integration tests: their flags, and what is compared of them."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tracking.mlflow_client import connect
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord, parse_record
from pipeline.training.checkpoints.state_files import UNSENT_METRICS_JSON
from tests.integration.jobs import EVERY_STEP, TINY

# The choice of t by importance has a state: it must be the same for any number of workers, and kept in checkpoints.
HYBRID = [
    "--network.learned-variance", "--objective.name", "hybrid", "--objective.t-choice", "importance",
    "--schedule.num-timesteps", "30",
]  # fmt: skip
# Everything that a checkpoint may hold.
CHECKPOINTS = [
    "--checkpoint-interval-steps", "5", "--keep-checkpoints", "100", "--post-hoc-ema.snapshot-interval-steps", "4",
    "--optimizer.more-ema-halflives-images", "500",
]  # fmt: skip
NUM_STEPS = 60
NO_PERIODIC_CHECKPOINTS = ["--checkpoint-interval-steps", "100000"]


def flags(
    folder: Path,
    dataset: str,
    *,
    steps: int,
    workers: int = 2,
    network: Sequence[str] = tuple(TINY),
    output: str | None = None,
    tracking: str | None = None,
) -> list[str]:
    return [
        "--dataset", dataset, "--output", output or str(folder / "run"), "--steps", str(steps),
        "--workers.num-workers", str(workers), "--cluster.num-cpus", str(workers),
        "--tracking.uri", tracking or f"sqlite:///{folder / 'mlflow.db'}", *network, *EVERY_STEP,
    ]  # fmt: skip


def runs_in(folder: Path) -> list[Any]:
    """The MLflow runs of the experiment."""
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name("ddpm").experiment_id]))


def metric(folder: Path, key: str) -> dict[int, list[float]]:
    """Every value logged of a metric, by step."""
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = runs_in(folder)
    values: dict[int, list[float]] = {}
    for entry in client.get_metric_history(run.info.run_id, key):
        values.setdefault(entry.step, []).append(entry.value)
    return values


def trained_to(folder: Path) -> int:
    """The last step that MLflow has a loss of; 0 before there is one."""
    record = folder / "run" / "run.json"
    if not record.exists() or (run_id := json.loads(record.read_bytes())["run_id"]) is None:
        return 0  # the database may be on its way: another process would make it too
    history = connect(f"sqlite:///{folder / 'mlflow.db'}").get_metric_history(run_id, "loss")
    return max((entry.step for entry in history), default=0)


def losses(folder: Path, num_steps: int) -> np.ndarray:
    """The loss of every step; each is logged once."""
    logged = metric(folder, "loss")
    assert sorted(logged) == list(range(1, num_steps + 1))
    assert all(len(values) == 1 for values in logged.values()), "no step is logged twice"
    return np.array([logged[step][0] for step in range(1, num_steps + 1)])


def digests(run: Path, step: int) -> dict[str, str]:
    """What `state_digests` gives for a checkpoint of a run in a local folder."""
    record = run / "checkpoints" / "_records" / f"step-{step:09d}.json"
    return state_digests(parse_record(record.read_bytes(), step, str(record)))


def state_digests(record: CheckpointRecord) -> dict[str, str]:
    """The digest of each file of a checkpoint, but for those that tell of its surroundings: its folder, and MLflow."""
    of_surroundings = ("config.toml", UNSENT_METRICS_JSON)
    return {file.name: file.sha256 for file in record.files if file.name not in of_surroundings}


def wait_until(event: Callable[[], bool], *, pause_s: float = 0.02) -> None:
    while not event():  # pytest's own limit ends a wait for nothing
        time.sleep(pause_s)
