"""Training for real: worker counts, kills, damaged checkpoints, refusals."""

import json
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.stores.lease import LEASE_KEY
from tests.integration.jobs import records, run_job, run_job_process, start_job
from tests.integration.training_runs import (
    CHECKPOINTS,
    HYBRID,
    NUM_STEPS,
    digests,
    flags,
    losses,
    runs_in,
    wait_until,
)
from tests.processes import kill_with_its_machine

pytestmark = pytest.mark.services


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
    again = [*flags(tmp_path, dataset, steps=NUM_STEPS), *HYBRID, *CHECKPOINTS, "--lease-s", "4"]
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
    assert (
        f"process {job.pid} on " in resumed.stdout
        and "has not renewed its lease for 4 s; taking over" in resumed.stdout
    )

    final = [digests(folder / "run") for folder in (unbroken, tmp_path)]
    assert {"train_weights.safetensors", "ema-500.safetensors", "power-ema-0.1.safetensors"} < final[0].keys()
    assert final[0] == final[1], "of all files but config.toml, which names the folder"
    taken = [
        sorted(path.name for path in (folder / "run" / "ema_snapshots").iterdir()) for folder in (unbroken, tmp_path)
    ]
    assert len(taken[0]) == NUM_STEPS / 4 and taken[0] == taken[1]
    np.testing.assert_array_equal(losses(tmp_path, NUM_STEPS), losses(unbroken, NUM_STEPS))

    refused = run_job("train", *again, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run_job("train", *again, "--resume", "--seed", "5", check=False)
    assert changed.returncode == 2 and changed.stderr.startswith("error: seed: the run in")


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


def test_a_second_driver_leaves_and_sigterm_gives_the_lease_back(dataset: str, tmp_path: Path) -> None:
    again = [*flags(tmp_path, dataset, steps=100_000), *CHECKPOINTS, "--lease-s", "8"]
    job = start_job("train", *again, log=tmp_path / "log")
    wait_until(lambda: records(tmp_path / "run") or job.poll() is not None)
    with tempfile.TemporaryDirectory(prefix="ray-") as place_of_ray:
        second = run_job_process("train", *again, "--resume", check=False, variables={"RAY_TMPDIR": place_of_ray})
        assert not list(Path(place_of_ray).iterdir()), "no Ray was started"
    assert second.returncode == 1 and f"process {job.pid} on " in second.stderr and "works here" in second.stderr
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 3
    last = records(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith(f"stopped: at step {last}, checkpoint ")
    assert json.loads((tmp_path / "run" / LEASE_KEY).read_bytes())["released"] is True
    (run,) = runs_in(tmp_path)
    assert run.info.status == "KILLED" and "SIGTERM" in run.data.tags["stopped"]


@pytest.mark.usefixtures("ray_session")
def test_a_fork_begins_with_the_average_of_another_run(dataset: str, unbroken: Path, tmp_path: Path) -> None:
    """With steps too small to change a float32, what the first step leaves is what it began with."""
    (origin,) = list((unbroken / "run" / "checkpoints").glob(f"step-{NUM_STEPS:09d}-*"))
    slow = ["--optimizer.learning-rate", "1e-30", "--seed", "7", "--fork-from", os.path.relpath(origin)]
    run_job(
        "train", *flags(tmp_path, dataset, steps=1), "--network.learned-variance", "--objective.name", "hybrid", *slow
    )
    (made,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    average = safetensors.torch.load_file(origin / "weights.safetensors")
    for name in ("train_weights.safetensors", "weights.safetensors"):
        begun = safetensors.torch.load_file(made / name)
        assert begun.keys() == average.keys()
        assert all(torch.equal(begun[key], average[key]) for key in average), name
    trained = safetensors.torch.load_file(origin / "train_weights.safetensors")
    assert not all(torch.equal(trained[key], average[key]) for key in average), "the average is another model"
