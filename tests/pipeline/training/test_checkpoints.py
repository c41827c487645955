"""Checkpoints exist only when verified, and a damaged one is never trusted."""

from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, FormatVersionError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints import CheckpointStore

FILES = {"a.bin": b"first", "b.bin": b"second"}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "checkpoints"))


def test_what_was_saved_is_read_back(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    record = checkpoints.save(10, FILES)
    assert checkpoints.read(record) == FILES
    assert next(checkpoints.records()) == record
    assert checkpoints.uri(record) == f"{store.uri}/{record.prefix}"


def test_records_are_newest_first(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    for step in (5, 1000, 20):
        checkpoints.save(step, FILES)
    assert [record.step for record in checkpoints.records()] == [1000, 20, 5]


@pytest.mark.parametrize("damage", ["altered", "cut short", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: ObjectStore, damage: str) -> None:
    checkpoints = CheckpointStore(store)
    good, bad = checkpoints.save(1, FILES), checkpoints.save(2, FILES)
    key = f"{bad.prefix}/b.bin"
    if damage == "missing":
        store.delete(key)
    else:
        store.write(key, b"sec" if damage == "cut short" else b"sEcond")
    with pytest.raises(CheckpointError, match=r"b\.bin"):
        checkpoints.read(bad)
    for put_aside in (False, True):
        before, lines = [(info.key, info.modified_s) for info in store.list()], list[str]()
        assert checkpoints.newest_good(lines.append, put_aside=put_aside) == good
        assert len(lines) == 1 and "step 2 is damaged" in lines[0]
        after = [(info.key, info.modified_s) for info in store.list()]
        assert (after == before) is not put_aside, "whoever only looks changes nothing"
    assert [record.step for record in checkpoints.records()] == [1], "the step can be recorded again"
    assert checkpoints.save(2, FILES).step == 2


def test_without_its_record_a_checkpoint_does_not_exist(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    record = checkpoints.save(3, FILES)
    store.delete(f"_records/step-{3:09d}.json")  # as after a kill between the files and the record
    assert checkpoints.newest_good(put_aside=True) is None
    assert store.stat(f"{record.prefix}/a.bin") is not None


def test_a_record_that_is_no_record_gives_way_too(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    good = checkpoints.save(1, FILES)
    store.write(f"_records/step-{2:09d}.json", b'{"step":')
    lines: list[str] = []
    assert checkpoints.newest_good(lines.append, put_aside=True) == good
    assert len(lines) == 1 and "step-000000002" in lines[0]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (
            b'{"format_version": 3, "layout": "other"}',
            "has format_version 3, this program reads 2; update this program",
        ),
        (b'{"format_version": 1, "step": 2}', "has format_version 1, this program reads 2; train again into another"),
        (b'{"step": 2}', "has no format_version, this program reads 2; train again into another output"),
    ],
)
def test_a_record_of_another_version_is_left_alone(store: ObjectStore, record: bytes, rule: str) -> None:
    checkpoints = CheckpointStore(store)
    checkpoints.save(1, FILES)
    key = f"_records/step-{2:09d}.json"
    store.write(key, record)
    lines: list[str] = []
    with pytest.raises(FormatVersionError, match=rf"{key}: {rule}"):
        checkpoints.newest_good(lines.append, put_aside=True)
    assert store.read(key) == record and lines == [], "it is not damaged"
    with pytest.raises(FormatVersionError):
        list(checkpoints.records())


def test_the_first_record_of_a_step_stands(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    first = checkpoints.save(4, FILES)
    assert checkpoints.save(4, {"a.bin": b"other"}) == first
    assert {info.key.split("/")[0] for info in store.list()} == {"_records", first.prefix}, "the loser leaves nothing"


def test_prune_keeps_the_newest(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    for step in range(1, 6):
        checkpoints.save(step, FILES)
    checkpoints.prune(2)
    assert [record.step for record in checkpoints.records()] == [5, 4]
    assert len(list(store.list("step-"))) == 2 * len(FILES)


def test_the_digest_is_of_the_contents(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    first, second, third = checkpoints.save(1, FILES), checkpoints.save(2, FILES), checkpoints.save(3, {"a.bin": b""})
    assert first.digest == second.digest != third.digest
