"""run.json is changed by several at once, each change in full; a run that had checkpoints is not begun again."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config_io import to_json
from pipeline.errors import CheckpointError, ObjectMissingError
from pipeline.presets import digits
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from pipeline.training.run_record import (
    RUN_RECORD,
    RunRecord,
    read_run_record,
    refuse_to_begin_again,
    update_run_record,
)
from pipeline.training.train_config import RunIdentity
from tests.pipeline.storage_checks import check_one_line
from tests.pipeline.training.small_runs import manifest

RECORD = RunRecord(run_id=None, run_key="key", identity=RunIdentity.of(digits().train, manifest("a")))


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = open_store(str(tmp_path))
    store.create(RUN_RECORD, to_json(RECORD))
    return store


def test_changes_of_several_at_once_are_all_there(store: ObjectStore) -> None:
    changes: list[dict[str, object]] = [{"run_id": "a"}, {"has_checkpoints": True}, {"fork_digest": "0"}]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda change: update_run_record(store, **change), 3 * changes))
    assert read_run_record(store) == dataclasses.replace(RECORD, run_id="a", has_checkpoints=True, fork_digest="0")


def test_a_change_that_changes_nothing_writes_nothing(store: ObjectStore, tmp_path: Path) -> None:
    before = (tmp_path / RUN_RECORD).stat()
    assert update_run_record(store, run_key="key") == RECORD
    after = (tmp_path / RUN_RECORD).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_late_change_does_not_touch_another_runs_record(store: ObjectStore) -> None:
    assert update_run_record(store, only_of_key="another", run_id="a") == RECORD == read_run_record(store)
    assert update_run_record(store, only_of_key="key", run_id="a").run_id == "a"


def test_there_must_be_one_to_change(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError):
        update_run_record(open_store(str(tmp_path / "nothing")), run_id="a")


def test_a_run_that_had_checkpoints_begins_again_only_if_told_to() -> None:
    config = dataclasses.replace(digits().train, resume=True)
    had = dataclasses.replace(RECORD, has_checkpoints=True)
    with pytest.raises(CheckpointError) as caught:
        refuse_to_begin_again(had, config)
    check_one_line(caught.value, config.output, "none of them can be used", "--start-over beside --resume")
    refuse_to_begin_again(had, dataclasses.replace(config, start_over=True))
    refuse_to_begin_again(RECORD, config)
