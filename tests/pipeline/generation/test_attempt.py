"""What an attempt leaves behind: its share in the ledger, and a run in MLflow; the images do without both."""

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest

from ddpm import DDIM
from pipeline.cluster import ClusterConfig
from pipeline.errors import PipelineError
from pipeline.generation.attempt import Attempt
from pipeline.generation.output.commits import Commit, read_record
from pipeline.generation.output.ledger import LEDGER_KEY, Ledger, read_ledger
from pipeline.generation.pool.actors import Actor, Actors
from pipeline.generation.pool.pool_config import PoolStatistics
from pipeline.generation.sample import CONTACT_SHEET_KEY, sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.models.model_files import read_model_files
from pipeline.models.registration import register_model
from pipeline.models.registry import resolve_model
from pipeline.models.version_records import sampling_rates
from pipeline.stores.storage import open_store
from pipeline.tracking import tracking as tracking_module
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.pipeline.registered_models import download_artifacts
from tests.pipeline.runs_in_process import snapshot
from tests.pipeline.tiny_models import write_model, write_own_model


def config_of(model: str, output: Path, **changes: object) -> SampleConfig:
    """60 images in four shards of 15, each of 4 evaluations."""
    config = SampleConfig(
        model=model,
        output=str(output),
        images_per_class=20,
        sampler=DDIM(num_steps=4),
        shard_size=15,
        batch_size=4,
        num_actors=1,
        gallery_images=0,
        cluster=ClusterConfig(num_cpus=2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def register(model: str, folder: Path) -> TrackingConfig:
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    run = TrackingRun.open(tracking, new_run_key(), "train")
    register_model(run, read_model_files(open_store(model)), "tiny")
    run.finish()
    return tracking


def statistics(kind: str = "cpu") -> PoolStatistics:
    done = PoolStatistics(num_made=1, num_retries=2, num_lost=1, making_s=3.0)
    of_kind = done.kind(kind)
    of_kind.actor_s, of_kind.busy_s, of_kind.num_images, of_kind.num_bytes = 5.0, 3.0, 15, 1000
    return done


def ledger_of(config: SampleConfig) -> Ledger:
    found = read_ledger(resolve_job(config).store)
    assert found is not None
    return found


# ---------------------------------------------------------------- without Ray


def test_devices_are_what_is_paid_for(tmp_path: Path) -> None:
    """Two pools of 15 images; an actor of two CPUs holds two devices."""
    job = resolve_job(config := config_of(write_model(tmp_path / "model"), tmp_path / "out", cpus_per_actor=2))
    attempt = Attempt(config, job)
    for _ in range(2):
        attempt.add_pool(statistics())
    share = attempt.share()
    assert (share.device_s, share.num_images, share.num_bytes) == (20.0, 30, 2000)
    assert (share.num_retries, share.num_lost, share.making_s) == (4, 2, 6.0)
    assert (share.images_per_s, share.evaluations_per_s) == (5.0, 20.0)
    assert share.devices["cpu"].evaluations_per_actor_s == 20.0


@pytest.mark.parametrize("error", [PipelineError("broken"), KeyboardInterrupt()])
def test_a_broken_attempt_counts_and_one_without_work_does_not(tmp_path: Path, error: BaseException) -> None:
    job = resolve_job(config := config_of(write_model(tmp_path / "model"), tmp_path / "out"))
    with pytest.raises(type(error)), Attempt(config, job):
        raise error
    assert not (tmp_path / "out").exists()
    with pytest.raises(type(error)), Attempt(config, job) as attempt:
        attempt.begin()
        attempt.add_pool(statistics())
        raise error
    total = ledger_of(config)
    assert (total.num_attempts, total.num_broken, total.num_images) == (1, 1, 15)


def test_a_ledger_that_cannot_be_written_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = resolve_job(config := config_of(write_model(tmp_path / "model"), tmp_path / "out"))
    job.store.write(LEDGER_KEY, b"<html>")
    with Attempt(config, job) as attempt:
        attempt.begin()
    assert job.store.read(LEDGER_KEY) == b"<html>"
    said = capsys.readouterr().out
    assert "what this attempt cost is not in " in said and LEDGER_KEY in said


def test_mlflow_has_one_run_for_all_attempts(tmp_path: Path) -> None:
    tracking = register(write_model(tmp_path / "model"), tmp_path)
    config = config_of("models:/tiny/1", tmp_path / "out", tracking=tracking)
    job = resolve_job(config)
    with pytest.raises(PipelineError), Attempt(config, job) as broken:
        broken.begin()
        broken.add_pool(statistics())
        raise PipelineError("broken")
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    ours = "tags.`ddpm.run_type` = 'generation'"
    (failed,) = client.search_runs(["1"], filter_string=ours)
    assert failed.info.status == "FAILED" and failed.data.metrics["images"] == 15
    job.store.write(CONTACT_SHEET_KEY, b"a sheet")
    with Attempt(config, job) as whole:
        whole.begin()
        whole.add_pool(statistics())
        whole.add_pool(statistics("NVIDIA H100"))
        whole.published(contact_sheet_key=CONTACT_SHEET_KEY, gallery_key="index.html")
    (run,) = client.search_runs(["1"], filter_string=ours)
    assert run.info.run_id == failed.info.run_id and run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert (metrics["images"], metrics["retries"], metrics["nodes_lost"], metrics["attempts"]) == (45, 6, 3, 2)
    assert metrics["img_nfe_per_s"] == 20.0 and metrics["images_per_s"] == 5.0
    assert metrics["device_hours"] == pytest.approx(15 / 3600)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "images")] == [15, 45]
    version = resolve_model("models:/tiny/1", tracking).version
    assert version is not None
    tags, params = run.data.tags, run.data.params
    assert (tags["ddpm.model"], tags["ddpm.model_digest"]) == (version.uri, job.spec.model_digest)
    assert tags["ddpm.gallery"] == f"{job.store.uri}/index.html" and tags["ddpm.manifest"].endswith("/manifest.json")
    assert (params["sampler"], params["sampler.num_steps"], params["images"]) == ("ddim", "4", "60")
    assert params["spec_digest"] == job.spec.digest and params["sampler.guidance_scale"] == "1.0"
    model_id = client.get_model_version("tiny", "1").tags["ddpm.model_id"]
    inputs = client.get_run(run.info.run_id).inputs
    assert [one.model_id for one in inputs.model_inputs] == [model_id], "once, of two attempts"
    handle = TrackingRun(f"sqlite:///{tmp_path}/mlflow.db", run.info.run_id)
    assert download_artifacts(handle, CONTACT_SHEET_KEY, tmp_path / "got").read_bytes() == b"a sheet"
    rates = {rate.device: rate for rate in sampling_rates(version)}
    assert {kind: rate.evaluations_per_s for kind, rate in rates.items()} == {"cpu": 20.0, "NVIDIA H100": 20.0}
    assert (rates["cpu"].batch_size, rates["cpu"].precision, rates["cpu"].busy_s) == (4, "float32", 3.0)
    assert "as measured on cpu over 3.0 s" in dict(describe_plan(config))["time"]


