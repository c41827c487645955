"""Whoever waits for workers hears of storage that is away, and of nothing else."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.stores import waiting
from pipeline.stores.local_store import LocalStore
from pipeline.stores.s3_store import S3Store
from pipeline.stores.waiting import told_of_outages
from tests.faulty_proxy import FaultyProxy, s3_error
from tests.pipeline.storage_checks import OUR_SIDE


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_ASK_INTERVAL_S", 0.2)
    monkeypatch.setattr(waiting, "_SAY_INTERVAL_S", 1.0)


def slow(seconds: float) -> Iterator[int]:
    yield 1
    time.sleep(seconds)
    yield 2


@OUR_SIDE
def test_an_outage_is_told_while_nothing_comes(
    s3_store: S3Store, proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores, said = [LocalStore(tmp_path), s3_store], list[str]()

    def until_told_twice() -> Iterator[int]:
        yield 1
        while len(said) < 2:
            time.sleep(0.05)
            said.extend(capsys.readouterr().out.splitlines())
        yield 2

    with proxy.down():
        assert list(told_of_outages(until_told_twice(), stores, "shard")) == [1, 2]
    waited_s = [float(re.match(r"no shard has come for ([0-9.]+) s: ", line)[1]) for line in said]  # type: ignore[index]
    assert waited_s[1] - waited_s[0] > 0.85, "an interval of 1 s lies between them, told in tenths"
    assert s3_store.uri in said[0] and proxy.endpoint in said[0]


@OUR_SIDE
def test_slow_workers_are_no_outage(s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]) -> None:
    def as_slow_as_two_more_requests() -> Iterator[int]:
        num_before = len(proxy.requests)
        yield 1
        while len(proxy.requests) < num_before + 2:
            time.sleep(0.05)
        yield 2

    assert list(told_of_outages(as_slow_as_two_more_requests(), [s3_store], "shard")) == [1, 2]
    proxy.add(s3_error("AccessDenied", 403))
    assert list(told_of_outages(as_slow_as_two_more_requests(), [s3_store], "shard")) == [1, 2]
    assert capsys.readouterr().out == ""


@OUR_SIDE
def test_a_slow_reader_asks_nothing_and_the_end_ends_it(
    s3_store: S3Store, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_of_outages(slow(9), [s3_store], "shard")
    with proxy.down():
        next(told)
        time.sleep(0.8)
        told.close()
    assert (proxy.requests, capsys.readouterr().out) == ([], "")
