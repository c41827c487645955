"""Lines about storage that is away, from whoever waits for workers: nobody sees what they print."""

import threading
import time
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

from pipeline.errors import StorageAccessError, StorageError
from pipeline.progress import format_duration, say
from pipeline.stores.object_store import ObjectStore

T = TypeVar("T")

_ASK_INTERVAL_S = 20.0
_SAY_INTERVAL_S = 60.0
_ASKED_KEY = "manifest.json"


def told_of_outages(results: Iterable[T], stores: Sequence[ObjectStore], unit: str) -> Generator[T, None, None]:
    """Yield what workers make; while nothing comes, ask their stores, and say so, once a minute, if one is away.

    Args:
        results: What they make.
        stores: Where they read and write.
        unit: What a line calls one result.
    """
    waiting = _Waiting(stores, unit)
    thread = threading.Thread(target=waiting.watch, name="told-of-outages", daemon=True)
    thread.start()
    try:
        iterator = iter(results)
        while True:
            waiting.since_s = time.monotonic()
            try:
                result = next(iterator)
            except StopIteration:
                return
            waiting.since_s = None
            yield result
    finally:
        waiting.is_over.set()


class _Waiting:
    def __init__(self, stores: Sequence[ObjectStore], unit: str) -> None:
        self._stores, self._unit = [store.with_patience(0.0) for store in stores], unit
        self.since_s: float | None = None
        self.is_over = threading.Event()

    def watch(self) -> None:
        said_s = -_SAY_INTERVAL_S
        while not self.is_over.wait(_ASK_INTERVAL_S):
            since_s = self.since_s
            if since_s is None or time.monotonic() - max(since_s, said_s) < _ASK_INTERVAL_S:
                continue
            if time.monotonic() - said_s < _SAY_INTERVAL_S:
                continue
            error = self._outage()
            if error is not None and self.since_s == since_s and not self.is_over.is_set():
                said_s = time.monotonic()
                say(f"no {self._unit} has come for {format_duration(said_s - since_s)}: {error}")

    def _outage(self) -> StorageError | None:
        for store in self._stores:
            try:
                store.stat(_ASKED_KEY)
            except StorageAccessError:
                pass  # what workers may do there is not what is asked
            except StorageError as error:
                return error
        return None
