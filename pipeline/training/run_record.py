"""What an output folder says about its training run: `run.json`, created once, changed under the lease."""

from dataclasses import dataclass, replace
from typing import Any

from ddpm.added_field import added_field
from pipeline.config_io import read_record, to_json
from pipeline.errors import CheckpointError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import join_uri
from pipeline.training.checkpoints.checkpoint_records import TRAIN_AGAIN
from pipeline.training.train_config import RunIdentity, TrainConfig

RUN_RECORD = "run.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRecord:
    """That a run has gone back to an earlier step, because too many batches had to be left out."""

    to_step: int
    """Where it went on from."""
    from_step: int
    """How far it had come before: the steps in between are made, and logged, a second time."""
    left_out_steps: tuple[int, ...]
    """Global batches that are not trained on."""
    is_done: bool = False
    """Whether the checkpoints after `to_step` have been removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateRecord:
    """How fast a run has trained."""

    images_per_s: float
    """Of all workers."""
    num_workers: int
    """How many they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The run of an output folder."""

    format_version: int = 2
    """Version of this record's form."""
    run_id: str | None
    """The MLflow run; None until MLflow has answered for the first time."""
    identity: RunIdentity
    """What a resumed run must share."""
    run_key: str | None = added_field(default=None, pin=None)
    """Random name under which the MLflow run is made, so that it is made once; None where it was made before this."""
    has_checkpoints: bool = added_field(default=False, pin=False)
    """Whether a checkpoint was ever recorded: a run that had any does not begin at step 0 again in silence."""
    fork_digest: str | None = added_field(default=None, pin=None)
    """Digest of the model whose weights the run began with; None where it began with random ones."""
    begun_at_s: float | None = added_field(default=None, pin=None)
    """When the run was begun, Unix time; None for runs of the time before this."""
    num_restarts: int = added_field(default=0, pin=0)
    """How often its workers were started again, and its driver."""
    rollback: RollbackRecord | None = added_field(default=None, pin=None)
    """That it has gone back once; None: it has not."""
    rate: RateRecord | None = added_field(default=None, pin=None)
    """How fast it was when it last began to write checkpoints; None: not known."""


def read_run_record(store: ObjectStore) -> RunRecord:
    """What an output folder says about its run.

    Raises:
        ObjectMissingError: If it holds none.
        ConfigError: If the record is damaged.
        FormatVersionError: If it is of another version.
    """
    return _parse(store, store.read(RUN_RECORD))


def update_run_record(store: ObjectStore, *, only_of_key: str | None = None, **changes: Any) -> RunRecord:
    """Change fields of the record; the driver and its first worker may do so at once.

    Args:
        store: The output.
        only_of_key: Change nothing where the record has got another `run_key` meanwhile.
        changes: New values by field.

    Returns:
        The record as it stands now.

    Raises:
        ObjectMissingError, ConfigError, FormatVersionError: As read_run_record.
    """
    while True:
        found = store.read_versioned(RUN_RECORD)
        before = _parse(store, found.data)
        after = before if only_of_key not in (None, before.run_key) else replace(before, **changes)
        if after == before or store.replace(RUN_RECORD, to_json(after), found.etag) is not None:
            return after


def refuse_to_begin_again(record: RunRecord, config: TrainConfig) -> None:
    """For a run without a checkpoint to go on from: it may begin at step 0 only if it never had one, or if told to.

    Raises:
        CheckpointError: If it had.
    """
    if record.has_checkpoints and not config.start_over:
        raise CheckpointError(
            f"output: {config.output} had checkpoints and none of them can be used; bring them back from a copy, or "
            "pass --start-over beside --resume to begin at step 0 again"
        )


def _parse(store: ObjectStore, data: bytes) -> RunRecord:
    return read_record(RunRecord, data, join_uri(store.uri, RUN_RECORD), remedy=TRAIN_AGAIN)
