"""Checkpoints exist only when verified, a damaged one is never trusted, and nothing good is ever destroyed."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.stores.lease import hold_lease
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord, Retention
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.pipeline.training.checkpoint_cases import FILES, KEY_2, OTHER, age, pieces, read_all, snapshot

OTHER_FORMATS = {
    "later": (b'{"format_version": 3, "layout": "other"}', "has format_version 3, this program reads 2; update this"),
    "older": (b'{"format_version": 1, "step": 2}', "has format_version 1, this program reads 2; train again into"),
    "none": (b'{"step": 2}', "has no format_version, this program reads 2; train again into another output"),
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")


def first_that_reads(checkpoints: CheckpointStore) -> CheckpointRecord | None:
    """As whoever needs the files chooses: by what it reads."""
    for record in checkpoints.candidates():
        try:
            checkpoints.verify(record)
            return record
        except CheckpointError as error:
            checkpoints.leave_out(record.step, error)
    return None


def test_what_was_saved_is_read_back(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    record = checkpoints.save(10, pieces())
    assert read_all(checkpoints, record) == FILES
    assert [file.name for file in record.files] == sorted(FILES)
    assert next(checkpoints.records()) == record == checkpoints.newest()
    assert checkpoints.uri(record) == f"{store.uri}/{record.prefix}"
    with pytest.raises(CheckpointError, match=r"has no c\.bin"):
        checkpoints.read(record, "c.bin")


def test_records_are_newest_first(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    for step in (5, 1000, 20):
        checkpoints.save(step, pieces())
    assert [record.step for record in checkpoints.records()] == [1000, 20, 5]


DAMAGES: dict[str, Callable[[ObjectStore, str], None]] = {
    "flipped byte": lambda store, prefix: store.write(f"{prefix}/b.bin", b"sEcond"),
    "cut short": lambda store, prefix: store.write(f"{prefix}/b.bin", b"sec"),
    "missing": lambda store, prefix: store.delete(f"{prefix}/b.bin"),
    "no record": lambda store, prefix: store.write(KEY_2, b'{"step":'),
    **{
        f"{name} format": lambda store, prefix, record=record: store.write(KEY_2, record)  # type: ignore[misc]
        for name, (record, _) in OTHER_FORMATS.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: ObjectStore, damage: str) -> None:
    lines: list[str] = []
    checkpoints = CheckpointStore(store, lines.append)
    good, bad = checkpoints.save(1, pieces()), checkpoints.save(2, pieces())
    DAMAGES[damage](store, bad.prefix)
    before = snapshot(store)
    assert first_that_reads(checkpoints) == good
    assert len(lines) == 1 and "checkpoint of step 2 is " in lines[0] and "left out" in lines[0]
    assert ("of another version" in lines[0]) is (damage.removesuffix(" format") in OTHER_FORMATS)
    assert snapshot(store) == before, "a reader moves and deletes nothing"
    # By records and lengths alone, all but the flipped byte is found.
    assert checkpoints.newest() == (bad if damage == "flipped byte" else good)
    # Whoever holds the lease records the step again.
    del lines[:]
    mine = checkpoints.save(2, pieces(OTHER))
    assert checkpoints.newest() == mine and read_all(checkpoints, mine) == OTHER
    assert len(lines) == 1 and "step 2: this one takes the place of a record there" in lines[0]


@pytest.mark.parametrize("version", OTHER_FORMATS)
def test_a_record_of_another_version_says_what_to_do(store: ObjectStore, version: str) -> None:
    lines: list[str] = []
    store.write(KEY_2, OTHER_FORMATS[version][0])
    assert list(CheckpointStore(store, lines.append).records()) == []
    assert f"{KEY_2}: {OTHER_FORMATS[version][1]}" in lines[0]


def test_without_its_record_a_checkpoint_does_not_exist(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    record = checkpoints.save(3, pieces())
    store.delete(f"_records/step-{3:09d}.json")  # as after a kill between the files and the record
    assert checkpoints.newest() is None and checkpoints.is_empty()
    assert store.stat(f"{record.prefix}/a.bin") is not None
    age(store)
    again = checkpoints.save(3, pieces())
    assert checkpoints.remove_leftovers() == len(FILES)
    assert checkpoints.newest() == again and store.stat(f"{record.prefix}/a.bin") is None


class DyingStore(LocalStore):
    """The process dies where it would create the record."""

    def create(self, key: str, data: bytes) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def save_and_die(root: str) -> None:
    CheckpointStore(DyingStore(Path(root))).save(2, pieces())


def test_a_writer_killed_between_files_and_record_leaves_what_nobody_reads(store: LocalStore) -> None:
    lines: list[str] = []
    checkpoints = CheckpointStore(store, lines.append)
    before = checkpoints.save(1, pieces())
    victim = multiprocessing.get_context("spawn").Process(target=save_and_die, args=(store.uri,))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert len(list(store.list("step-000000002-"))) == len(FILES), "it was killed after the files"
    assert checkpoints.newest() == before and lines == []
    assert checkpoints.remove_leftovers(older_than_s=-1) == len(FILES) and checkpoints.newest() == before


def test_a_good_record_of_another_attempt_stands(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    first = checkpoints.save(4, pieces())
    assert checkpoints.save(4, pieces({"a.bin": b"other"})) == first
    assert {info.key.split("/")[0] for info in store.list()} == {"_records", first.prefix}, "the loser leaves nothing"


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=2), [60, 50]),
        (Retention(last=1), [60]),
        (Retention(last=10), [60, 50, 40, 30, 20, 10]),
        (Retention(last=1, every_steps=30), [60, 30]),
        (Retention(last=2, every_steps=20), [60, 50, 40, 20]),
        (Retention(last=1, every_steps=7), [60]),
    ],
)
def test_retention(store: ObjectStore, retention: Retention, kept: list[int]) -> None:
    checkpoints = CheckpointStore(store)
    for step in range(10, 70, 10):
        newest = checkpoints.save(step, pieces())
    checkpoints.prune(newest, retention)
    assert [record.step for record in checkpoints.records()] == kept
    assert len(list(store.list("step-"))) == len(kept) * len(FILES)


def test_a_pinned_checkpoint_stays(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    records = [checkpoints.save(step, pieces()) for step in (1, 2, 3)]
    for _ in range(2):  # safe to repeat
        checkpoints.pin(records[0], "ddpm")
    checkpoints.prune(records[2], Retention(last=1))
    assert [record.step for record in checkpoints.records()] == [3, 1]
    store.delete(f"_records/step-{1:09d}.json")
    assert checkpoints.remove_leftovers(older_than_s=-1) == 0 and read_all(checkpoints, records[0]) == FILES


def test_later_records_neither_count_nor_go(store: ObjectStore) -> None:
    """A run that went on from step 5, because 10 is damaged, must keep what it has got at step 7."""
    checkpoints = CheckpointStore(store)
    checkpoints.save(5, pieces())
    damaged = checkpoints.save(10, pieces())
    store.write(f"{damaged.prefix}/a.bin", b"fIrst")
    newest = checkpoints.save(7, pieces())
    checkpoints.prune(newest, Retention(last=1))
    assert [record.step for record in checkpoints.records()] == [10, 7]
    assert first_that_reads(checkpoints) == newest


def test_leftovers_go_and_what_is_named_stays(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    kept = [checkpoints.save(1, pieces())]
    for name in ("a.bin", "b.bin"):
        store.write(f"step-000000003-deadbeef/{name}", b"x")
    age(store)
    kept.append(checkpoints.save(2, pieces()))
    assert checkpoints.remove_leftovers() == 2
    assert all(read_all(checkpoints, record) == FILES for record in kept)


def test_a_folder_in_which_something_was_written_lately_stays(tmp_path: Path) -> None:
    """Lately by the store's clock: the lease shows it, where nothing else is written there."""
    checkpoints, store = CheckpointStore.of_run(str(tmp_path)), open_store(str(tmp_path / "checkpoints"))
    for name in ("a.bin", "b.bin"):
        store.write(f"step-000000003-deadbeef/{name}", b"x")
    age(store)
    assert checkpoints.remove_leftovers() == 0, "nothing shows what time it is"
    with hold_lease(open_store(str(tmp_path)), duration_s=60):
        store.write("step-000000003-deadbeef/c.bin", b"x")
        assert checkpoints.remove_leftovers() == 0, "one of its files is new"
        store.delete("step-000000003-deadbeef/c.bin")
        assert checkpoints.remove_leftovers() == 2


