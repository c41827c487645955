"""Workers, nodes, servers and the driver are lost, taken away or hang: the run ends as if nothing had happened."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.torch
import torch

from pipeline.tracking.mlflow_client import connect
from tests.integration.jobs import records, run_job, run_job_process, slow_tiny
from tests.integration.nodes import Nodes, ending, start
from tests.integration.training_runs import (
    HYBRID,
    NO_PERIODIC_CHECKPOINTS,
    NUM_STEPS,
    flags,
    losses,
    metric,
    runs_in,
    trained_to,
    wait_until,
)

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.xdist_group("nodes")]


def last_step(folder: Path) -> int:
    found = records(folder / "run")
    return int(str(found[-1]["step"])) if found else 0


def gaps_of(folder: Path) -> dict[int, float]:
    """Seconds before a step that came late, by step."""
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = runs_in(folder)
    logged = sorted((e.step, e.timestamp / 1000) for e in client.get_metric_history(run.info.run_id, "loss"))
    return {step: round(at - before, 1) for (_, before), (step, at) in pairwise(logged) if at - before > 2}


def rollback_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "run.json").read_bytes())["rollback"]
    return found


def weights_of(folder: Path, step: int) -> torch.Tensor:
    (place,) = (folder / "run" / "checkpoints").glob(f"step-{step:09d}-*")
    tensors = safetensors.torch.load_file(place / "train_weights.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_a_node_lost_and_back_and_one_taken_away(nodes: Nodes, dataset: str, unbroken: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 workers, then a node that gives notice, then the rest: as a run that nobody touched.

    There are no periodic checkpoints: each one was asked for. A second driver that comes by leaves at once. The model
    that comes of it can be sampled.
    """
    slow_file = tmp_path / "slow"
    slow_file.write_text("2")  # as many steps as there are must last for all that happens
    arguments = [*flags(tmp_path, dataset, steps=NUM_STEPS, network=slow_tiny(slow_file)), *HYBRID]
    arguments += NO_PERIODIC_CHECKPOINTS
    arguments += ["--workers.min-workers", "1", "--workers.resize-interval-s", "3", "--keep-checkpoints", "100"]
    job, log = start(nodes, tmp_path, *arguments)

    def train_on() -> None:
        reached = trained_to(tmp_path) + 2
        wait_until(lambda: trained_to(tmp_path) >= reached or job.poll() is not None, pause_s=0.2)

    with ending(job):
        train_on()
        nodes.kill_raylet()
        waited_s = [log.seconds_to("training with 1 of 2 workers")]
        train_on()

        nodes.keep(1)
        waited_s.append(log.seconds_to("there is room for 2 workers"))  # said when they have left
        grown_at = last_step(tmp_path)
        waited_s.append(log.seconds_to("training with 2 of 2 workers"))
        train_on()
        nodes.keep(2)  # not before: the group would be free to start there, and not on the node that is drained
        second = run_job("train", *arguments, "--resume", check=False)
        assert not ray.is_initialized(), "no Ray was started"
        assert second.returncode == 1 and f"process {job.pid} on " in second.stderr and "works here" in second.stderr

        nodes.drain(deadline_s=300)
        log.wait_for("a node of the workers goes in ")
        log.wait_for("the workers have left at step ")
        drained_at = last_step(tmp_path)
        waited_s.append(log.seconds_to("training with 2 of 2 workers"))
        train_on()
        print("seconds to: shrunk, room seen, two again, drained:", np.round(waited_s, 1))

        slow_file.unlink()
        assert job.wait(300) == 0, log.text
    num_restarts = log.text.count("training with ")  # a busy machine may lose a group that starts
    assert [record["step"] for record in records(tmp_path / "run")] == [grown_at, drained_at, NUM_STEPS]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert int(run.data.tags["ddpm.restarts"]) == num_restarts >= 3 and float(run.data.tags["ddpm.wall_time_s"]) > 0
    losses(tmp_path, NUM_STEPS)  # one run, every step once, and none lost to a worker that came or left
    print("gaps between two logged steps:", gaps_of(tmp_path))

    touched, untouched = (weights_of(folder, NUM_STEPS) for folder in (tmp_path, unbroken))
    difference = float((touched - untouched).norm() / untouched.norm())
    print(f"relative norm of the difference: {difference:.1e}")
    assert 0 < difference <= 1e-4, "sums of one worker are in another order than those of two"

    # The network is the test's own: its source travelled with the model, and is trusted by name alone.
    assert "registered models:/ddpm-digits/1" in log.text
    made = run_job_process(
        "sample", "--model", "models:/ddpm-digits@candidate", "--output", str(tmp_path / "samples"),
        "--images-per-class", "2", "--sampler.num-steps", "4", "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--num-actors", "1", "--trust-model-code", cwd=tmp_path, variables=nodes.variables,
    )  # fmt: skip
    assert "20 images" in made.stdout


