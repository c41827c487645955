"""Writing beside training: one thread does the jobs in order; what goes wrong there ends the run a little later.

A kind of job has one place: the next of its kind waits until the one before is done, since both use the same copy.
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from pipeline.stores.cancellation import Cancellation, CancelledWriteError

_WORTH_SAYING_S = 0.1
_T = TypeVar("_T")


class BackgroundWriter:
    """Does jobs on one thread, in the order in which they were started; after one that failed, none is done.

    Args:
        report: Takes the lines about waiting, and about an error that nobody else is told of.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        """The thread starts with the first job."""
        self._report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background-writer")
        self._jobs: dict[str, Future[None]] = {}
        self._cancellations: dict[str, Cancellation] = {}
        self._error: BaseException | None = None
        self._raised = False

    def wait(self, kind: str) -> None:
        """Wait until the latest job of a kind is done; a line says for how long.

        Raises:
            BaseException: What any job before has raised.
        """
        job = self._jobs.get(kind)
        if job is not None:
            started_s = time.perf_counter()
            job.exception()
            waited_s = time.perf_counter() - started_s
            if waited_s >= _WORTH_SAYING_S:
                self._report(f"waited {waited_s:.1f} s until the {kind} before was written")
        self.check()

    def wait_until(self, kind: str, milestone: Future[_T]) -> _T:
        """Wait until the latest job of a kind has set a result on its way, and not for what it does after that.

        Raises:
            BaseException: What any job so far has raised, if that comes first.
        """
        either: list[Future[Any]] = [milestone, self._jobs[kind]]
        wait(either, return_when=FIRST_COMPLETED)
        if not milestone.done():
            self.check()
        return milestone.result(timeout=0)

    def cancel(self, kind: str) -> None:
        """Tell the latest job of a kind to stop, and wait until it has; nothing happens if it is done.

        Raises:
            BaseException: What any job before, or this one, has raised, but for having been cancelled.
        """
        if kind in self._jobs:
            self._cancellations[kind].cancel()
            self._jobs[kind].exception()
        self.check()

    def check(self) -> None:
        """Wait for nothing.

        Raises:
            BaseException: What any job so far has raised.
        """
        if self._error is not None:
            self._raised = True
            raise self._error

    def start(self, kind: str, job: Callable[[], None], cancellation: Cancellation | None = None) -> None:
        """Hand over a job; call `wait` before what it reads is changed.

        Args:
            kind: Its kind.
            job: What is done.
            cancellation: What the job looks at, to stop when it is told to; None: it does not.
        """
        cancellation = self._cancellations[kind] = cancellation or Cancellation()
        self._jobs[kind] = self._pool.submit(self._do, job, cancellation)

    def finish(self) -> None:
        """Wait until all jobs are done.

        Raises:
            BaseException: What any of them has raised.
        """
        for job in self._jobs.values():
            job.exception()
        self.check()

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread; an error that was not raised yet is said, not raised."""
        self._pool.shutdown()
        if self._error is not None and not self._raised:
            self._report(f"writing beside training has failed: {self._error}")

    def _do(self, job: Callable[[], None], cancellation: Cancellation) -> None:
        if self._error is not None:
            return  # a checkpoint names the snapshots before it
        try:
            cancellation.check()
            job()
        except CancelledWriteError:
            pass  # whoever told it so needs nothing of it
        except BaseException as error:
            self._error = error
