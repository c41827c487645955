"""Exactly-once commits, over real stores: races, kills at every operation, equal and different bytes."""

import hashlib
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_io import to_json
from pipeline.errors import CommitConflictError, ObjectMissingError, StorageAccessError
from pipeline.generation.output.commits import (
    Commit,
    Provenance,
    part_index,
    part_key,
    read_record,
    tar_index,
    tar_key,
    write_once,
)
from pipeline.generation.output.inventory import Inventory, collect_orphans
from pipeline.generation.spec.sampling_plan import OutputShard, SamplingSpec, ShardPlan
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectInfo, ObjectStore
from pipeline.stores.storage import join_uri, open_store
from tests.fixtures_s3 import S3Server
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

SPEC = make_spec()
SHARD = OutputShard(index=3, first_id=300, num_samples=100)
PLAN = ShardPlan(shard_size=100, num_images=400)
OURS, THEIRS = b"our bytes" * 99, b"bytes of other hardware" * 77


def tars_in(store: ObjectStore) -> list[ObjectInfo]:
    """Candidates for orphans: whoever collects looks himself which of them a record names."""
    return [info for info in store.list() if tar_index(info.key) is not None]


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.services)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty output prefix of every kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "output"))
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "moto" else "ceph_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return open_store(join_uri(server.uri, uuid.uuid4().hex))


def made_by(host: str) -> Provenance:
    return Provenance(host=host, device="cpu", software="test", started_at_utc="2026-01-01T00:00:00+00:00", wall_s=1.0)


def commit(
    store: ObjectStore, tar: bytes, host: str = "a", *, spec: SamplingSpec = SPEC, shard: OutputShard = SHARD
) -> Commit:
    return write_once(store, spec, shard, tar, made_by(host))


def key_of(tar: bytes) -> str:
    return tar_key(SHARD.index, hashlib.sha256(tar).hexdigest())


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {item.key: store.read(item.key) for item in store.list()}


def race(store: ObjectStore, tars: list[bytes]) -> list[Commit]:
    """One writer per tar, all at once."""
    barrier = threading.Barrier(len(tars))

    def run(number: int) -> Commit:
        barrier.wait()
        return commit(store, tars[number], f"writer {number}")

    with ThreadPoolExecutor(len(tars)) as threads:
        return list(threads.map(run, range(len(tars))))


def test_a_commit_is_a_tar_and_a_record(store: ObjectStore) -> None:
    done = commit(store, OURS)
    assert done.outcome == "first"
    assert contents(store) == {key_of(OURS): OURS, "_parts/000000003.json": to_json(done.record)}
    assert done.record == read_record(store, 3)
    assert (done.record.sha256, done.record.size_bytes) == (hashlib.sha256(OURS).hexdigest(), len(OURS))
    assert (done.record.shard, done.record.spec_digest) == (SHARD, SPEC.digest)


def test_racing_writers_of_equal_bytes_all_succeed_and_delete_nothing(store: ObjectStore) -> None:
    for _ in range(5):
        commits = race(store, [OURS] * 8)
        assert Counter(c.outcome for c in commits) == {"first": 1, "equal": 7}
        first = next(c.record for c in commits if c.outcome == "first")
        assert all(c.record == first for c in commits)
        assert contents(store) == {key_of(OURS): OURS, part_key(3): to_json(first)}
        for item in list(store.list()):
            store.delete(item.key)


def test_racing_writers_of_different_bytes_leave_the_first_and_nothing_else(store: ObjectStore) -> None:
    for _ in range(5):
        tars = [OURS, THEIRS] * 4
        commits = race(store, tars)
        first = next(c.record for c in commits if c.outcome == "first")
        winner = OURS if first.key == key_of(OURS) else THEIRS
        assert Counter(c.outcome for c in commits) == {"first": 1, "equal": 3, "lost": 4}
        assert all(c.outcome == "lost" or tar == winner for c, tar in zip(commits, tars, strict=True))
        assert all(c.record == first for c in commits)
        assert contents(store) == {key_of(winner): winner, part_key(3): to_json(first)}
        for item in list(store.list()):
            store.delete(item.key)