def test_a_read_that_hangs_and_losses_that_are_not_finite(nodes: Nodes, dataset: str, tmp_path: Path) -> None:
    """A hang is found, and logged with the stacks of all ranks; too many bad batches are gone back from, once.

    It comes in mid-training, for which the timeout is half of that of a start: that may take long on a busy machine.
    """
    copied, bad = tmp_path / "dataset", tmp_path / "bad"
    shutil.copytree(dataset, copied)
    shard = next((copied / "train").iterdir())
    whole, silent = tmp_path / "whole", tmp_path / "silent"
    shutil.copy(shard, whole)
    os.mkfifo(silent)  # whoever opens it waits for a writer
    network = ["--network.name", "own", "--network.factory", "tests.integration.jobs:noise_or_nan",
               "--network.options", "nan_file", str(bad)]  # fmt: skip
    arguments = flags(tmp_path, str(copied), steps=100_000, network=network)
    arguments += ["--workers.hang-timeout-s", "20", "--checkpoint-interval-steps", "10", "--max-skipped-batches", "2"]
    arguments += ["--workers.max-failures", "10"]  # a group may start for longer than twice 20 s all the same
    arguments += ["--data.cache-bytes", "0"]  # each epoch reads its shards anew
    job, log = start(nodes, tmp_path, *arguments)

    def train_to(step: int) -> None:
        wait_until(lambda: last_step(tmp_path) >= step or job.poll() is not None)

    with ending(job):
        train_to(10)
        silent.replace(shard)
        log.wait_for("ending the workers; this is where they stand")
        whole.replace(shard)
        log.wait_for("worker 0, process ")
        log.wait_for("worker 1, process ")
        log.wait_for("; going on from step ")
        train_to(last_step(tmp_path) + 20)

        bad.touch()
        log.wait_for("; going back to step ")
        bad.unlink()
        rollback = rollback_of(tmp_path)
        train_to(rollback["from_step"] + 10)
        bad.touch()
        assert job.wait(120) == 1, (tmp_path / "log").read_text()
    ended = (tmp_path / "log").read_text().splitlines()[-1]
    assert ended.startswith("error: step ") and "highest loss at sample" in ended and "once before" in ended
    assert "learning_rate" in ended

    first, last = min(rollback["left_out_steps"]), max(rollback["left_out_steps"])
    assert len(rollback["left_out_steps"]) == 3 and rollback["to_step"] <= first <= last < rollback["from_step"]
    assert rollback_of(tmp_path)["is_done"]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FAILED" and f"to {rollback['to_step']}" in run.data.tags["ddpm.rolled_back"]
    values = {step: len(logged) for step, logged in metric(tmp_path, "learning_rate").items()}
    redone = range(rollback["to_step"] + 1, rollback["from_step"] + 1)
    assert {values[step] for step in redone if step <= last} == {2}, "logged again, since their batches differ"
    assert {count for step, count in values.items() if step not in redone} == {1}
    stacks = connect(f"sqlite:///{tmp_path / 'mlflow.db'}").list_artifacts(run.info.run_id, "hangs")
    num_hangs = log.text.count("ending the workers; this is where they stand")
    assert [file.path for file in stacks][:1] == ["hangs/group-1.txt"] and len(stacks) == num_hangs, log.text


def test_a_shard_that_is_altered_ends_the_run_at_once(nodes: Nodes, dataset: str, tmp_path: Path) -> None:
    copied = tmp_path / "dataset"
    shutil.copytree(dataset, copied)
    shard = next((copied / "train").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    job, _ = start(nodes, tmp_path, *flags(tmp_path, str(copied), steps=20, workers=1))
    with ending(job):
        assert job.wait(200) == 1
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1].startswith("error: ") and shard.name in said and "going on" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_bytes()).get("num_restarts", 0) == 0
