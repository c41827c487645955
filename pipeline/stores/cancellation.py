"""Work that may be told to stop: at its next safe point, and out of what it waits for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CancelledWriteError(BaseException):
    """Work has stopped because it was told to. It is no failure, so nothing that handles failures may catch it."""


class Cancellation:
    """Tells work to stop, from another thread; once it is told it stays so.

    Args:
        parent: Larger work, of which this is a part: where it is told to stop, this is too.
    """

    def __init__(self, parent: "Cancellation | None" = None) -> None:
        """Nothing is told yet."""
        self.event = threading.Event()
        """Set when the work is told to stop; for what can wait for an event."""
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        if parent is not None:
            parent._add(self.cancel)

    @property
    def is_cancelled(self) -> bool:
        """Whether the work is told to stop."""
        return self.event.is_set()

    def cancel(self) -> None:
        """Tell the work to stop; safe to repeat."""
        with self._lock:
            self.event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def check(self) -> None:
        """Stop here if told to.

        Raises:
            CancelledWriteError: If it is.
        """
        if self.is_cancelled:
            raise CancelledWriteError

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """In the block: have something called, by whoever cancels; at once if that has happened before."""
        self._add(callback)
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

    def _add(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self.is_cancelled:
                self._callbacks.append(callback)
                return
        callback()