class Killed(BaseException):
    """The process is gone."""


class KilledStore:
    """A real store whose user is killed just before or just after the n-th operation."""

    def __init__(self, store: ObjectStore, operation: int, *, after: bool) -> None:
        self._store, self._left, self._after = store, operation, after

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not callable(value):
            return value

        def operate(*arguments: object) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Killed
            result = value(*arguments)
            if self._left == 0:
                raise Killed
            return result

        return operate


def operations(action: Callable[[ObjectStore], object], make_store: Callable[[], ObjectStore]) -> Iterator[ObjectStore]:
    """The store as it is left by a kill at every operation of an action, before and after it takes effect."""
    for number in range(1, 20):
        killed = False
        for after in (False, True):
            store = make_store()
            try:
                action(KilledStore(store, number, after=after))  # type: ignore[arg-type]
            except Killed:
                killed = True
            yield store
        if not killed:
            assert number > 2
            return


@pytest.mark.parametrize("committed_before", [None, OURS, THEIRS], ids=["nothing", "ours", "theirs"])
@pytest.mark.parametrize("retried_with", [OURS, THEIRS], ids=["equal", "different"])
def test_a_kill_at_any_operation_is_repaired_by_the_next_attempt(
    committed_before: bytes | None, retried_with: bytes, tmp_path: Path
) -> None:
    def make_store() -> ObjectStore:
        store = open_store(str(tmp_path / uuid.uuid4().hex))
        if committed_before is not None:
            commit(store, committed_before, "before")
        return store

    for store in operations(lambda killed: commit(killed, OURS, "killed"), make_store):
        first = store.read(part_key(3)) if store.stat(part_key(3)) else None
        retried = commit(store, retried_with, "retry")
        stands = read_record(store, 3)
        assert retried.record == stands
        assert first is None or to_json(stands) == first, "a commit never changes"
        tar = store.read(stands.key)
        assert hashlib.sha256(tar).hexdigest() == stands.sha256
        assert list(Inventory(store, PLAN, None).done) == [0, 0, 0, 1]
        # What nobody names is found and collected; what is committed never is.
        collect_orphans(store, tars_in(store), older_than_s=0, now_s=time.time() + 60)
        assert contents(store) == {stands.key: tar, part_key(3): to_json(stands)}


KILLED_BETWEEN_TAR_AND_RECORD = """
import os, signal, sys
from tests.pipeline.generation.output.test_commits import OURS, commit
from pipeline.stores.storage import open_store
store = open_store(sys.argv[1])
create = type(store).create
def kill(self, key, data):
    os.kill(os.getpid(), signal.SIGKILL)
type(store).create = kill
commit(store, OURS, "killed")
"""


def test_sigkill_between_tar_and_record_leaves_an_orphan_that_is_adopted_or_collected(store: ObjectStore) -> None:
    script = [sys.executable, "-c", KILLED_BETWEEN_TAR_AND_RECORD, store.uri]
    assert subprocess.run(script, cwd=Path(__file__).parents[4]).returncode == -signal.SIGKILL
    assert contents(store) == {key_of(OURS): OURS}, "killed between the two"
    tars = tars_in(store)
    assert [item.key for item in tars] == [key_of(OURS)] and not any(Inventory(store, PLAN, None).done)

    def collect(age_s: float) -> list[str]:
        return collect_orphans(store, tars, older_than_s=3600, now_s=tars[0].modified_s + age_s)

    assert collect(age_s=3599) == [], "somebody may still be writing the record"
    assert commit(store, THEIRS, "other hardware").outcome == "first"
    assert collect(age_s=3601) == [key_of(OURS)]
    assert set(contents(store)) == {key_of(THEIRS), part_key(3)}
    assert commit(store, OURS, "killed, again").outcome == "lost"
    assert set(contents(store)) == {key_of(THEIRS), part_key(3)}


