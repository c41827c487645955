"""A checkpoint that is cancelled leaves nothing, however its store behaves; one that is recorded stands."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from pipeline.errors import LeaseLostError, StorageError
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.local_store import LocalStore
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.stores.s3_multipart import SMALLEST_PART_BYTES
from pipeline.stores.s3_store import S3Store
from pipeline.training.checkpoints import checkpoint_files
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore, Retention
from tests.faulty_proxy import Answer, FaultyProxy, LoseAnswer, Stall, s3_error
from tests.fixtures_s3 import S3Server
from tests.pipeline.storage_checks import keys_of
from tests.pipeline.training.checkpoint_cases import FILES, KEY_2, WrappedStore, pieces, read_all


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")


class HangingStore(WrappedStore):
    """One file of a checkpoint is written when it is let."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.reached, self.open = threading.Event(), threading.Event()

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        if key.endswith("b.bin"):
            self.reached.set()
            self.open.wait()
        super().write(key, data)


@pytest.fixture
def hanging(store: LocalStore) -> HangingStore:
    return HangingStore(store)


def saved_beside(checkpoints: CheckpointStore, **options: Callable[[], object]) -> "Future[CheckpointRecord]":
    pool = ThreadPoolExecutor(1)
    saved = pool.submit(lambda: checkpoints.save(2, pieces(), **options))
    pool.shutdown(wait=False)
    return saved


def test_a_request_that_hangs_is_not_waited_for_and_its_files_go(hanging: HangingStore, store: LocalStore) -> None:
    checkpoints, cancellation = CheckpointStore(hanging), Cancellation()
    checkpoints.save(1, [lambda: {"c.bin": b"before"}])
    before = keys_of(store)
    saved = saved_beside(checkpoints.with_cancellation(cancellation))
    hanging.reached.wait()
    cancellation.cancel()
    with pytest.raises(CancelledWriteError):
        saved.result()  # while b.bin still hangs
    checkpoints.remove_cancelled()  # comes back at once, too
    hanging.open.set()
    checkpoints.remove_cancelled(600)
    assert keys_of(store) == before
    assert {file.name for file in Path(store.uri).rglob("*") if file.is_file()} == {"c.bin", "step-000000001.json"}


def test_what_cannot_be_removed_is_said_and_stays_a_leftover(hanging: HangingStore, store: LocalStore) -> None:
    class KeepingStore(HangingStore):
        def delete(self, key: str) -> None:
            raise StorageError(f"{key}: deleting is forbidden")

    lines, cancellation = list[str](), Cancellation()
    keeping = KeepingStore(store)
    checkpoints = CheckpointStore(keeping, lines.append)
    saved = saved_beside(checkpoints.with_cancellation(cancellation))
    keeping.reached.wait()
    while not keys_of(store):  # pytest's own limit ends a wait for nothing
        time.sleep(0.01)
    cancellation.cancel()
    with pytest.raises(CancelledWriteError):
        saved.result()
    keeping.open.set()
    checkpoints.remove_cancelled(600)
    assert len(lines) == 1 and "deleting is forbidden" in lines[0]
    assert keys_of(store) and CheckpointStore(store).is_empty()
    CheckpointStore(store).remove_leftovers(older_than_s=-1)
    assert keys_of(store) == []


