"""`ray job submit` to a cluster of two nodes, with an MLflow server on Postgres and an S3 server."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.stores.lease import LEASE_KEY
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from tests.fixtures_services import RayCluster, mlflow_server
from tests.integration.jobs import EVERY_STEP, ROOT, TINY, records
from tests.integration.training_runs import NO_PERIODIC_CHECKPOINTS, flags, runs_in, trained_to, wait_until
from tests.pipeline.webdataset_reader import read_with_webdataset

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("submit")]  # one cluster for all


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


def test_ray_job_stop_makes_a_checkpoint_first(ray_cluster: RayCluster, dataset: str, tmp_path: Path) -> None:
    arguments = [*flags(tmp_path, dataset, steps=100_000), *NO_PERIODIC_CHECKPOINTS]
    submit(ray_cluster, {}, "train", *arguments, and_leave="to-be-stopped")
    wait_until(lambda: trained_to(tmp_path) > 5, pause_s=0.2)
    stopped = subprocess.run(
        ray_job(ray_cluster, "stop", "to-be-stopped"), env=ray_cluster.environment, capture_output=True, text=True
    )
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout + stopped.stderr
    (record,) = records(tmp_path / "run")
    last = record["step"]
    (run,) = runs_in(tmp_path)
    assert run.info.status == "KILLED"
    assert run.data.tags["stopped"].startswith(f"at step {last}, checkpoint ") and "SIGTERM" in run.data.tags["stopped"]
    assert json.loads((tmp_path / "run" / LEASE_KEY).read_bytes())["released"] is True


def test_train_and_sample_on_a_cluster(
    ray_cluster: RayCluster, postgres_uri: str, s3_bucket_environment: dict[str, str], tmp_path: Path
) -> None:
    bucket, storage = s3_bucket_environment["bucket"], dict(s3_bucket_environment)
    storage.pop("bucket")
    with mlflow_server(postgres_uri, f"s3://{bucket}/mlflow", tmp_path, environment=storage) as tracking:
        environment = storage | {"MLFLOW_TRACKING_URI": tracking}
        submit(ray_cluster, environment, "prepare_data", "--dataset", f"s3://{bucket}/digits")
        # Three workers do not fit on one node.
        trained = submit(
            ray_cluster, environment, "train", "--dataset", f"s3://{bucket}/digits", "--output", f"s3://{bucket}/run",
            "--steps", "40", "--checkpoint-interval-steps", "20", "--workers.num-workers", "3", *TINY, *EVERY_STEP,
        )  # fmt: skip
        assert "registered models:/ddpm-digits/1" in trained
        sampling = [
            "--output", f"s3://{bucket}/samples", "--images-per-class", "10", "--shard-size", "25",
            "--batch-size", "25", "--sampler.num-steps", "5",
        ]  # fmt: skip
        made = submit(
            ray_cluster, environment, "sample", "--model", "models:/ddpm-digits@candidate",
            *sampling,
        )  # fmt: skip
        assert "100 images (100 made now)" in made
        again = submit(
            ray_cluster, environment, "sample", "--model", "models:/ddpm-digits/1",
            *sampling,
        )  # fmt: skip
        assert "nothing written" in again

        client = connect(tracking)
        version = client.get_model_version_by_alias("ddpm-digits", "candidate")
        assert version.version in (1, "1")
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["workers.num_workers"] == "3"
        checkpoints = client.search_logged_models([run.info.experiment_id], filter_string="name LIKE 'step-%'")
        assert {model.tags["ddpm.uri"].split("/")[-1][:14] for model in checkpoints} == {
            "step-000000020",
            "step-000000040",
        }

    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.items():
            patch.setenv(name, value)
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
