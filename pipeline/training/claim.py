"""Whose an output folder is: a new run claims it, a resumed one goes on with it, all others are refused."""

import contextlib
import functools
import time
from collections.abc import Callable

from pipeline.config_io import flat, to_json
from pipeline.config_sections import write_section
from pipeline.errors import ConfigError, OutputExistsError, PipelineError
from pipeline.models.registration_check import check_registration
from pipeline.stores.lease import Lease
from pipeline.stores.object_store import ObjectStore
from pipeline.tracking.tracking import TrackingRun, new_run_key
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.fork import check_fork
from pipeline.training.run_description import description_tags
from pipeline.training.run_record import RUN_RECORD, RunRecord, read_run_record, update_run_record
from pipeline.training.train_config import RunIdentity, TrainConfig
from pipeline.training.train_plan import TrainPlan


def claim(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore, lease: Lease, *, is_finished: bool
) -> tuple[RunRecord, TrackingRun]:
    """The run of an output folder, for the holder of its lease: a new one, or the one to go on with.

    Where MLflow is away, its run is made later; `run.json` holds the name that it is found by.

    Args:
        config: The run that is asked for.
        plan: What it works with.
        store: The output folder.
        lease: Its lease.
        is_finished: Whether there is nothing left to train: then the start checks are the end itself.

    Returns:
        What the folder says about its run, and the run in MLflow.

    Raises:
        OutputExistsError: If the folder holds a run and nobody asked to go on with it, or checkpoints of nobody's.
        ConfigError: If that run computes something else, or its MLflow run is gone; names what to do.
        ModelMissingError, CheckpointError: If the model that a new run begins with cannot be read.
        TrackingUnavailableError: If MLflow refuses what the run will need; a new run has claimed nothing then.
    """
    asked = RunIdentity.of(config, plan.manifest)
    if store.stat(RUN_RECORD) is None:
        return _begin(config, plan, store, lease, asked)
    record = read_run_record(store)
    if not config.resume:
        raise OutputExistsError(
            f"output: {store.uri} already holds a training run; pass --resume to go on with it, or name another output"
        )
    _refuse_changes(record.identity, asked, store.uri)
    if config.new_run:
        return _go_on_in_a_new_run(config, plan, store, record)
    check = None if is_finished else _start_check(config)
    if record.run_id is None:
        return record, _open_run(config, plan, record, store, check)
    return record, TrackingRun.join(config.tracking, record.run_id, run_key=record.run_key or "", check=check)


def _begin(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore, lease: Lease, identity: RunIdentity
) -> tuple[RunRecord, TrackingRun]:
    if not CheckpointStore.of_run(config.output).is_empty():
        raise OutputExistsError(
            f"output: {store.uri} holds checkpoints and no {RUN_RECORD} that says whose they are; bring it back from a "
            "copy, or name another output"
        )
    fork_digest = check_fork(config, plan.model_config)
    record = RunRecord(
        run_id=None, run_key=new_run_key(), identity=identity, fork_digest=fork_digest, begun_at_s=time.time()
    )
    if not store.create(RUN_RECORD, to_json(record)):
        raise OutputExistsError(f"output: another driver has just started a run in {store.uri}; name another output")
    try:
        return record, _open_run(config, plan, record, store, _start_check(config))
    except BaseException:
        with contextlib.suppress(PipelineError):  # where it cannot be removed, --resume goes on with it
            lease.confirm()  # it may be another's by now, and so the run
            store.delete(RUN_RECORD)
        raise


def _go_on_in_a_new_run(
    config: TrainConfig, plan: TrainPlan, store: ObjectStore, before: RunRecord
) -> tuple[RunRecord, TrackingRun]:
    record = update_run_record(store, run_key=new_run_key(), run_id=None)
    try:
        return record, _open_run(config, plan, record, store, _start_check(config), continues=before.run_id)
    except BaseException:
        update_run_record(store, run_key=before.run_key, run_id=before.run_id)
        raise


def _open_run(
    config: TrainConfig,
    plan: TrainPlan,
    record: RunRecord,
    store: ObjectStore,
    check: Callable[[TrackingRun], None] | None,
    *,
    continues: str | None = None,
) -> TrackingRun:
    run_key = record.run_key
    assert run_key is not None, "a record without a key has the run's own name"
    return TrackingRun.open(
        config.tracking,
        run_key,
        config.run_name,
        params=flat(config) | {"dataset_digest": record.identity.dataset_digest},
        tags={
            "ddpm.output": config.output,
            **({} if continues is None else {"ddpm.continues": continues}),
            **description_tags(config, plan),
        },
        check=check,
        on_opened=lambda run_id: update_run_record(store, only_of_key=run_key, run_id=run_id),
    )


def _start_check(config: TrainConfig) -> Callable[[TrackingRun], None]:
    return functools.partial(check_registration, name=config.register_as, config_toml=write_section(config, "train"))


def _refuse_changes(recorded: RunIdentity, asked: RunIdentity, where: str) -> None:
    theirs, ours = (flat(identity) for identity in (recorded, asked))
    # The name of a variant first: it is why its options differ.
    for name in sorted(theirs.keys() | ours.keys(), key=lambda name: (not name.endswith(".name"), name)):
        before, now = theirs.get(name), ours.get(name)
        if before != now:
            raise ConfigError(
                f"{name}: the run in {where} has {before!r}, got {now!r}; "
                "a resumed run keeps it, a new one needs another output (--fork-from begins with its weights)"
            )