def test_an_orphan_adopted_meanwhile_is_not_collected(store: ObjectStore) -> None:
    """A collector that listed before the record was written must look again."""
    store.write(key_of(OURS), OURS)
    tars = tars_in(store)
    commit(store, OURS)
    assert collect_orphans(store, tars, older_than_s=0, now_s=time.time() + 9999) == []
    assert store.read(key_of(OURS)) == OURS


class LostAnswerStore:
    """An S3 whose answer to the first conditional PUT is lost: the client's own retry is then told 412."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, key: str, data: bytes) -> bool:
        assert self._store.create(key, data)
        return self._store.create(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_412_to_our_own_retry_is_success(store: ObjectStore) -> None:
    assert commit(LostAnswerStore(store), OURS).outcome == "equal"  # type: ignore[arg-type]
    assert store.read(key_of(OURS)) == OURS


@pytest.mark.parametrize(
    "other",
    [
        {"shard": OutputShard(index=3, first_id=300, num_samples=50)},
        {"shard": OutputShard(index=3, first_id=150, num_samples=100)},
        {"spec": make_spec(seed=1)},
    ],
    ids=["count", "first id", "spec"],
)
def test_a_record_of_another_plan_is_a_conflict_even_for_equal_bytes(store: ObjectStore, other: dict[str, Any]) -> None:
    commit(store, OURS, **other)
    before = contents(store)
    with pytest.raises(CommitConflictError, match=r"_parts/000000003.json commits .* choose another output"):
        commit(store, OURS)
    assert contents(store) == before


def test_a_committed_tar_that_is_gone_is_restored_by_equal_bytes_only(store: ObjectStore) -> None:
    commit(store, OURS)
    store.delete(key_of(OURS))
    with pytest.raises(CommitConflictError, match=rf"names {key_of(OURS)}, which is gone"):
        commit(store, THEIRS)
    assert commit(store, OURS).outcome == "equal"
    assert set(contents(store)) == {key_of(OURS), part_key(3)}


def test_keys_name_index_and_digest_in_the_order_of_the_shards() -> None:
    digest, indices = "0f" * 32, (0, 999_999, 1_000_000, 123_456_789, 999_999_999)
    for index in indices:
        assert tar_index(tar_key(index, digest)) == index == part_index(part_key(index))
    assert sorted(map(part_key, indices)) == list(map(part_key, indices))
    assert tar_key(7, digest) == f"000000007-{digest}.tar" and part_key(7) == "_parts/000000007.json"
    for key in (
        "manifest.json",
        "contact_sheet.png",
        "7-x.tar",
        f"x/000000007-{digest}.tar",
        f"0000000007-{digest}.tar",
        "_parts/7.json",
        "000000007.tar",
        "_parts/0000000007.json",
    ):
        assert tar_index(key) is None and part_index(key) is None


def test_a_missing_record_is_named(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissingError, match=r"_parts/000000003\.json"):
        read_record(store, 3)


class KeepingStore(LocalStore):
    """Forbids to delete."""

    def delete(self, key: str) -> None:
        raise StorageAccessError(f"{key}: deleting is forbidden")


def test_a_store_that_forbids_deletes_keeps_what_nobody_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = KeepingStore(tmp_path)
    assert commit(store, THEIRS, "other hardware").outcome == "first"
    assert commit(store, OURS, "late").outcome == "lost"
    assert capsys.readouterr().out.count("deleting is forbidden") == 1
    store.write(tar_key(4, "0" * 64), b"another")
    tars = tars_in(store)
    assert len(tars) == 3
    assert collect_orphans(store, tars, older_than_s=0, now_s=time.time() + 60) == []
    assert capsys.readouterr().out.count("deleting is forbidden") == 1
    assert set(contents(store)) == {key_of(THEIRS), key_of(OURS), part_key(3), tar_key(4, "0" * 64)}
