"""One driver at a time: a second one leaves, a dead one's lease is taken over, a lost one stops its holder."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config_io import to_json
from pipeline.errors import LeaseHeldError, LeaseLostError, StorageError
from pipeline.stores import lease as lease_module
from pipeline.stores.lease import LEASE_KEY, LeaseRecord, hold_lease, holder_token
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore, Versioned
from pipeline.stores.storage import open_store
from tests.faulty_proxy import FaultyProxy, Stall
from tests.fixtures_s3 import S3Server
from tests.pipeline.storage_checks import WATCHED_S, check_one_line, looking_often

SHORT_S = 1.0

HOLDER = """
import sys, time; from pipeline.stores.lease import hold_lease; from pipeline.stores.storage import open_store
with hold_lease(open_store(sys.argv[1]), duration_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def record_in(store: ObjectStore) -> dict[str, object]:
    found: dict[str, object] = json.loads(store.read(LEASE_KEY))
    return found


@contextlib.contextmanager
def held_by_another_process(store: ObjectStore) -> Iterator[subprocess.Popen[bytes]]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, store.uri, str(SHORT_S)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_second_driver_leaves_and_a_dead_ones_lease_is_taken_over(
    store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_by_another_process(store) as holder:
        for _ in range(2):
            with looking_often(), pytest.raises(LeaseHeldError) as caught, hold_lease(store, duration_s=WATCHED_S):
                pytest.fail("held by another")
            check_one_line(caught.value, store.uri, f"process {holder.pid} on ", "works here", "name another output")
        assert record_in(store)["holder"] == caught.value.args[0].split(": ")[1].split(" works")[0], "untouched"
        holder.kill()
        holder.wait()
        begun_s = time.monotonic()
        with hold_lease(store, duration_s=SHORT_S):
            assert time.monotonic() - begun_s >= SHORT_S, "not before it was stale"
            assert record_in(store)["released"] is False
        assert "has not renewed its lease for 1 s; taking over" in capsys.readouterr().out


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_every_orderly_end_gives_the_lease_back(store: ObjectStore, end: type[BaseException] | None) -> None:
    with contextlib.ExitStack() as ends:
        if end is not None:
            ends.enter_context(pytest.raises(end))
        with hold_lease(store, duration_s=1000):
            if end is not None:
                raise end
    begun_s = time.monotonic()
    with hold_lease(store, duration_s=1000):
        assert time.monotonic() - begun_s < 100, "a lease that was given back is free at once"


def test_a_lease_is_renewed_for_as_long_as_it_is_held(store: ObjectStore) -> None:
    with hold_lease(store, duration_s=0.2):
        seen = set()
        while len(seen) < 4:
            seen.add(record_in(store)["num_renewals"])
    assert record_in(store)["released"] is True


class ReadByAllFirst:
    """A store whose first read of each thread comes back when so many have read."""

    def __init__(self, store: ObjectStore, num_threads: int) -> None:
        self._store, self._together, self._has_read = store, threading.Barrier(num_threads), threading.local()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read_versioned(self, key: str) -> Versioned:
        found = self._store.read_versioned(key)
        if not hasattr(self._has_read, "once"):
            self._has_read.once = True
            self._together.wait()
        return found


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_newcomers_one_gets_it(store: ObjectStore, stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stale lease all have seen the same version before its time is over."""
    duration_s = 0.5 if stale else WATCHED_S
    monkeypatch.setattr(lease_module, "_LOOKS_PER_DURATION", duration_s / 0.05)
    monkeypatch.setattr(lease_module, "_RENEWALS_PER_DURATION", duration_s / 0.1)
    shared: Any = store
    if stale:
        store.create(LEASE_KEY, to_json(LeaseRecord(token="0", holder="a dead process", duration_s=0.3)))
        shared = ReadByAllFirst(store, 6)
    barrier, done = threading.Barrier(6), threading.Event()

    def come(_: int) -> bool:
        barrier.wait()
        try:
            with hold_lease(shared, duration_s=duration_s):
                done.wait()  # until all others have left
                return True
        except LeaseHeldError:
            return False
        finally:
            left.release()

    left = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(come, number) for number in range(6)]
        have_left = [left.acquire(timeout=60) for _ in range(5)]
        done.set()
        assert all(have_left) and sorted(result.result() for result in results) == [False] * 5 + [True]


class WrittenAfterEachRead(LocalStore):
    """A store in which somebody changes what was read."""

    def read_versioned(self, key: str) -> Versioned:
        found = super().read_versioned(key)
        self.write(key, found.data + b" ")
        return found


@pytest.mark.parametrize("data", [b"{", b'{"format_version": 3}', b""])
def test_a_lease_that_cannot_be_read_is_watched_all_the_same(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    store.create(LEASE_KEY, data)
    with hold_lease(store, duration_s=0.3) as lease:
        lease.check()
    changing = WrittenAfterEachRead(tmp_path / "changing")
    changing.create(LEASE_KEY, data)
    with pytest.raises(LeaseHeldError, match="another driver works here"), hold_lease(changing, duration_s=10):
        pytest.fail("somebody writes there")


def take_over(store: ObjectStore) -> None:
    """As a newcomer does who saw no renewal for the duration: what a holder that was suspended finds."""
    while True:
        found = store.read_versioned(LEASE_KEY)
        theirs = LeaseRecord(token="theirs", holder="process 1 on elsewhere", duration_s=1000)
        if store.replace(LEASE_KEY, to_json(theirs), found.etag) is not None:
            return


def work_on() -> None:
    """As a job that nothing stops."""
    time.sleep(60)
    raise AssertionError("it was not stopped")


def test_a_holder_that_lost_its_lease_stops(store: ObjectStore) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would have it ignored
    try:
        with pytest.raises(LeaseLostError) as caught, hold_lease(store, duration_s=0.4):
            take_over(store)
            work_on()
    finally:
        signal.signal(signal.SIGINT, before)
    check_one_line(caught.value, store.uri, "process 1 on elsewhere has taken over", "nothing that it recorded is lost")
    assert record_in(store)["token"] == "theirs" and record_in(store)["released"] is False, "theirs is left alone"


def test_it_stops_where_ctrl_c_is_ignored_too(tmp_path: Path) -> None:
    def terminate(signum: int, frame: object) -> None:
        raise SystemExit(signum)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(LeaseLostError), hold_lease(LocalStore(tmp_path), duration_s=0.4):
            take_over(LocalStore(tmp_path))
            work_on()
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])


def test_a_lost_lease_is_found_at_the_end_at_the_latest(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(LeaseLostError), hold_lease(LocalStore(tmp_path), duration_s=0.4) as lease:
            take_over(LocalStore(tmp_path))
            while not lease.is_lost:  # pytest's own limit ends a wait for nothing
                time.sleep(0.02)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_lease_that_somebody_removed_is_put_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with hold_lease(store, duration_s=0.4):
        token = record_in(store)["token"]
        store.delete(LEASE_KEY)
        while store.stat(LEASE_KEY) is None:
            time.sleep(0.02)
        assert record_in(store)["token"] == token
    assert record_in(store)["released"] is True


class Moody(LocalStore):
    """A store whose replacements can fail, or be done without an answer."""

    error: Exception | None = None
    loses_answers = False
    num_failed = 0

    def with_patience(self, at_most_s: float) -> "Moody":
        return self

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        if self.error is not None:
            if self.loses_answers:
                super().replace(key, data, etag)
            self.num_failed += 1
            raise self.error
        return super().replace(key, data, etag)


def wait_for_a_renewal(store: ObjectStore) -> None:
    before = record_in(store)["num_renewals"]
    while record_in(store)["num_renewals"] == before:
        time.sleep(0.02)


@pytest.mark.parametrize("error", [StorageError("away"), RuntimeError("away")])
@pytest.mark.parametrize("loses_answers", [False, True])
def test_a_store_that_is_away_costs_no_lease(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, loses_answers: bool
) -> None:
    """A renewal that was done without an answer is our own: what stands there then is no other driver's."""
    store = Moody(tmp_path)
    with hold_lease(store, duration_s=0.2) as lease:
        store.error, store.loses_answers = error, loses_answers
        while store.num_failed < 3:
            time.sleep(0.02)
        store.error = None
        wait_for_a_renewal(store)
        lease.confirm()
        assert not lease.is_lost
    assert capsys.readouterr().out.count("could not be renewed (away); tried again") == 1
    assert record_in(store)["released"] is True


def test_a_lease_that_cannot_be_given_back_ends_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Moody(tmp_path)
    with hold_lease(store, duration_s=1000):
        store.error = StorageError("away")
    assert "its lease could not be given back and ends after 1000 s (away)" in capsys.readouterr().out


def test_an_answer_that_never_comes_costs_no_lease(faulty_s3: FaultyProxy, s3_server: S3Server) -> None:
    """A newcomer waits for the whole duration: a renewal that hangs is given up, and made again, before that."""
    store = open_store(f"{s3_server.uri}/{uuid.uuid4().hex}")
    with hold_lease(store, duration_s=8) as lease:
        faulty_s3.add(Stall(), method="PUT", times=1)
        while faulty_s3.count(Stall) == 0:
            time.sleep(0.02)
        with pytest.raises(LeaseHeldError):
            lease_module._wait_until_free(store, 8)  # what a newcomer does, who asks for nothing yet
        assert not lease.is_lost


def test_what_would_harm_another_holder_is_confirmed(tmp_path: Path) -> None:
    with pytest.raises(LeaseLostError), hold_lease(LocalStore(tmp_path), duration_s=1000) as lease:
        lease.confirm()
        assert holder_token(LocalStore(tmp_path)) == lease.token
        take_over(LocalStore(tmp_path))
        lease.check()  # nobody has told it
        lease.confirm()
    assert holder_token(LocalStore(tmp_path)) == "theirs"


def test_a_holder_that_swallows_the_interrupt_is_interrupted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_INTERRUPT_INTERVAL_S", 0.3)
    swallowed = 0
    with pytest.raises(LeaseLostError), hold_lease(LocalStore(tmp_path), duration_s=0.4):
        take_over(LocalStore(tmp_path))
        while swallowed < 2:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                swallowed += 1
        time.sleep(60)


@pytest.mark.parametrize("error", [RuntimeError("a consequence"), SystemExit(15)])
def test_whatever_ends_a_holder_that_lost_its_lease_is_a_lost_lease(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(LeaseLostError) as caught, hold_lease(LocalStore(tmp_path), duration_s=1000) as lease:
        take_over(LocalStore(tmp_path))
        with contextlib.suppress(LeaseLostError):
            lease.confirm()
        raise error
    assert caught.value.__cause__ is error


def test_two_holdings_of_one_process_differ(tmp_path: Path) -> None:
    tokens = set()
    for _ in range(3):
        with hold_lease(LocalStore(tmp_path), duration_s=10):
            tokens.add(record_in(LocalStore(tmp_path))["token"])
    assert len(tokens) == 3


def test_the_token_of_the_last_holder_is_known_after_its_end_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert holder_token(store) is None
    with hold_lease(store, duration_s=60):
        first = holder_token(store)
    assert first and holder_token(store) == first
    with hold_lease(store, duration_s=60):
        assert holder_token(store) not in (None, first)
    store.write(LEASE_KEY, b"damaged")
    assert holder_token(store) is None
