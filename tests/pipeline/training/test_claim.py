"""Whose an output folder is: claimed once, gone on with when asked, refused otherwise; nothing half claimed is left."""

import dataclasses
from pathlib import Path

import pytest

from jobs import train as train_job
from jobs.cli import run_job
from pipeline.config_io import to_json
from pipeline.errors import ConfigError, LeaseLostError, OutputExistsError, TrackingUnavailableError
from pipeline.models.model_files import ModelCard
from pipeline.presets import digits
from pipeline.stores.lease import LEASE_KEY, LeaseRecord, hold_lease
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun
from pipeline.training.claim import claim
from pipeline.training.run_record import RUN_RECORD, RunRecord, read_run_record
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_plan import TrainPlan, describe_plan, load_plan
from tests.pipeline.small_datasets import make_dataset
from tests.pipeline.storage_checks import check_one_line, keys_of
from tests.pipeline.training.small_runs import MODEL, make_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    make_dataset(tmp_path / "dataset", [200])
    return dataclasses.replace(
        digits().train,
        dataset=str(tmp_path / "dataset"),
        output=str(tmp_path / "run"),
        class_conditional=False,
        label_drop=0.0,
        data=dataclasses.replace(digits().train.data, lanes=2),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )


@pytest.fixture
def plan(config: TrainConfig) -> TrainPlan:
    return load_plan(config)


@pytest.fixture
def store(config: TrainConfig) -> ObjectStore:
    return open_store(config.output)


def claimed(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore, *, is_finished: bool = False
) -> tuple[RunRecord, TrackingRun]:
    with hold_lease(store, duration_s=1000) as lease:
        return claim(config, plan, store, lease, is_finished=is_finished)


def test_a_new_run_is_claimed_with_its_mlflow_run(config: TrainConfig, plan: TrainPlan, store: ObjectStore) -> None:
    record, run = claimed(config, plan, store)
    run.close()
    assert record.run_key and not record.has_checkpoints
    assert read_run_record(store) == dataclasses.replace(record, run_id=run.run_id)
    found = connect(run.uri).get_run(run.require_id())
    assert (found.data.tags["ddpm.run_key"], found.data.params["seed"]) == (record.run_key, "0")


def test_a_run_is_gone_on_with_only_if_asked_and_unchanged(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore
) -> None:
    _, first = claimed(config, plan, store)
    first.finish("KILLED")
    with pytest.raises(OutputExistsError, match="--resume"):
        claimed(config, plan, store)
    for change, name in (({"seed": 7}, "seed"), ({"fork_from": "models:/x/1"}, "fork_from")):
        with pytest.raises(ConfigError) as caught:
            claimed(dataclasses.replace(config, resume=True, **change), plan, store)  # type: ignore[arg-type]
        check_one_line(caught.value, f"{name}: the run in {store.uri} has ", "--fork-from")
    _, again = claimed(dataclasses.replace(config, resume=True), plan, store)
    again.close()
    assert again.run_id == first.run_id
    assert connect(first.uri).get_run(first.require_id()).info.status == "RUNNING"


def test_a_run_whose_mlflow_run_is_gone_goes_on_in_a_new_one(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore
) -> None:
    record, first = claimed(config, plan, store)
    first.finish("KILLED")
    connect(first.uri).delete_run(first.require_id())
    with pytest.raises(ConfigError) as caught:
        claimed(dataclasses.replace(config, resume=True), plan, store)
    check_one_line(caught.value, str(first.run_id), "--new-run")
    _, new = claimed(dataclasses.replace(config, resume=True, new_run=True), plan, store)
    new.close()
    assert new.run_id not in (None, first.run_id)
    assert connect(new.uri).get_run(new.require_id()).data.tags["ddpm.continues"] == first.run_id
    stored = read_run_record(store)
    assert (stored.run_id, stored.identity) == (new.run_id, record.identity) and stored.run_key != record.run_key
    _, again = claimed(dataclasses.replace(config, resume=True), plan, store)
    again.close()
    assert again.run_id == new.run_id