def test_a_large_file_is_left_off_in_the_middle(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_CHUNK_BYTES", 2)
    cancellation, taken = Cancellation(), list[bytes]()

    class CountingStore(WrappedStore):
        def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
            def watched() -> Iterable[bytes]:
                for chunk in data:
                    assert isinstance(chunk, bytes)
                    taken.append(chunk)
                    if len(taken) == 3:
                        cancellation.cancel()
                    yield chunk

            super().write(key, watched())

    checkpoints = CheckpointStore(CountingStore(store))
    with pytest.raises(CancelledWriteError):
        checkpoints.with_cancellation(cancellation).save(2, [lambda: {"c.bin": b"0123456789"}])
    checkpoints.remove_cancelled(600)
    assert taken == [b"01", b"23", b"45"]
    assert [file for file in Path(store.uri).rglob("*") if file.is_file()] == [], "no temporary file either"


def test_whoever_has_lost_the_lease_is_told_though_it_is_cancelled(store: LocalStore) -> None:
    cancellation = Cancellation()

    def fence() -> None:
        cancellation.cancel()
        raise LeaseLostError("another driver")

    with pytest.raises(LeaseLostError):
        CheckpointStore(store).with_cancellation(cancellation).save(2, pieces(), fence=fence)


def test_a_cancel_just_before_the_record_is_heard(store: LocalStore) -> None:
    checkpoints, cancellation = CheckpointStore(store), Cancellation()
    with pytest.raises(CancelledWriteError):
        checkpoints.with_cancellation(cancellation).save(2, pieces(), fence=cancellation.cancel)
    checkpoints.remove_cancelled()
    assert keys_of(store) == []


def test_what_is_recorded_stands_and_nothing_older_is_removed(store: LocalStore) -> None:
    cancellation = Cancellation()

    class CancellingStore(WrappedStore):
        def create(self, key: str, data: bytes) -> bool:
            cancellation.cancel()
            return super().create(key, data)

    before = CheckpointStore(store).save(1, pieces())
    checkpoints = CheckpointStore(CancellingStore(store))
    cancellable = checkpoints.with_cancellation(cancellation)
    record = cancellable.save(2, pieces())
    with pytest.raises(CancelledWriteError):
        cancellable.prune(record, Retention(last=1))
    checkpoints.remove_cancelled()
    assert list(checkpoints.records()) == [record, before]
    assert read_all(checkpoints, record) == FILES


# ---- in S3


@pytest.fixture
def s3_store(s3_server: S3Server, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """Behind the proxy, with the smallest parts, and waited for to the end of patience, a minute."""
    monkeypatch.setattr("pipeline.stores.patience._FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr("pipeline.stores.patience._LONGEST_PAUSE_S", 1000.0)
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    return S3Store(s3_server.bucket, uuid.uuid4().hex, part_bytes=SMALLEST_PART_BYTES)


def unfinished(server: S3Server, store: S3Store) -> list[str]:
    client = boto3.session.Session().client("s3", endpoint_url=server.endpoint)
    uploads = client.list_multipart_uploads(Bucket=server.bucket).get("Uploads", [])
    client.close()
    prefix = store.uri.removeprefix(f"{server.uri}/")
    return [upload["Key"] for upload in uploads if upload["Key"].startswith(prefix)]


def test_a_store_that_is_away_is_waited_for_no_longer(s3_store: S3Store, faulty_s3: FaultyProxy) -> None:
    checkpoints, cancellation = CheckpointStore(s3_store), Cancellation()
    faulty_s3.add(s3_error("SlowDown", 503))
    saved = saved_beside(checkpoints.with_cancellation(cancellation))
    while faulty_s3.count(Answer) < len(FILES):
        time.sleep(0.01)
    cancellation.cancel()
    with pytest.raises(CancelledWriteError):
        saved.result()
    (writer,) = checkpoints._cancelled
    assert writer.wait(600)
    assert {type(future.exception()) for future in writer._writing} == {CancelledWriteError}, "before patience ends"
    faulty_s3.clear()
    checkpoints.remove_cancelled()
    assert keys_of(s3_store) == []


def test_a_part_that_hangs_leaves_no_unfinished_upload(
    s3_server: S3Server, s3_store: S3Store, faulty_s3: FaultyProxy
) -> None:
    checkpoints, cancellation = CheckpointStore(s3_store), Cancellation()
    large = os.urandom(3 * SMALLEST_PART_BYTES)
    faulty_s3.add(Stall(), query="partNumber=2")
    with ThreadPoolExecutor(1) as pool:
        view = checkpoints.with_cancellation(cancellation)
        saved = pool.submit(lambda: view.save(2, [lambda: {"c.bin": large}]))
        while faulty_s3.count(Stall) == 0:
            time.sleep(0.01)
        cancellation.cancel()
        with pytest.raises(CancelledWriteError):
            saved.result()  # while the part hangs
    assert unfinished(s3_server, s3_store) != []
    faulty_s3.clear()
    faulty_s3.down().close()  # what hangs breaks off, and the server is there again
    checkpoints.remove_cancelled(600)
    assert keys_of(s3_store) == [] and unfinished(s3_server, s3_store) == []


def test_a_record_whose_answer_is_out_may_stand_and_keeps_its_files(s3_store: S3Store, faulty_s3: FaultyProxy) -> None:
    checkpoints, cancellation = CheckpointStore(s3_store), Cancellation()
    faulty_s3.add(LoseAnswer(), path=KEY_2)
    saved = saved_beside(checkpoints.with_cancellation(cancellation))
    while faulty_s3.count(LoseAnswer) == 0:
        time.sleep(0.01)
    cancellation.cancel()
    with pytest.raises(CancelledWriteError):
        saved.result()
    faulty_s3.clear()
    checkpoints.remove_cancelled()
    record = checkpoints.newest()
    assert record is not None and read_all(checkpoints, record) == FILES
