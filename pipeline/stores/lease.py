"""A lease on an output: one driver at a time works there, and a second one leaves before it has begun.

A record in the store says who holds it and how often it has been renewed. Nobody's wall clock matters: a newcomer
watches the record, and takes over only when it has not changed for the lease's duration on the newcomer's own clock. A
lease saves work. Safety comes from the records that are created once, so that a holder that is cut off from the store
for longer than its lease, and goes on until it hears of that, harms nothing.
"""

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config_io import read_record, to_json
from pipeline.errors import LeaseHeldError, LeaseLostError, ObjectMissingError, PipelineError, UsageError
from pipeline.progress import say
from pipeline.stores.object_store import ObjectStore

LEASE_KEY = "lease.json"
_RENEWALS_PER_DURATION = 4
_LOOKS_PER_DURATION = 20
_RELEASE_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRecord:
    """What the store says about who works there."""

    format_version: int = 2
    """Version of this record's form."""
    token: str
    """Random name of this holding; two of one process differ."""
    holder: str
    """Who it is, for people: process and machine."""
    duration_s: float
    """Seconds without a renewal after which it is stale."""
    num_renewals: int = 0
    """Renewals so far; what makes each version of the record another one."""
    released: bool = False
    """Whether the holder has ended in good order: whoever comes next need not wait."""


