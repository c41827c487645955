"""Lost answers, records that change meanwhile, readers beside a writer: nothing good is removed or set aside."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.stores.local_store import LocalStore
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore, Retention
from tests.pipeline.training.checkpoint_cases import FILES, KEY_2, OTHER, WrappedStore, pieces, read_all


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")


class LyingStore(WrappedStore):
    """Creates, and says that another has."""

    def create(self, key: str, data: bytes) -> bool:
        super().create(key, data)
        return False


class SilentStore(WrappedStore):
    """Creates, and its answer is lost for longer than anybody waits."""

    def create(self, key: str, data: bytes) -> bool:
        super().create(key, data)
        raise StorageError("no answer")


def test_a_record_whose_answer_was_lost_is_ours(store: LocalStore) -> None:
    checkpoints = CheckpointStore(LyingStore(store))
    mine = checkpoints.save(4, pieces())
    assert checkpoints.newest() == mine and read_all(checkpoints, mine) == FILES


def test_when_no_answer_comes_nothing_is_removed(store: LocalStore) -> None:
    with pytest.raises(StorageError, match="no answer"):
        CheckpointStore(SilentStore(store)).save(4, pieces())
    there = CheckpointStore(store)
    newest = there.newest()
    assert newest is not None and read_all(there, newest) == FILES


class ChangingStore(WrappedStore):
    """Just before a record is replaced another attempt does so."""

    def __init__(self, store: LocalStore, other: bytes) -> None:
        super().__init__(store)
        self._plain, self._other = store, other

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        if self._other:
            other, self._other = self._other, b""
            assert self._plain.replace(key, other, etag)
        return super().replace(key, data, etag)


@pytest.mark.parametrize("other_is_good", [True, False])
def test_a_record_that_changes_meanwhile_is_read_again(store: LocalStore, other_is_good: bool) -> None:
    checkpoints = CheckpointStore(store)
    theirs = checkpoints.save(2, pieces(OTHER))
    good = store.read(KEY_2)
    store.write(KEY_2, b"damaged")
    lines: list[str] = []
    racing = CheckpointStore(ChangingStore(store, good if other_is_good else b"also damaged"), lines.append)
    record = racing.save(2, pieces())
    assert checkpoints.newest() == record
    assert (record == theirs) is other_is_good
    assert len(lines) == (0 if other_is_good else 1)
    assert read_all(checkpoints, record) == (OTHER if other_is_good else FILES)


class InterruptedStore(WrappedStore):
    """While a file is read, something else happens, once."""

    def __init__(self, store: LocalStore, then: Callable[[], object]) -> None:
        super().__init__(store)
        self._then: Callable[[], object] | None = then

    def read(self, key: str) -> bytes:
        data = super().read(key)
        if self._then is not None and key == KEY_2:
            then, self._then = self._then, None
            then()
        return data


def test_readers_never_set_a_new_record_aside(store: LocalStore) -> None:
    """Two readers find a damaged record while a good one takes its place: each after it has read the old one."""
    writer = CheckpointStore(store)
    good, bad = writer.save(1, pieces()), writer.save(2, pieces())
    store.delete(f"{bad.prefix}/a.bin")
    made: list[CheckpointRecord] = []
    first = CheckpointStore(InterruptedStore(store, lambda: made.append(writer.save(2, pieces(OTHER)))))
    second = CheckpointStore(InterruptedStore(store, lambda: None))
    assert first.newest() == good, "what it had read was damaged"
    assert second.newest() == made[0] == first.newest() == writer.newest()
    assert read_all(writer, made[0]) == OTHER


def test_leftovers_are_no_living_writers_checkpoint(store: LocalStore) -> None:
    """A new driver looks while an old one, which has not heard of it, records what it has written and prunes."""
    old = CheckpointStore(store)
    old.save(5, pieces())

    class NewDriversStore(WrappedStore):
        def delete(self, key: str) -> None:
            old.prune(old.save(11, pieces()), Retention(last=1))
            super().delete(key)

    removed: list[int] = []

    class OldDriversStore(WrappedStore):
        def create(self, key: str, data: bytes) -> bool:
            removed.append(CheckpointStore(NewDriversStore(store)).remove_leftovers())
            return super().create(key, data)

    writer = CheckpointStore(OldDriversStore(store))
    record = writer.save(10, pieces())
    writer.prune(record, Retention(last=1))
    assert removed == [0] and old.newest() == record and read_all(old, record) == FILES


class TakenOver(Exception):
    pass


@pytest.mark.parametrize("damaged", [False, True])
def test_a_fence_stops_a_writer_before_it_records(store: LocalStore, damaged: bool) -> None:
    checkpoints = CheckpointStore(store)
    checkpoints.save(1, pieces())
    if damaged:
        store.write(KEY_2, b"damaged")
    asked: list[int] = []

    def fence() -> None:
        assert len(list(store.list("step-000000002-"))) == len(FILES), "asked as late as can be"
        asked.append(1)
        if len(asked) == (2 if damaged else 1):
            raise TakenOver

    before = {info.key: store.read(info.key) for info in store.list("_records/")}
    with pytest.raises(TakenOver):
        checkpoints.save(2, pieces(), fence=fence)
    assert {info.key: store.read(info.key) for info in store.list("_records/")} == before
