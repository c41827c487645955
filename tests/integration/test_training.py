"""Training for real: worker counts, kills, damaged checkpoints, refusals."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.tracking.mlflow_client import connect
from tests.integration.jobs import EVERY_STEP, TINY, records, run_job, run_job_process, start_job
from tests.processes import kill_with_its_machine

pytestmark = pytest.mark.services

# The choice of t by importance has a state: it must be the same for any number of workers, and kept in checkpoints.
HYBRID = [
    "--network.learned-variance", "--objective.name", "hybrid", "--objective.t-choice", "importance",
    "--schedule.num-timesteps", "30",
]  # fmt: skip
# Everything that a checkpoint may hold.
CHECKPOINTS = [
    "--checkpoint-interval-steps", "5", "--keep-checkpoints", "20", "--post-hoc-ema.snapshot-interval-steps", "4",
    "--optimizer.more-ema-halflives-images", "500", "--optimizer.ema-ramp-up-ratio", "0.05",
]  # fmt: skip
NUM_STEPS = 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits") / "dataset"))
    prepare_source(config, open_source(config), map)
    return config.dataset


def flags(
    folder: Path, dataset: str, *, steps: int, workers: int = 2, network: Sequence[str] = tuple(TINY)
) -> list[str]:
    return [
        "--dataset", dataset, "--output", str(folder / "run"), "--steps", str(steps),
        "--workers.num-workers", str(workers), "--cluster.num-cpus", str(workers),
        "--tracking.uri", f"sqlite:///{folder / 'mlflow.db'}", *network, *EVERY_STEP,
    ]  # fmt: skip


def metric(folder: Path, key: str) -> dict[int, list[float]]:
    """Every value logged of a metric, by step."""
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    values: dict[int, list[float]] = {}
    for entry in client.get_metric_history(run.info.run_id, key):
        values.setdefault(entry.step, []).append(entry.value)
    return values


def losses(folder: Path, num_steps: int) -> np.ndarray:
    """The loss of every step; each is logged once."""
    logged = metric(folder, "loss")
    assert sorted(logged) == list(range(1, num_steps + 1))
    assert all(len(values) == 1 for values in logged.values()), "no step is logged twice"
    return np.array([logged[step][0] for step in range(1, num_steps + 1)])


@pytest.fixture(scope="module")
def unbroken(dataset: str, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Two workers that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_job("train", *flags(folder, dataset, steps=NUM_STEPS), *HYBRID, *CHECKPOINTS)
    return folder


@pytest.mark.usefixtures("ray_session")
def test_one_and_two_workers_train_alike(dataset: str, tmp_path: Path) -> None:
    curves = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run_job("train", *flags(folder, dataset, steps=50, workers=workers))
        curves.append(losses(folder, 50))
    difference = np.abs(curves[0] / curves[1] - 1).max()
    print(f"largest relative difference of 50 losses: {difference:.2e}")
    assert difference <= 1e-5
    assert curves[0][-10:].mean() < 0.9 * curves[0][:10].mean()


def test_a_learned_variance_with_chosen_t_trains_alike_too(dataset: str, unbroken: Path, tmp_path: Path) -> None:
    run_job("train", *flags(tmp_path, dataset, steps=30, workers=1), *HYBRID)
    np.testing.assert_allclose(losses(tmp_path, 30), losses(unbroken, NUM_STEPS)[:30], rtol=1e-4)


def test_killed_and_resumed_equals_unbroken(dataset: str, unbroken: Path, tmp_path: Path) -> None:
    again = [*flags(tmp_path, dataset, steps=NUM_STEPS), *HYBRID, *CHECKPOINTS]
    job = start_job("train", *again)
    wait_until(lambda: len(records(tmp_path / "run")) >= 3 or job.poll() is not None)
    kill_with_its_machine(job)
    reached = records(tmp_path / "run")
    assert 3 <= len(reached) < NUM_STEPS / 5, "killed in mid-run"

    # The newest checkpoint is altered too: the run must go on from the one before it, and say so.
    victim = tmp_path / "run" / "checkpoints" / str(reached[-1]["prefix"]) / "train_weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    resumed = run_job("train", *again, "--resume")
    assert f"checkpoint of step {reached[-1]['step']} is damaged" in resumed.stdout

    final = [records(folder / "run")[-1] for folder in (unbroken, tmp_path)]
    digests = [{f["name"]: f["sha256"] for f in record["files"]} for record in final]
    assert {"train_weights.safetensors", "ema-500.safetensors", "power-ema-0.1.safetensors"} < digests[0].keys()
    assert digests[0] == digests[1] | {"config.toml": digests[0]["config.toml"]}, "all but the folder's name"
    taken = [
        sorted(path.name for path in (folder / "run" / "ema_snapshots").iterdir()) for folder in (unbroken, tmp_path)
    ]
    assert len(taken[0]) == NUM_STEPS / 4 and taken[0] == taken[1]
    np.testing.assert_array_equal(losses(tmp_path, NUM_STEPS), losses(unbroken, NUM_STEPS))

    refused = run_job("train", *again, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run_job("train", *again, "--resume", "--seed", "5", check=False)
    assert changed.returncode == 2 and changed.stderr.startswith("error: seed: the run in")


def wait_until(event: Callable[[], bool]) -> None:
    while not event():  # pytest's own limit ends a wait for nothing
        time.sleep(0.02)


def test_a_diverging_run_stops_and_says_where(dataset: str, tmp_path: Path, ray_address: str) -> None:
    failed = run_job_process(
        "train", *flags(tmp_path, dataset, steps=50), "--optimizer.learning-rate", "1e30",
        "--optimizer.warmup-steps", "0", check=False, address=ray_address,
    )  # fmt: skip
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: step ") and "not finite" in line and "learning_rate" in line


def test_a_network_of_ones_own(dataset: str, tmp_path: Path, ray_address: str) -> None:
    own = ["--network.name", "own", "--network.factory", "tests.integration.jobs:scaled_noise"]
    own += ["--network.options", "scale", "0.25"]
    trained = run_job_process("train", *flags(tmp_path, dataset, steps=5, workers=1, network=own), address=ray_address)
    assert "registered models:/ddpm-digits/1" in trained.stdout
    made = run_job_process(
        "sample", "--model", "models:/ddpm-digits@candidate", "--output", str(tmp_path / "samples"),
        "--images-per-class", "2", "--sampler.num-steps", "4", "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--num-actors", "1", "--trust-model-code", cwd=tmp_path, address=ray_address,
    )  # fmt: skip
    assert "20 images" in made.stdout
