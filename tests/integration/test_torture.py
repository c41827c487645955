"""A run through the faults of a seed, at moments of that seed, ends as one that nothing happened to."""

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.stores.storage import join_uri, open_store
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.faulty_proxy import FaultyProxy, LoseAnswer, s3_error
from tests.fixtures_s3 import S3Server
from tests.fixtures_services import free_port, mlflow_server
from tests.integration.jobs import TINY, slow_tiny
from tests.integration.nodes import Nodes, ending, start
from tests.integration.training_runs import (
    CHECKPOINTS,
    HYBRID,
    NUM_STEPS,
    digests,
    flags,
    losses,
    state_digests,
    wait_until,
)
from tests.processes import kill_with_its_machine

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.xdist_group("nodes")]

KINDS = ("worker", "raylet", "store", "answers", "mlflow", "sigterm", "driver")
LONG = [
    pytest.param(seed, 300, 10, KINDS, is_elastic, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
    for seed in range(10)
    for is_elastic in (False, True)
]


class Torture:
    """A run, and what is done to it."""

    def __init__(
        self,
        nodes: Nodes,
        proxy: FaultyProxy,
        folder: Path,
        place: str,
        port: int,
        interval: int,
        arguments: Sequence[str],
        storage: Mapping[str, str],
    ) -> None:
        self._nodes, self._proxy, self._folder, self._storage = nodes, proxy, folder, storage
        self._interval = interval
        self._arguments = [*arguments, "--checkpoint-interval-steps", str(interval), "--lease-s", "4"]
        self.checkpoints = CheckpointStore.of_run(place, print)
        self.damaged: CheckpointRecord | None = None
        self._slow_file = folder / "slow"
        self._mlflow, self._port = contextlib.ExitStack(), port
        self._returning = threading.Thread(target=self._start_mlflow)
        self._start_mlflow()
        self._begin()

    def _start_mlflow(self) -> None:
        self._mlflow.enter_context(
            mlflow_server(
                f"sqlite:///{self._folder / 'mlflow.db'}", str(self._folder / "mlartifacts"), self._folder,
                port=self._port,
            )
        )  # fmt: skip

    def _begin(self, *more: str) -> None:
        self.job, self.log = start(
            self._nodes, self._folder, *self._arguments, *more, patience_minutes=2, variables=self._storage
        )

    def _go_on(self) -> None:
        """Submit it again, until it trains: one that starts bears the store's absence for a minute, and then leaves."""
        stood = self.step
        self._begin("--resume")
        self.reach(stood + 1)

    @property
    def step(self) -> int:
        newest = self.checkpoints.newest()
        return newest.step if newest else 0

    def reach(self, step: int) -> None:
        """Wait until a checkpoint of that step, or a later one, stands."""
        wait_until(lambda: self.step >= step or self.job.poll() is not None, pause_s=0.1)
        assert self.job.poll() is None, self.log.text

    def strike(self, kind: str, *, is_elastic: bool) -> None:
        match kind:
            case "worker":
                self._nodes.kill_worker()
                self.log.wait_for("going on from step ")
            case "raylet":
                if is_elastic:
                    self._slow_file.write_text("0.5")  # or the run may end before the node is back
                self._nodes.kill_raylet()
                if is_elastic:
                    self.log.wait_for("training with 1 of 2 workers")
                    self.reach(self.step + self._interval)
                    self._nodes.keep(1)
                    self.log.wait_for("there is room for 2 workers")
                else:
                    self._nodes.keep(1)
                self.log.wait_for("training with 2 of 2 workers")
                self._slow_file.unlink(missing_ok=True)
            case "store":
                self._proxy.add(s3_error("SlowDown", 503), times=20)
            case "answers":
                self._proxy.add(LoseAnswer(), method="PUT", times=3)
            case "mlflow":
                self._mlflow.close()
                self.reach(self.step + 2 * self._interval)
                self._returning.start()  # the run does not wait for it, and nor do the next faults
            case "sigterm":
                self.job.send_signal(signal.SIGTERM)
                assert self.job.wait(120) == 3, self.log.text
                self._go_on()
            case "driver":
                killed = self.job
                kill_with_its_machine(killed)
                self.damaged = self._damage_newest()
                self._go_on()
                assert f"process {killed.pid} on " in self.log.text
                assert "has not renewed its lease for 4 s; taking over" in self.log.text
                assert f"checkpoint of step {self.damaged.step} is damaged" in self.log.text

    def _damage_newest(self) -> CheckpointRecord:
        """Alter the last bit of the newest checkpoint: a run goes on from the one before."""
        newest, store = self.checkpoints.newest(), open_store(self.checkpoints.root)
        assert newest is not None
        key = f"{newest.prefix}/train_weights.safetensors"
        data = bytearray(store.read(key))
        data[-1] ^= 1
        store.write(key, bytes(data))
        return newest

    def finish(self) -> None:
        assert self.job.wait(300) == 0, self.log.text

    def close(self) -> None:
        with ending(self.job):
            if self._returning.ident is not None:
                self._returning.join()
            self._mlflow.close()


@pytest.mark.parametrize(
    ("seed", "steps", "interval", "kinds", "is_elastic"),
    [(0, NUM_STEPS, 5, ("answers", "worker", "driver"), False), *LONG],
)
def test_a_run_through_faults_of_all_kinds(
    seed: int, steps: int, interval: int, kinds: Sequence[str], is_elastic: bool, nodes: Nodes, proxy: FaultyProxy,
    storage: dict[str, str], s3_server: S3Server, dataset: str, undisturbed: Callable[[int], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With two workers throughout: the same weights, bit by bit. With one for a while: but for the order of sums."""
    for name, value in s3_server.environment.items():  # the run alone goes by way of the proxy
        monkeypatch.setenv(name, value)
    alone = undisturbed(steps)
    drawn = random.Random(seed)
    moments = sorted(drawn.sample(range(2 * interval, steps - 5 * interval), len(kinds)))
    struck = list(zip(moments, drawn.sample(list(kinds), len(kinds))))
    print(f"seed {seed}:", ", ".join(f"{kind} at {moment}" for moment, kind in struck))
    port = free_port()
    place = join_uri(s3_server.uri, f"torture-{steps}-{seed}-{is_elastic}")
    network = slow_tiny(tmp_path / "slow") if is_elastic else TINY
    arguments = [
        *flags(tmp_path, dataset, steps=steps, network=network, output=place, tracking=f"http://127.0.0.1:{port}"),
        *HYBRID,
        *CHECKPOINTS,
    ]
    if is_elastic:
        arguments += ["--workers.min-workers", "1", "--workers.resize-interval-s", "1"]
    run = Torture(nodes, proxy, tmp_path, place, port, interval, arguments, storage)
    try:
        for moment, kind in struck:
            run.reach(moment)
            run.strike(kind, is_elastic=is_elastic)
        run.finish()
    finally:
        run.close()
        proxy.clear()

    newest = run.checkpoints.newest()
    assert newest is not None
    final = state_digests(newest)
    if is_elastic:
        (folder,) = (alone / "run" / "checkpoints").glob(f"step-{steps:09d}-*")
        touched = safetensors.torch.load(run.checkpoints.read(newest, "train_weights.safetensors"))
        untouched = safetensors.torch.load_file(folder / "train_weights.safetensors")
        vectors = [torch.cat([t[name].double().flatten() for name in sorted(t)]) for t in (touched, untouched)]
        difference = float((vectors[0] - vectors[1]).norm() / vectors[1].norm())
        print(f"relative norm of the difference: {difference:.1e}")
        assert difference <= 1e-4
        losses(tmp_path, steps)
    else:
        assert {"train_weights.safetensors", "ema-500.safetensors", "power-ema-0.1.safetensors"} < final.keys()
        assert final == digests(alone / "run", steps)
        snapshots = {info.key.split("/")[0] for info in open_store(join_uri(place, "ema_snapshots")).list()}
        assert snapshots == {path.name for path in (alone / "run" / "ema_snapshots").iterdir()}
        assert len(snapshots) == steps / 4
        np.testing.assert_array_equal(losses(tmp_path, steps), losses(alone, steps))
    recorded = list(run.checkpoints.records())
    for record in recorded:
        if record != run.damaged:  # which stays where it is unless the run comes by that very step
            run.checkpoints.verify(record)
    named = {record.prefix for record in recorded}
    left = {info.key.split("/")[0] for info in open_store(run.checkpoints.root).list("step-")} - named
    killed = sum(kind in ("driver", "worker", "raylet", "sigterm") for kind in kinds)
    assert len(left) <= killed + ("driver" in kinds), "of those killed, and the one that was damaged"
