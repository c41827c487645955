"""Training for real: worker counts, kills, damaged checkpoints, refusals."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.tracking.mlflow_client import connect
from tests.integration.jobs import EVERY_STEP, TINY, records, run_job, start_job

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("digits") / "dataset"
    run_job("prepare_data", "--dataset", str(output))
    return str(output)


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


def test_one_and_two_workers_train_alike(dataset: str, tmp_path: Path) -> None:
    curves = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        run_job("train", *flags(folder, dataset, steps=50, workers=workers))
        losses = metric(folder, "loss")
        assert sorted(losses) == list(range(1, 51))
        curves.append(np.array([losses[step] for step in sorted(losses)]))
    difference = np.abs(curves[0] / curves[1] - 1).max()
    print(f"largest relative difference of 50 losses: {difference:.2e}")
    assert difference <= 1e-5
    assert curves[0][-10:].mean() < 0.9 * curves[0][:10].mean()


def test_a_learned_variance_with_chosen_t_trains_alike_too(dataset: str, tmp_path: Path) -> None:
    """The choice of t by importance has a state: equal for any number of workers, and kept in checkpoints."""
    hybrid = [
        "--network.learned-variance", "--objective.name", "hybrid", "--objective.t-choice", "importance",
        "--schedule.num-timesteps", "30", "--checkpoint-interval-steps", "15",
    ]  # fmt: skip
    curves = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        if workers == 2:  # broken off in the middle
            run_job("train", *flags(folder, dataset, steps=15, workers=workers), *hybrid)
        run_job("train", *flags(folder, dataset, steps=30, workers=workers), *hybrid, "--resume")
        losses = metric(folder, "loss")
        curves.append(np.array([losses[step] for step in range(1, 31)]))
    np.testing.assert_allclose(curves[0][:, 0], curves[1][:, 0], rtol=1e-4)


def test_killed_and_resumed_equals_unbroken(dataset: str, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    interval = [
        "--checkpoint-interval-steps", "20", "--keep-checkpoints", "10", "--post-hoc-ema.snapshot-interval-steps", "15",
        "--optimizer.more-ema-halflives-images", "500", "--optimizer.ema-ramp-up-ratio", "0.05",
    ]  # fmt: skip
    run_job("train", *flags(unbroken, dataset, steps=300), *interval)
    job = start_job("train", *flags(broken, dataset, steps=300), *interval)
    deadline = time.monotonic() + 180
    while len(records(broken / "run")) < 3 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    reached = _settled_records(broken / "run")
    assert 3 <= len(reached) < 15, "killed in mid-run"

    # The newest checkpoint is altered too: the run must go on from the one before it, and say so.
    victim = broken / "run" / "checkpoints" / str(reached[-1]["prefix"]) / "train_weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    again = run_job("train", *flags(broken, dataset, steps=300), *interval, "--resume")
    assert f"checkpoint of step {reached[-1]['step']} is damaged" in again.stdout

    final = [records(folder / "run")[-1] for folder in (unbroken, broken)]
    digests = [{f["name"]: f["sha256"] for f in record["files"]} for record in final]
    assert {"train_weights.safetensors", "ema-500.safetensors", "power-ema-0.1.safetensors"} < digests[0].keys()
    assert digests[0] == digests[1] | {"config.toml": digests[0]["config.toml"]}, "all but the folder's name"
    taken = [
        sorted(path.name for path in (folder / "run" / "ema_snapshots").iterdir()) for folder in (unbroken, broken)
    ]
    assert len(taken[0]) == 20 and taken[0] == taken[1]
    losses = metric(broken, "loss")
    assert sorted(losses) == list(range(1, 301))
    assert all(len(values) == 1 for values in losses.values()), "no step is logged twice"

    refused = run_job("train", *flags(broken, dataset, steps=300), check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run_job("train", *flags(broken, dataset, steps=300), *interval, "--resume", "--seed", "5", check=False)
    assert changed.returncode == 2 and changed.stderr.startswith("error: seed: the run in")


def _settled_records(run: Path) -> list[dict[str, object]]:
    """The records once the orphaned workers are gone too: Ray ends them some seconds after their driver."""
    before: list[dict[str, object]] = []
    while (now := records(run)) != before:
        before = now
        time.sleep(8)
    return now


def test_a_diverging_run_stops_and_says_where(dataset: str, tmp_path: Path) -> None:
    failed = run_job(
        "train", *flags(tmp_path, dataset, steps=50), "--optimizer.learning-rate", "1e30",
        "--optimizer.warmup-steps", "0", check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: step ") and "not finite" in line and "learning_rate" in line


def test_a_network_of_ones_own(dataset: str, tmp_path: Path) -> None:
    own = ["--network.name", "own", "--network.factory", "tests.integration.jobs:scaled_noise"]
    own += ["--network.options", "scale", "0.25"]
    trained = run_job("train", *flags(tmp_path, dataset, steps=5, workers=1, network=own))
    assert "registered models:/ddpm-digits/1" in trained.stdout
    made = run_job(
        "sample", "--model", "models:/ddpm-digits@candidate", "--output", str(tmp_path / "samples"),
        "--images-per-class", "2", "--sampler.num-steps", "4", "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--num-actors", "1", cwd=tmp_path,
    )  # fmt: skip
    assert "20 images" in made.stdout
