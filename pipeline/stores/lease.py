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
_INTERRUPT_INTERVAL_S = 30.0  # time to clean up in; a library may have swallowed the interrupt before


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
        followed: As the attribute.
    """

    def __init__(self, store: ObjectStore, record: LeaseRecord, etag: str, followed: str | None) -> None:
        """Start to renew it, from a thread."""
        self.followed = followed
        """The version of the record that it replaced, None: there was none. If it is what `lease_version` gave before,
        nobody has held the lease in between."""
        self._store, self._record, self._etag = store, record, etag
        self._interval_s = record.duration_s / _RENEWALS_PER_DURATION
        self._turn, self._ending = threading.Lock(), threading.Event()
        self._lost_to: str | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """What `holder_token` finds in the store for as long as the lease is held."""
        return self._record.token

    @property
    def is_lost(self) -> bool:
        """Whether somebody is known to have taken it."""
        return self._lost_to is not None

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

    def confirm(self) -> None:
        """Renew it now: before something that would harm another holder.

        Raises:
            LeaseLostError: If it is lost.
            StorageError: If the store does not answer.
        """
        self._renew(self._store)
        self.check()

    def end(self) -> None:
        """Renew it no more, and interrupt nobody from now on."""
        self._ending.set()
        # A renewal that is under way may still come to its end, and change which version is there.
        if self._turn.acquire(timeout=_RELEASE_TIMEOUT_S):
            self._turn.release()

    def release(self) -> None:
        """Give it back, so that the next driver need not wait; where the store is away, the next one waits it out."""
        if self._lost_to is not None:
            return
        try:
            store, record = self._store.with_patience(_RELEASE_TIMEOUT_S), replace(self._record, released=True)
            if store.replace(LEASE_KEY, to_json(record), self._etag) is None and holder_token(store) != self.token:
                say(f"{self._store.uri}: {_holder_of(store)} has taken over its lease at the very end")
        except PipelineError as error:
            say(
                f"{self._store.uri}: its lease could not be given back and ends after {self._record.duration_s:.0f} s "
                f"({error})"
            )

    def _keep(self) -> None:
        """In its own thread: renews until the end, or until the lease is lost; then interrupts until it is heard."""
        # A request that hangs must not take the time of those after it.
        store, failing = self._store.with_patience(self._interval_s), False
        while not self._ending.wait(_INTERRUPT_INTERVAL_S if self.is_lost else self._interval_s):
            try:
                if not self.is_lost:
                    self._renew(store)
                    failing = False
            except Exception as error:  # whatever it is: a lease that nobody renews is taken over
                if not failing:
                    say(f"{self._store.uri}: its lease could not be renewed ({error}); tried again")
                failing = True
            with self._turn:
                if self.is_lost and not self._ending.is_set():
                    _interrupt_main_thread()

    def _renew(self, store: ObjectStore) -> None:
        with self._turn:
            if self._ending.is_set() or self.is_lost:
                return
            record = replace(self._record, num_renewals=self._record.num_renewals + 1)
            etag = store.replace(LEASE_KEY, to_json(record), self._etag)
            if etag is None:
                etag = self._find_ours(store, record)
            if etag is None:
                self._lost_to = _holder_of(store)
                say(f"{self._store.uri}: {self._lost_to} has taken over its lease; this driver stops")
            else:
                self._record, self._etag = record, etag

    def _find_ours(self, store: ObjectStore, record: LeaseRecord) -> str | None:
        """The version that is there, if it is ours: renewed by a request of which nobody heard; or put back by us."""
        if _take_empty_place(store, record):
            return store.read_versioned(LEASE_KEY).etag
        found = store.read_versioned(LEASE_KEY)
        there = _parse(store, found.data)
        return found.etag if there is not None and there.token == self.token else None


@contextlib.contextmanager
def hold_lease(store: ObjectStore, *, duration_s: float) -> Iterator[Lease]:
    """Hold the lease of an output while the block runs, and release it however that ends.

    A lease that somebody holds is watched for up to its duration: renewed, it is theirs; unchanged, it is taken over.
    Where the lease is lost later, the main thread gets the signal of Ctrl-C or, where that is ignored, SIGTERM, until
    the block ends; however it ends then becomes LeaseLostError here.

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
        try:
            yield lease
        finally:
            lease.end()
        lease.check()
    except LeaseLostError:
        raise
    except BaseException as error:
        try:
            lease.check()
        except LeaseLostError as lost:
            raise lost from error
        raise
    finally:
        lease.release()


def lease_version(store: ObjectStore) -> str | None:
    """Which version of a lease's record an output has; None: it has none.

    Raises:
        StorageError: If the store gives no answer.
    """
    try:
        return store.read_versioned(LEASE_KEY).etag
    except ObjectMissingError:
        return None


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


def current_holder(store: ObjectStore) -> str | None:
    """Who holds the lease of an output, as a name for people; None: nobody. It may be dead: only watching it tells.

    Raises:
        StorageError: If the store gives no answer.
    """
    try:
        record = _parse(store, store.read(LEASE_KEY))
    except ObjectMissingError:
        return None
    return None if record is not None and record.released else _name(record)


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
            return Lease(store, ours, taken, etag)
    return Lease(store, ours, store.read_versioned(LEASE_KEY).etag, None)


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
