"""Stores that do not keep their promises are refused by name, before a job writes what stands on them."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import StorageAccessError, StorageError, StorageUnfitError
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import num_waits
from pipeline.stores.probe import PROBE_PREFIX, check_conditions
from pipeline.stores.s3_store import S3Store
from pipeline.stores.storage import open_store
from tests.faulty_proxy import FaultyProxy, IgnoreConditions, LoseAnswer, s3_error
from tests.pipeline.storage_checks import OUR_SIDE, check_one_line, keys_of


def test_a_store_that_keeps_its_promises_passes(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.write("key", b"x")
    check_conditions(store)
    assert keys_of(store) == ["key"] and capsys.readouterr().out == ""


def test_nothing_stays_in_a_folder(tmp_path: Path) -> None:
    check_conditions(open_store(str(tmp_path / "store")))
    assert list((tmp_path / "store").iterdir()) == []


def test_few_requests_are_enough(s3_store: S3Store, proxy: FaultyProxy) -> None:
    check_conditions(s3_store)
    assert [request.method for request in proxy.requests] == ["PUT", "PUT", "GET", "PUT", "PUT", "GET", "DELETE"]
    assert all(f"/{PROBE_PREFIX}" in request.path for request in proxy.requests)


def test_a_store_that_ignores_if_none_match(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(IgnoreConditions())
    with pytest.raises(StorageUnfitError) as caught:
        check_conditions(s3_store)
    check_one_line(caught.value, s3_store.uri, "ignores If-None-Match", "use another store")
    proxy.clear()
    assert keys_of(s3_store) == []


def test_a_store_that_ignores_if_match(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(IgnoreConditions(), method="PUT", after=2)
    with pytest.raises(StorageUnfitError) as caught:
        check_conditions(s3_store)
    check_one_line(caught.value, s3_store.uri, "ignores If-Match", "use another store")
    proxy.clear()
    assert keys_of(s3_store) == []


@OUR_SIDE
def test_a_store_that_knows_no_version(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(s3_error("PreconditionFailed", 412), method="PUT", after=2)
    with pytest.raises(StorageUnfitError, match="for another"):
        check_conditions(s3_store)


@OUR_SIDE
def test_a_store_that_refuses_conditions(s3_store: S3Store, proxy: FaultyProxy) -> None:
    proxy.add(s3_error("NotImplemented", 501), method="PUT")
    with pytest.raises(StorageAccessError, match=r"NotImplemented.*If-None-Match"):
        check_conditions(s3_store)
    proxy.clear()
    proxy.add(s3_error("NotImplemented", 501), method="PUT", after=2)
    with pytest.raises(StorageAccessError, match=r"NotImplemented.*If-Match"):
        check_conditions(s3_store)


@OUR_SIDE
def test_a_store_that_forbids_deletes_passes_with_a_line(
    s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.add(s3_error("AccessDenied", 403), method="DELETE")
    check_conditions(s3_store)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "AccessDenied" in said[0] and "stays" in said[0]


@OUR_SIDE
def test_what_was_not_made_is_not_removed(
    s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.add(s3_error("AccessDenied", 403))
    with pytest.raises(StorageAccessError, match="AccessDenied"):
        check_conditions(s3_store)
    assert [request.method for request in proxy.requests] == ["PUT"] and capsys.readouterr().out == ""


@OUR_SIDE
def test_an_outage_is_told_once_and_waited_for_once(
    s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of what may have been made has a patience of its own: here none."""
    monkeypatch.setattr("pipeline.stores.probe.PROBE_PATIENCE_S", 1.0)
    monkeypatch.setattr("pipeline.stores.probe._REMOVAL_PATIENCE_S", 0.0)
    monkeypatch.setattr("pipeline.stores.patience._SILENT_S", 0.0)
    monkeypatch.setattr("pipeline.stores.patience._said_at_s", {})
    delete, pauses = S3Store.delete, list[int]()

    def count_pauses(self: S3Store, key: str) -> None:
        before = num_waits()
        try:
            delete(self, key)
        finally:
            pauses.append(num_waits() - before)

    monkeypatch.setattr(S3Store, "delete", count_pauses)
    before = num_waits()
    with proxy.down(), pytest.raises(StorageError):
        check_conditions(s3_store)
    assert pauses == [0] and num_waits() > before
    (line,) = capsys.readouterr().out.splitlines()
    assert "gives no answer" in line


def test_lost_answers_are_no_fault_of_the_store(s3_store: S3Store, proxy: FaultyProxy) -> None:
    for after in (0, 2):
        proxy.add(LoseAnswer(), method="PUT", after=after, times=1)
    check_conditions(s3_store)
    assert proxy.count(LoseAnswer) == 2


@OUR_SIDE
def test_nobody_waits_long_before_a_job(s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stores.probe.PROBE_PATIENCE_S", 0.3)
    started_s = time.monotonic()
    with proxy.down(), pytest.raises(StorageError) as caught:
        check_conditions(s3_store)
    assert time.monotonic() - started_s < 100
    check_one_line(caught.value, s3_store.uri, "AWS_ENDPOINT_URL")


def refusing(number: int) -> object:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT answers; there is none that a test may mount."""
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    with pytest.raises(StorageAccessError, match="hard links"):
        check_conditions(open_store(str(tmp_path / "store")))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems answer."""
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    with pytest.raises(StorageAccessError, match=r"cannot lock.*locks") as caught:
        check_conditions(open_store(str(tmp_path / "store")))
    check_one_line(caught.value, str(tmp_path))


@OUR_SIDE
def test_a_job_asks_before_it_starts_ray(
    s3_store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(*_: object) -> NoReturn:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("pipeline.data.prepare.ray_session", no_ray)
    config = PrepareConfig(dataset=f"{s3_store.uri}/dataset")
    proxy.add(IgnoreConditions())
    with pytest.raises(StorageUnfitError, match="ignores If-None-Match"):
        prepare(config)
    proxy.clear()
    with pytest.raises(AssertionError, match="a cluster was started"):
        prepare(config)
