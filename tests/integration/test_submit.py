"""`ray job submit` to a cluster of two nodes, with an MLflow server on Postgres and an S3 server."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.stores.lease import LEASE_KEY
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.fixtures_services import RayCluster, mlflow_server
from tests.integration.jobs import EVERY_STEP, ROOT, TINY
from tests.integration.training_runs import NO_PERIODIC_CHECKPOINTS, wait_until
from tests.pipeline.webdataset_reader import read_with_webdataset

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.xdist_group("submit")]  # one cluster for all


def ray_job(cluster: RayCluster, verb: str, *arguments: str) -> list[str]:
    address = ["--address", cluster.job_address]
    return [str(cluster.python), "-m", "ray.scripts.scripts", "job", verb, *address, *arguments]


def submit(
    cluster: RayCluster, environment: dict[str, str], job: str, *flags: str, and_leave: str | None = None
) -> str:
    """What a job has printed when it is done; or, with a name to go by, what submitting it has."""
    leaving = [] if and_leave is None else ["--no-wait", "--submission-id", and_leave]
    variables = json.dumps({"env_vars": environment})
    command = ray_job(
        cluster, "submit", "--working-dir", ".", "--runtime-env-json", variables, *leaving,
        "--", "python", f"jobs/{job}.py", *flags,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
        output = done.stdout + done.stderr
        # The head answers before its agent, which starts jobs, has come up; on a busy machine long before.
        if "No available agent to submit job" not in output or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0 and ("succeeded" in output or and_leave is not None), output[-6000:]
    return output


def test_training_is_stopped_gone_on_with_and_sampled_on_a_cluster(
    ray_cluster: RayCluster,
    postgres_uri: str,
    s3_bucket_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket, storage = s3_bucket_environment["bucket"], dict(s3_bucket_environment)
    storage.pop("bucket")
    for name, value in storage.items():
        monkeypatch.setenv(name, value)
    output = open_store(f"s3://{bucket}/run")
    checkpoints = CheckpointStore.of_run(output.uri)
    # Three workers do not fit on one node.
    training = [
        "--dataset", f"s3://{bucket}/digits", "--output", output.uri, "--workers.num-workers", "3",
        *TINY, *EVERY_STEP, *NO_PERIODIC_CHECKPOINTS,
    ]  # fmt: skip
    with mlflow_server(postgres_uri, f"s3://{bucket}/mlflow", tmp_path, environment=storage) as tracking:
        environment, client = storage | {"MLFLOW_TRACKING_URI": tracking}, connect(tracking)
        submit(ray_cluster, environment, "prepare_data", "--dataset", f"s3://{bucket}/digits")
        submit(ray_cluster, environment, "train", *training, "--steps", "100000", and_leave="to-be-stopped")

        def run_id() -> str | None:
            there = output.stat("run.json") is not None
            return json.loads(output.read("run.json"))["run_id"] if there else None

        def trained_to() -> int:
            found = run_id()
            return 0 if found is None else max((e.step for e in client.get_metric_history(found, "loss")), default=0)

        wait_until(lambda: trained_to() > 5, pause_s=0.5)
        stopped = subprocess.run(
            ray_job(ray_cluster, "stop", "to-be-stopped"), env=ray_cluster.environment, capture_output=True, text=True
        )
        assert stopped.returncode == 0 and "was stopped" in stopped.stdout + stopped.stderr
        told = subprocess.run(
            ray_job(ray_cluster, "logs", "to-be-stopped"), env=ray_cluster.environment, capture_output=True, text=True
        )
        (record,) = checkpoints.records()
        assert f"stopped: at step {record.step}, checkpoint {checkpoints.uri(record)}" in told.stdout
        run = client.get_run(run_id())
        assert run.info.status == "KILLED" and run.data.params["workers.num_workers"] == "3"
        assert run.data.tags["stopped"].startswith(f"at step {record.step}, checkpoint ")
        assert "SIGTERM" in run.data.tags["stopped"]
        assert json.loads(output.read(LEASE_KEY))["released"] is True

        steps = record.step + 10
        trained = submit(ray_cluster, environment, "train", *training, "--resume", "--steps", str(steps))
        assert "registered models:/ddpm-digits/1" in trained
        made = submit(
            ray_cluster, environment, "sample", "--model", "models:/ddpm-digits@candidate",
            "--output", f"s3://{bucket}/samples", "--images-per-class", "10", "--shard-size", "25",
            "--batch-size", "25", "--sampler.num-steps", "5",
        )  # fmt: skip
        assert "100 images (100 made now)" in made

        version = client.get_model_version_by_alias("ddpm-digits", "candidate")
        assert version.version in (1, "1") and version.run_id == run.info.run_id
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED" and "stopped" not in run.data.tags
        assert run.data.tags["ddpm.restarts"] == "1"
        logged = [entry.step for entry in client.get_metric_history(version.run_id, "loss")]
        assert sorted(logged) == list(range(1, steps + 1)), "every step once"
        linked = client.search_logged_models([run.info.experiment_id], filter_string="name LIKE 'step-%'")
        assert {model.tags["ddpm.uri"].split("/")[-1][:14] for model in linked} == {
            f"step-{step:09d}" for step in (record.step, steps)
        }

    store = open_store(f"s3://{bucket}/samples")
    tars = [info.key for info in store.list() if info.key.endswith(".tar")]
    assert len(tars) == 4
    paths = []
    for number, key in enumerate(tars):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(store.read(key))
    samples = read_with_webdataset(paths)
    assert sorted(sample["json"]["sample_id"] for sample in samples) == list(range(100))
    assert all(sample["cls"] == sample["json"]["sample_id"] % 10 for sample in samples)