def test_what_mlflow_refuses_leaves_nothing_claimed(config: TrainConfig, plan: TrainPlan, store: ObjectStore) -> None:
    _, run = claimed(
        dataclasses.replace(config, output=f"{config.output}-first"), plan, open_store(f"{store.uri}-first")
    )
    run.close()
    client = connect(run.uri)
    client.delete_experiment(client.get_run(run.require_id()).info.experiment_id)
    with pytest.raises((ConfigError, TrackingUnavailableError), match="was deleted"):
        claimed(config, plan, store)
    assert RUN_RECORD not in keys_of(store)


def test_a_run_that_is_lost_meanwhile_is_left_to_the_other(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is taken over while MLflow is asked, and MLflow refuses: the record is not ours to remove."""

    def refused_late(*_: object, **__: object) -> TrackingRun:
        found = store.read_versioned(LEASE_KEY)
        theirs = LeaseRecord(token="theirs", holder="process 1 on elsewhere", duration_s=1000)
        assert store.replace(LEASE_KEY, to_json(theirs), found.etag) is not None
        raise TrackingUnavailableError("refused")

    monkeypatch.setattr(TrackingRun, "open", refused_late)
    with pytest.raises(LeaseLostError):
        claimed(config, plan, store)
    assert RUN_RECORD in keys_of(store)


def test_checkpoints_of_nobodys_are_not_adopted(config: TrainConfig, plan: TrainPlan, store: ObjectStore) -> None:
    make_run(Path(config.output), steps=1, interval=0)
    store.delete(RUN_RECORD)
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match=r"holds checkpoints and no run\.json"):
            claimed(dataclasses.replace(config, resume=resume), plan, store)
    assert RUN_RECORD not in keys_of(store)


def test_a_new_run_that_is_refused_leaves_the_old_one(config: TrainConfig, plan: TrainPlan, store: ObjectStore) -> None:
    _, first = claimed(config, plan, store)
    first.finish("KILLED")
    before = read_run_record(store)
    client = connect(first.uri)
    client.delete_experiment(client.get_run(first.require_id()).info.experiment_id)
    with pytest.raises((ConfigError, TrackingUnavailableError), match="was deleted"):
        claimed(dataclasses.replace(config, resume=True, new_run=True), plan, store)
    assert read_run_record(store) == before


def test_the_plan_of_a_fork_reads_its_model(config: TrainConfig, tmp_path: Path) -> None:
    seven = dataclasses.replace(MODEL, num_classes=7)
    make_run(tmp_path / "other", steps=1, interval=0, card=ModelCard(config=seven))
    (checkpoint,) = (tmp_path / "other" / "checkpoints").glob("step-*")
    fork = dataclasses.replace(
        config, network=seven.network, schedule=seven.schedule, fork_from=str(checkpoint), class_conditional=True
    )
    assert dict(describe_plan(fork))["begins with"] == f"the weights of {checkpoint}"
    with pytest.raises(ConfigError, match="do not fit"):
        describe_plan(dataclasses.replace(fork, class_conditional=False))
    assert not Path(config.output).exists()


def test_a_driver_leaves_an_output_where_another_works(
    config: TrainConfig, store: ObjectStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(config.output).parent)
    flags = ["--dataset", "dataset", "--output", "run", "--no-class-conditional", "--label-drop", "0"]
    with hold_lease(store, duration_s=2):
        assert run_job(train_job.JOB, flags) == 1
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert line.startswith(f"error: {store.uri}: process ") and "works here at this moment" in line
        assert run_job(train_job.JOB, [*flags, "--if-held", "leave"]) == 0
        shown = capsys.readouterr()
        assert shown.err == "" and shown.out.splitlines()[-1].startswith(f"left: {store.uri}: process ")
        assert keys_of(store) == [LEASE_KEY], "nothing else was written"