def test_mlflow_away_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes after the model was looked up: the run is made and counted all the same."""
    monkeypatch.setattr(tracking_module, "_CLOSE_S", 1.0)
    model = write_model(tmp_path / "model")
    tracking = register(model, tmp_path)
    found = resolve_model("models:/tiny/1", tracking)
    gone = TrackingConfig(uri="http://127.0.0.1:9")
    config = config_of("models:/tiny/1", tmp_path / "out", tracking=gone)
    with Attempt(config, resolve_job(config, found)) as attempt:
        attempt.begin()
        attempt.add_pool(statistics())
        attempt.published(contact_sheet_key="missing.png", gallery_key="")
    said = capsys.readouterr().out
    assert "MLflow at http://127.0.0.1:9 gives no answer" in said and "are lost" in said
    total = read_ledger(resolve_job(config, found).store)
    assert total is not None and total.num_images == 15


# ---------------------------------------------------------------- on Ray


@pytest.mark.usefixtures("ray_session")
def test_the_ledger_sums_an_interrupted_attempt_and_the_one_that_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network takes its time as long as a file says so; Ctrl-C comes when the driver has taken a shard."""
    pause = tmp_path / "pause"
    pause.write_text("0.2")
    model = write_own_model(tmp_path / "own", monkeypatch, "slow", str(pause))
    config = config_of(model, tmp_path / "out", trust_model_code=True)
    taken, count = threading.Event(), Actors.count

    def count_and_tell(self: Actors, actor: Actor, commit: Commit) -> None:
        count(self, actor, commit)
        taken.set()

    monkeypatch.setattr(Actors, "count", count_and_tell)
    other = threading.Thread(target=lambda: (taken.wait(), os.kill(os.getpid(), signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background ignores it
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(config)
    finally:
        other.join()
        signal.signal(signal.SIGINT, before)
    first = ledger_of(config)
    assert (first.num_attempts, first.num_broken) == (1, 1) and first.num_images in (15, 30)
    assert first.device_s >= first.devices["cpu"].busy_s > 0 and not list(tmp_path.glob("out/*/manifest.json"))

    pause.unlink()
    result = sample(config)
    total = ledger_of(config)
    assert (total.num_attempts, total.num_broken) == (2, 1)
    assert total.num_images == first.num_images + result.num_made
    sizes = [read_record(result.store, index).size_bytes for index in range(4)]
    assert total.num_bytes == sum(sizes[: first.num_images // 15]) + sum(sizes[-(result.num_made // 15) :])
    assert total.device_s > first.device_s
    assert total.making_s > first.making_s > 4 * 4 * 0.2, "a shard of four batches, each of four evaluations"
    assert total.devices["cpu"].busy_s == pytest.approx(total.making_s, rel=0.05), "one actor: all of it is its own"
    second_s = total.making_s - first.making_s
    assert result.evaluations_per_s == pytest.approx(result.num_made * 4 / second_s)
    before = snapshot(tmp_path / "out")
    assert sample(config).evaluations_per_s == 0
    assert snapshot(tmp_path / "out") == before
