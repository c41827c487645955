"""Workers, nodes, servers and the driver are lost, taken away or hang: the run ends as if nothing had happened."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.integration.jobs import records, run_job, start_job
from tests.integration.nodes import Log, Nodes, ending
from tests.integration.training_runs import (
    flags,
    losses,
    runs_in,
    wait_until,
)

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("nodes")]

# A notice of a drain is looked for by Ray every so many seconds; patience is what a hang must be longer than.
QUICK = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", "DDPM_PATIENCE_MINUTES": "0.1"}


@pytest.fixture(scope="module")
def all_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture
def nodes(all_nodes: Nodes) -> Nodes:
    """Two nodes with room for one worker each."""
    all_nodes.keep(1)
    return all_nodes


def slow(delay_s: float) -> list[str]:
    return ["--network.name", "own", "--network.factory", "tests.integration.jobs:slow_noise",
            "--network.options", "delay_s", str(delay_s)]  # fmt: skip


def start(nodes: Nodes, folder: Path, *arguments: str) -> tuple["subprocess.Popen[str]", Log]:
    log = folder / "log"
    with log.open("a"):
        job = start_job("train", *arguments, log=log, variables={"RAY_ADDRESS": nodes.address, **QUICK})
    return job, Log(job, log)


def last_step(folder: Path) -> int:
    found = records(folder / "run")
    return int(str(found[-1]["step"])) if found else 0


def last_weights(folder: Path) -> torch.Tensor:
    (place,) = (folder / "run" / "checkpoints").glob(f"step-{last_step(folder):09d}-*")
    tensors = safetensors.torch.load_file(place / "train_weights.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_a_node_lost_and_back_and_one_taken_away(nodes: Nodes, dataset: str, tmp_path: Path) -> None:
    """2 -> 1 -> 2 workers, then a node that gives notice, then SIGTERM, then the rest: as a run that nobody touched."""
    arguments = [*flags(tmp_path, dataset, steps=400, network=slow(0.1)), "--checkpoint-interval-steps", "50"]
    arguments += ["--workers.min-workers", "1", "--workers.resize-interval-s", "5", "--keep-checkpoints", "100"]
    job, log = start(nodes, tmp_path, *arguments)
    with ending(job):
        wait_until(lambda: last_step(tmp_path) >= 50 or job.poll() is not None)
        nodes.kill_raylet()
        waited_s = [log.seconds_to("training with 1 of 2 workers")]
        reached = last_step(tmp_path)
        wait_until(lambda: last_step(tmp_path) > reached or job.poll() is not None)

        nodes.keep(1)
        waited_s.append(log.seconds_to("there is room for 2 workers"))
        left_at = last_step(tmp_path)
        assert left_at > reached and left_at % 50, "no step is lost to the second worker"
        waited_s.append(log.seconds_to("training with 2 of 2 workers"))
        wait_until(lambda: last_step(tmp_path) > left_at or job.poll() is not None)

        nodes.keep(2)
        nodes.drain(deadline_s=300)
        log.wait_for("a node of the workers goes in ")
        log.wait_for("the workers have left at step ")
        saved = last_step(tmp_path)
        assert saved % 50, "later than the last periodic checkpoint"
        waited_s.append(log.seconds_to("training with 2 of 2 workers"))
        wait_until(lambda: last_step(tmp_path) > saved or job.poll() is not None)
        print("seconds to: shrunk, room seen, two again, drained:", np.round(waited_s, 1))

        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 3, (tmp_path / "log").read_text()
    stopped = last_step(tmp_path)
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith(f"stopped: at step {stopped}, checkpoint ")
    (run,) = runs_in(tmp_path)
    assert run.info.status == "KILLED" and f"at step {stopped}" in run.data.tags["stopped"]

    last, _ = start(nodes, tmp_path, *arguments, "--resume")
    assert last.wait(300) == 0, (tmp_path / "log").read_text()
    (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED" and "stopped" not in run.data.tags
    assert int(run.data.tags["ddpm.restarts"]) == 4 and float(run.data.tags["ddpm.wall_time_s"]) > 0
    losses(tmp_path, 400)  # one run, every step once

    alone = tmp_path / "alone"
    alone.mkdir()
    run_job("train", *flags(alone, dataset, steps=400, network=slow(0.0)))
    touched, untouched = last_weights(tmp_path), last_weights(alone)
    difference = float((touched - untouched).norm() / untouched.norm())
    print(f"relative norm of the difference: {difference:.1e}")
    assert difference <= 1e-4