class Lease:
    """A lease that this process holds; `hold_lease` makes it.

    Args:
        store: The output.
        record: What stands there.
        etag: Which version of it.
    """

    def __init__(self, store: ObjectStore, record: LeaseRecord, etag: str) -> None:
        """Start to renew it, from a thread."""
        self._store, self._record, self._etag = store, record, etag
        self._ending = threading.Event()
        self._lost_to: str | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that nobody has taken the lease, as far as is known here; asks nobody.

        Raises:
            LeaseLostError: If it is lost; names who has it.
        """
        if self._lost_to is not None:
            raise LeaseLostError(
                f"{self._store.uri}: {self._lost_to} has taken over its lease, so this driver stops; nothing that it "
                "recorded is lost"
            )

    def release(self) -> None:
        """End it, so that the next driver need not wait; where the store is away, the next one waits it out."""
        self._ending.set()
        self._thread.join(_RELEASE_TIMEOUT_S)
        if self._lost_to is not None:
            return
        if self._thread.is_alive():  # it waits for a store that is away
            say(f"{self._store.uri}: its lease could not be given back; it ends after {self._record.duration_s:.0f} s")
            return
        try:
            self._store.replace(LEASE_KEY, to_json(replace(self._record, released=True)), self._etag)
        except PipelineError as error:
            say(f"{self._store.uri}: its lease could not be given back ({error})")

    def _renew(self) -> None:
        while not self._ending.wait(self._record.duration_s / _RENEWALS_PER_DURATION):
            try:
                self._renew_once()
            except PipelineError as error:
                say(f"{self._store.uri}: its lease could not be renewed ({error}); tried again")
            if self._lost_to is not None:
                say(f"{self._store.uri}: {self._lost_to} has taken over its lease; this driver stops")
                _interrupt_main_thread()
                return

    def _renew_once(self) -> None:
        record = replace(self._record, num_renewals=self._record.num_renewals + 1)
        etag = self._store.replace(LEASE_KEY, to_json(record), self._etag)
        if etag is None and not _take_empty_place(self._store, record):
            self._lost_to = _holder_of(self._store)
            return
        self._record = record
        self._etag = etag or self._store.read_versioned(LEASE_KEY).etag


@contextlib.contextmanager
def hold_lease(store: ObjectStore, *, duration_s: float) -> Iterator[Lease]:
    """Hold the lease of an output while the block runs, and release it however that ends.

    A lease that somebody holds is watched for up to its duration: renewed, it is theirs; unchanged, it is taken over.
    Where the lease is lost later, the main thread gets the signal of Ctrl-C or, where that is ignored, SIGTERM, and
    what that raises becomes LeaseLostError here.

    Args:
        store: The output.
        duration_s: Seconds without a renewal after which others may take over; renewed four times as often.

    Raises:
        LeaseHeldError: If another driver works here; nothing was changed.
        LeaseLostError: If another driver took over, because this one could not renew the lease.
        StorageError: If the store gives no answer.
    """
    lease = _acquire(store, duration_s)
    try:
        yield lease
        lease.check()
    except (KeyboardInterrupt, SystemExit) as stop:
        try:
            lease.check()
        except LeaseLostError as lost:
            raise lost from stop
        raise
    finally:
        lease.release()


def _acquire(store: ObjectStore, duration_s: float) -> Lease:
    ours = LeaseRecord(
        token=secrets.token_hex(8), holder=f"process {os.getpid()} on {socket.gethostname()}", duration_s=duration_s
    )
    while not _take_empty_place(store, ours):
        with contextlib.suppress(ObjectMissingError):  # removed meanwhile: its place is empty
            etag = _wait_until_free(store, duration_s)
            taken = store.replace(LEASE_KEY, to_json(ours), etag)
            if taken is None:
                raise _held(store, _holder_of(store))
            return Lease(store, ours, taken)
    return Lease(store, ours, store.read_versioned(LEASE_KEY).etag)


def _take_empty_place(store: ObjectStore, record: LeaseRecord) -> bool:
    return store.create(LEASE_KEY, to_json(record))


def _wait_until_free(store: ObjectStore, duration_s: float) -> str:
    """The version of a lease that was released, or that nobody renewed for its duration.

    Raises:
        LeaseHeldError: If it was renewed.
        ObjectMissingError: If it was removed.
    """
    seen, said, since_s = store.read_versioned(LEASE_KEY), False, time.monotonic()
    while True:
        record = _parse(store, seen.data)
        if record is not None and record.released:
            return seen.etag
        patience_s = duration_s if record is None else max(duration_s, record.duration_s)
        if time.monotonic() - since_s >= patience_s:
            say(f"{store.uri}: {_name(record)} has not renewed its lease for {patience_s:.0f} s; taking over")
            return seen.etag
        if not said:
            say(f"{store.uri}: {_name(record)} has a lease here; watching for up to {patience_s:.0f} s if it is alive")
            said = True
        time.sleep(patience_s / _LOOKS_PER_DURATION)
        now = store.read_versioned(LEASE_KEY)
        if now.etag != seen.etag and not _is_released(store, now.data):
            raise _held(store, _name(_parse(store, now.data)))
        seen = now


def _is_released(store: ObjectStore, data: bytes) -> bool:
    record = _parse(store, data)
    return record is not None and record.released


def _held(store: ObjectStore, holder: str) -> LeaseHeldError:
    return LeaseHeldError(
        f"{store.uri}: {holder} works here at this moment; wait until it has ended, or name another output"
    )


def _holder_of(store: ObjectStore) -> str:
    try:
        return _name(_parse(store, store.read(LEASE_KEY)))
    except ObjectMissingError:
        return _name(None)


def _parse(store: ObjectStore, data: bytes) -> LeaseRecord | None:
    """None for what is damaged, or of another version of this program: it can be watched all the same."""
    try:
        return read_record(LeaseRecord, data, f"{store.uri}/{LEASE_KEY}", remedy="name another output")
    except UsageError:
        return None


def _name(record: LeaseRecord | None) -> str:
    return "another driver" if record is None else record.holder


def _interrupt_main_thread() -> None:
    """What it raises there is taken for Ctrl-C by all that clean up, and for a lost lease by `hold_lease`."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(signum)):
            signal.pthread_kill(threading.main_thread().ident or 0, signum)
            return


def holder_token(store: ObjectStore) -> str | None:
    """The token of whoever holds the lease of an output, or held it last; None if there is no readable lease.

    Raises:
        StorageError: If the store gives no answer.
    """
    try:
        record = _parse(store, store.read(LEASE_KEY))
    except ObjectMissingError:
        return None
    return None if record is None else record.token