def test_leftovers_stay_where_a_record_cannot_be_read(store: ObjectStore) -> None:
    lines: list[str] = []
    checkpoints = CheckpointStore(store, lines.append)
    checkpoints.save(1, pieces())
    store.write("step-000000002-deadbeef/a.bin", b"x")
    age(store)
    checkpoints.save(3, pieces())
    store.write(KEY_2, OTHER_FORMATS["later"][0])
    before = snapshot(store)
    assert checkpoints.remove_leftovers() == 0
    assert snapshot(store) == before and len(lines) == 1 and "step 2 may name one" in lines[0]


def test_the_digest_is_of_the_contents(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    first, second = checkpoints.save(1, pieces()), checkpoints.save(2, pieces())
    third = checkpoints.save(3, pieces({"a.bin": b""}))
    assert first.digest == second.digest != third.digest


def test_a_damaged_final_checkpoint_is_none(tmp_path: Path) -> None:
    """Of a finished run the model is read: damage there leaves something to train."""
    from tests.pipeline.training.small_runs import make_run

    lines: list[str] = []
    make_run(tmp_path, steps=8)
    checkpoints = CheckpointStore.of_run(str(tmp_path), lines.append)
    finished = checkpoints.read_finished(8)
    assert finished is not None and finished[0] == checkpoints.newest() and lines == []
    assert checkpoints.read_finished(9) is None and lines == []
    weights = tmp_path / "checkpoints" / finished[0].prefix / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert checkpoints.read_finished(8) is None
    assert len(lines) == 1 and "weights.safetensors" in lines[0]
    assert open_store(str(tmp_path)).stat("checkpoints/_damaged") is None
    assert dataclasses.asdict(finished[0]) == dataclasses.asdict(next(checkpoints.records()))
    assert checkpoints.read_finished(8) is None and len(lines) == 1, "the same is said once"


def altered(files: dict[str, bytes], name: str, old: bytes, new: bytes) -> dict[str, bytes]:
    assert old in files[name]
    return files | {name: files[name].replace(old, new)}


UNUSABLE: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "a card of a later version": lambda f: altered(f, "model.json", b'"format_version":2', b'"format_version":3'),
    "a card of other weights": lambda f: altered(f, "model.json", b'"weights_sha256":"', b'"weights_sha256":"0'),
    "a later state": lambda f: altered(f, "state.json", b'"format_version":2', b'"format_version":3'),
    "the state of another step": lambda f: altered(f, "state.json", b'"step":2', b'"step":1'),
    "no optimiser": lambda f: {name: data for name, data in f.items() if name != "optimizer.safetensors"},
    "no model": lambda f: {name: data for name, data in f.items() if name != "model.json"},
    "later snapshots": lambda f: altered(f, "ema_snapshots.json", b'"format_version":2', b'"format_version":3'),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_what_a_run_could_not_go_on_from_gives_way_to_ours(tmp_path: Path, fault: str) -> None:
    from tests.pipeline.training.small_runs import CARD, make_run, to_files

    files = to_files(make_run(tmp_path / "run", steps=2)[0], CARD)
    lines: list[str] = []
    checkpoints = CheckpointStore(LocalStore(tmp_path / "checkpoints"), lines.append)
    theirs = checkpoints.save(2, [lambda: UNUSABLE[fault](files)])
    mine = checkpoints.save(2, [lambda: files])
    assert mine.prefix != theirs.prefix and checkpoints.newest() == mine
    assert len(lines) == 1 and "step 2: this one takes the place of a record there" in lines[0]
    assert checkpoints.save(2, [lambda: files]) == mine, "what a run can go on from stands"


def test_a_damaged_checkpoint_does_not_count_as_kept(store: ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    for step in (3, 5):
        checkpoints.save(step, pieces())
    store.delete(f"{checkpoints.save(10, pieces()).prefix}/a.bin")
    checkpoints.prune(checkpoints.save(12, pieces()), Retention(last=2))
    assert [record.step for record in checkpoints.candidates()] == [12, 5]
    checkpoints.save(13, pieces())
    checkpoints.prune(checkpoints.save(14, pieces()), Retention(last=2))
    assert [record.step for record in checkpoints.records()] == [14, 13], "in the end it goes too"


def test_nothing_is_removed_for_a_checkpoint_that_is_not_there(store: ObjectStore) -> None:
    lines: list[str] = []
    checkpoints = CheckpointStore(store, lines.append)
    for step in (1, 2, 3):
        newest = checkpoints.save(step, pieces())
    store.delete(f"{newest.prefix}/b.bin")
    before = snapshot(store)
    checkpoints.prune(newest, Retention(last=1))
    assert snapshot(store) == before and len(lines) == 1
    assert "step 3: no other is removed" in lines[0] and "b.bin: missing" in lines[0]
