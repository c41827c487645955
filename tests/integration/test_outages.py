"""A run through a store and an MLflow server that fail all the time ends as one that nothing happened to."""

import contextlib
import uuid
from pathlib import Path

import numpy as np
import pytest

from pipeline.stores.storage import ObjectStore, join_uri, open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.faulty_proxy import Cut, Delay, FaultyProxy, LoseAnswer, LoseRequest, RandomFaults, s3_error
from tests.fixtures_s3 import S3Server
from tests.fixtures_services import free_port, mlflow_server
from tests.integration.jobs import start_job
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

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("nodes"),
]  # for the run that nothing happens to

KINDS = (
    LoseRequest(),
    LoseAnswer(),
    Delay(0.5),
    s3_error("InternalError", 500),
    s3_error("SlowDown", 503),
    Cut(2000),
    Cut(2000, reset=True),
)
SHARE = 0.2
STEPS, INTERVAL = 40, 10


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_run_through_faults_equals_an_undisturbed_one(
    dataset: str, unbroken: Path, ceph_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name, value in ceph_server.environment.items():
        monkeypatch.setenv(name, value)
    place, port = join_uri(ceph_server.uri, uuid.uuid4().hex), free_port()
    copy(open_store(dataset), open_store(join_uri(place, "dataset")))
    checkpoints = CheckpointStore.of_run(join_uri(place, "run"))

    def mlflow() -> contextlib.AbstractContextManager[str]:
        return mlflow_server(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "artifacts"), tmp_path, port=port)

    def num_recorded() -> int:
        return len(list(checkpoints.records()))

    with FaultyProxy(ceph_server.endpoint) as proxy:
        proxy.add(RandomFaults(seed, SHARE, KINDS))
        with mlflow() as uri:
            job = start_job(
                "train",
                *flags(tmp_path, join_uri(place, "dataset"), steps=STEPS, output=join_uri(place, "run"), tracking=uri),
                *HYBRID,
                *CHECKPOINTS,
                "--checkpoint-interval-steps",
                str(INTERVAL),
                log=tmp_path / "log",
                variables={"AWS_ENDPOINT_URL": proxy.endpoint},
            )
            wait_until(lambda: num_recorded() >= 1 or job.poll() is not None)
        wait_until(lambda: num_recorded() >= 2 or job.poll() is not None)
        assert job.poll() is None, (tmp_path / "log").read_text()
        with mlflow():
            assert job.wait(600) == 0, (tmp_path / "log").read_text()
        counts = {kind: proxy.count(kind) for kind in (LoseRequest, LoseAnswer, Delay, Cut)}
        print((tmp_path / "log").read_text(), len(proxy.requests), "requests", counts)

    assert all(counts.values()), "every kind has struck"
    recorded = list(checkpoints.records())
    assert [record.step for record in recorded] == list(range(STEPS, 0, -INTERVAL))
    for record in recorded:
        checkpoints.verify(record)
    assert state_digests(recorded[0]) == digests(unbroken / "run", STEPS)
    np.testing.assert_array_equal(losses(tmp_path, STEPS), losses(unbroken, NUM_STEPS)[:STEPS])
    folders = {info.key.split("/")[0] for info in open_store(checkpoints.root).list("step-")}
    assert folders == {record.prefix for record in recorded}, "nothing is left of attempts"


def copy(source: ObjectStore, target: ObjectStore) -> None:
    for info in source.list():
        target.write(info.key, source.read(info.key))
