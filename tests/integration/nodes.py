"""A Ray cluster on this machine whose nodes come, go and are taken away; nothing of it joins the test's own process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from ray.cluster_utils import Cluster

from pipeline.stores.patience import PATIENCE_VARIABLE
from tests.fixtures_services import free_port
from tests.integration.jobs import start_job
from tests.integration.training_runs import wait_until
from tests.processes import environment

_WORKER = "ray::RayTrainWorker"
# A Ray that this process started has put into its environment that it asks for a token; the nodes do not.
_OPEN = {"RAY_AUTH_MODE": "disabled"}


class Nodes:
    """A head and other nodes, one logical CPU each, in whose environment are some variables."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {**variables, **_OPEN}
        with patch.dict(os.environ, self._variables):
            self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments(dashboard_port=free_port()))
        self._others: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def variables(self) -> dict[str, str]:
        """With which other processes join."""
        return {"RAY_ADDRESS": self.address, **_OPEN}

    @property
    def newest_node(self) -> str:
        """Ray's id of the node that came last."""
        return str(self._others[-1].node_id)

    def keep(self, number: int) -> None:
        """Add nodes, or kill some, until there are so many beside the head."""
        while len(self._others) > number:
            self.kill_raylet()
        while len(self._others) < number:
            with patch.dict(os.environ, self._variables):
                self._others.append(self._cluster.add_node(**self._arguments()))

    def kill_raylet(self) -> None:
        """SIGKILL to the raylet of the oldest node but the head; its workers follow it."""
        self._cluster.remove_node(self._others.pop(0), allow_graceful=False)

    def drain(self, deadline_s: int) -> None:
        """Give notice that the oldest node but the head is taken away."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the market wants it back"]
        node = self._others[0].node_id
        command = [*ray, "--node-id", node, *why, "--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(command, check=True, capture_output=True, env=environment() | _OPEN)

    def kill_worker(self) -> None:
        """SIGKILL to a training worker, not that of the head's node if there is another."""
        workers = [process for process in self.processes() if process.name().startswith(_WORKER[:15])]
        workers[0].kill()

    def processes(self) -> list[psutil.Process]:
        """All that raylets have started, the head's last."""
        return [
            process
            for node in [*self._others, self._cluster.head_node]
            for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        ]

    def shutdown(self) -> None:
        self._cluster.shutdown()

    @staticmethod
    def _arguments(**more: Any) -> dict[str, Any]:
        # A node's agent listens on a fixed port unless told: another Ray on this machine has it.
        return {
            "num_cpus": 1, "object_store_memory": 200_000_000,
            "dashboard_agent_listen_port": free_port(), **more,
        }  # fmt: skip


def start(
    nodes: Nodes,
    folder: Path,
    *arguments: str,
    patience_minutes: float = 0.1,
    variables: Mapping[str, str] | None = None,
) -> "tuple[subprocess.Popen[str], Log]":
    """Start training on the nodes, with variables; what it prints goes to `log` in the folder.

    A hang must take longer than the patience with which servers are waited for.
    """
    log = folder / "log"
    quick = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", PATIENCE_VARIABLE: str(patience_minutes)}
    here = {**nodes.variables, **quick, **(variables or {})}
    job = start_job("train", *arguments, log=log, variables=here)
    return job, Log(job, log)


class Log:
    """What a job has printed, read from where one last was."""

    def __init__(self, job: "subprocess.Popen[str]", path: Path) -> None:
        self._job, self._path, self._seen = job, path, 0

    @property
    def text(self) -> str:
        return self._path.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until a job prints something, after what was waited for before."""
        wait_until(lambda: text in self._path.read_text()[self._seen :] or self._job.poll() is not None)
        whole = self.text
        assert text in whole[self._seen :], f"{text!r} was not said:\n{whole}"
        self._seen = whole.index(text, self._seen) + len(text)

    def seconds_to(self, text: str) -> float:
        """Seconds that `wait_for` took."""
        began_s = time.monotonic()
        self.wait_for(text)
        return time.monotonic() - began_s


@contextlib.contextmanager
def ending(job: "subprocess.Popen[str]") -> Iterator[None]:
    """No job outlives its test."""
    try:
        yield
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()
