"""A bounded queue between training and a tracking server that may be slow, away, or picky.

Putting never blocks and never raises. One background thread sends in order, in batches, and tries again with a growing
pause for as long as the server is away. What the server refuses for good, and what does not fit, is counted as lost.
This module knows no server: it is given functions that send, and they must be safe to repeat.
"""

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.redact import redact
from pipeline.stores.cancellation import Cancellation

BATCH_POINTS = 1000  # MLflow's limit for one request
_GATHER_S = 1.0  # so that a fast training loop makes one request a second, not one a step
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_TASK_ATTEMPTS = 3
_MAX_REASONS = 20


class RefusedError(Exception):
    """The server answered, and will never take this: sending it again is of no use."""


class DeniedError(Exception):
    """The server answered, and takes nothing from us as things are; somebody may correct that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricPoint:
    """One value of a curve. The time is fixed when it is made: a point that is sent twice is stored once."""

    key: str
    """Name of the curve."""
    value: float
    """Its value; may be NaN."""
    step: int
    """Training step."""
    time_ms: int
    """Milliseconds since 1970 (UTC)."""
    is_resent: bool = False
    """From a process before this one, which had queued it: sent whatever steps the server has."""


@dataclass(kw_only=True, slots=True)
class _Entry:
    """What stays together in one request: the points of one call, or one task."""

    points: tuple[MetricPoint, ...] = ()
    task: Callable[[], object] | None = None
    name: str = ""

    @property
    def size(self) -> int:
        return len(self.points) if self.task is None else 1


class MetricQueue:
    """Sends points and small tasks from one background thread.

    Args:
        send: Sends up to 1000 points in one request. RefusedError: never try again; anything else: later.
        ping: Returns if the server is there; called when something failed, to know whose fault it was. RefusedError:
            the server takes nothing of this run any more.
        say: Prints one line: when the server goes away, when it is back, what was refused.
        where: What the lines call the server.
        max_points: Points kept while the server is away (about 200 bytes each).
        max_tasks: Tasks kept while the server is away.
    """

    def __init__(
        self,
        send: Callable[[Sequence[MetricPoint]], None],
        ping: Callable[[], None],
        say: Callable[[str], None],
        where: str,
        *,
        max_points: int = 200_000,
        max_tasks: int = 200,
    ) -> None:
        """Start empty; the thread starts with the first entry."""
        self._send, self._ping, self._say, self._where = send, ping, say, where
        self._max_points, self._max_tasks = max_points, max_tasks
        self._changed = threading.Condition()
        self._entries: deque[_Entry] = deque()
        self._num_points = self._num_tasks = self._num_lost = self._num_failures = 0
        self._hurry = self._closing = self._away = self._denied = self._full = False
        self._refused = Counter[str]()
        self._thread: threading.Thread | None = None
        self.unsent_names: tuple[str, ...] = ()
        """What `close` left of the tasks, by name."""

    def put_points(self, points: Sequence[MetricPoint]) -> None:
        """Queue the points of one step; they are sent together (in chunks of 1000)."""
        for start in range(0, len(points), BATCH_POINTS):
            self._put(_Entry(points=tuple(points[start : start + BATCH_POINTS])))

    def put_task(self, name: str, task: Callable[[], object]) -> None:
        """Queue something else to do at the server, such as an upload; `name` is what a line calls it."""
        self._put(_Entry(task=task, name=name))

    def unsent(self, last_step: int) -> list[MetricPoint]:
        """The points of steps up to one that the server has not taken yet, as far as is known; they stay queued."""
        with self._changed:
            return [point for entry in self._entries for point in entry.points if point.step <= last_step]

    def count_lost(self, num: int, why: str) -> None:
        """Count something as lost and say why."""
        with self._changed:
            self._num_lost += num
        self._say(f"MLflow at {self._where}: {why}")

    def _refuse(self, num: int, what: str, error: Exception) -> None:
        """Counts something as lost; says so for the first of each reason, `close` counts the others."""
        reason = _reason(error)
        kind = re.sub(r"\d+", "N", reason)
        with self._changed:
            if kind not in self._refused and len(self._refused) >= _MAX_REASONS:
                kind = "of other reasons"
            is_new = kind not in self._refused
            self._refused[kind] += 0 if is_new else num
        if is_new:
            self.count_lost(num, f"{what} ({reason})")
        else:
            with self._changed:
                self._num_lost += num

    def flush(self, timeout_s: float, waiting: Cancellation | None = None) -> int:
        """Send what is queued; gives up early when the server does not answer.

        Args:
            timeout_s: Longest wait in seconds.
            waiting: Cancelled when it is not to be waited for any longer.

        Returns:
            How many points and tasks are still queued; they are kept.
        """
        deadline_s, waiting = time.monotonic() + timeout_s, waiting or Cancellation()
        with waiting.calling(self._wake), self._changed:
            failures = self._num_failures
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._entries or self._num_failures > failures or waiting.is_cancelled,
                max(0.0, deadline_s - time.monotonic()),
            )
            self._hurry = False
            return self._num_points + self._num_tasks

    def close(self, timeout_s: float, kept_to_step: int = -1) -> int:
        """Send what is queued, for as long as that takes up to `timeout_s`, and stop the thread.

        Args:
            timeout_s: Longest wait in seconds.
            kept_to_step: Points of steps up to this one are not lost if they are not sent: somebody has kept them.

        Returns:
            How many points and tasks were lost, now or before.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.flush(deadline_s - time.monotonic()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._num_lost += self._num_points + self._num_tasks - len(self.unsent(kept_to_step))
            self.unsent_names = tuple(entry.name for entry in self._entries if entry.task)
            self._entries.clear()
            self._num_points = self._num_tasks = 0
            num_lost, refused, self._refused = self._num_lost, self._refused, Counter()
        for reason, num in refused.items():
            if num:
                self._say(f"MLflow at {self._where}: so were {num} more values or files ({reason})")
        return num_lost

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _put(self, entry: _Entry) -> None:
        with self._changed:
            full = (
                self._num_tasks >= self._max_tasks if entry.task else self._num_points + entry.size > self._max_points
            )
            if full or self._closing:
                self._num_lost += entry.size
                first_time, self._full = not self._full, True
            else:
                first_time = False
                self._entries.append(entry)
                self._count(entry, 1)
                self._changed.notify_all()
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._work, name="metric-queue", daemon=True)
                self._thread.start()
        if first_time:
            self._say(
                f"MLflow at {self._where}: the queue is full or closed, further metrics are lost until it empties"
            )

    def _count(self, entry: _Entry, sign: int) -> None:
        if entry.task:
            self._num_tasks += sign
        else:
            self._num_points += sign * entry.size

    def _work(self) -> None:
        pause_s = 0.0
        while True:
            batch = self._next_batch(pause_s)
            if batch is None:
                return
            try:
                self._send_batch(batch)
            except Exception as error:  # the thread must outlive whatever a client library raises
                pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
                self._note_failure(error)
            else:
                pause_s = 0.0
                self._note_success(batch)

    def _next_batch(self, pause_s: float) -> list[_Entry] | None:
        """Waits until something is due and returns it, still queued; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._closing)
            # After a failure a flush does not shorten the pause to nothing: it waits at most the first pause.
            wait_s = pause_s or _GATHER_S
            floor_s = min(pause_s, _FIRST_PAUSE_S)
            started_s = time.monotonic()
            if floor_s:
                self._changed.wait_for(lambda: self._closing, floor_s)
            self._changed.wait_for(
                lambda: self._hurry or self._closing or (not pause_s and self._num_points >= BATCH_POINTS),
                max(0.0, wait_s - (time.monotonic() - started_s)),
            )
            if self._closing:
                return None
            batch: list[_Entry] = []
            for entry in self._entries:
                if batch and (entry.task or batch[0].task or sum(e.size for e in batch) + entry.size > BATCH_POINTS):
                    break
                batch.append(entry)
            return batch

    def _send_batch(self, batch: list[_Entry]) -> None:
        if batch[0].task is None:
            self._send_points([point for entry in batch for point in entry.points])
        else:
            self._do_task(batch[0].name, batch[0].task)

    def _do_task(self, name: str, task: Callable[[], object]) -> None:
        """Does a task; one that fails while the server is there is given up after a few attempts."""
        for attempt in range(1, _TASK_ATTEMPTS + 1):
            try:
                task()
                return
            except Exception as error:
                gone = self._why_gone()  # raises if the server is away: then the task stays queued and is not to blame
                if gone or isinstance(error, RefusedError) or attempt == _TASK_ATTEMPTS:
                    self._refuse(1, f"{name} was lost", gone or error)
                    return
            time.sleep(attempt * _FIRST_PAUSE_S)

    def _send_points(self, points: Sequence[MetricPoint]) -> None:
        try:
            self._send(points)
        except RefusedError as error:
            if gone := self._why_gone():
                self._refuse(len(points), f"{len(points)} values were lost", gone)
            else:
                self._isolate(points, error)

    def _isolate(self, points: Sequence[MetricPoint], error: RefusedError) -> None:
        """Of points that were refused together, finds those that are to blame by halving; the others arrive."""
        if len(points) == 1:
            self._refuse(1, f"refused {points[0].key!r} of step {points[0].step}", error)
            return
        for half in (points[: len(points) // 2], points[len(points) // 2 :]):
            try:
                self._send(half)
            except RefusedError as refused:
                self._isolate(half, refused)

    def _why_gone(self) -> RefusedError | None:
        """Why the server takes nothing of this run any more; None if it does. Raises if the server is away."""
        try:
            self._ping()
        except RefusedError as gone:
            return gone
        return None

    def _note_success(self, batch: list[_Entry]) -> None:
        with self._changed:
            for entry in batch:
                if self._entries and self._entries[0] is entry:  # close() may have emptied the queue meanwhile
                    self._entries.popleft()
                    self._count(entry, -1)
            back, self._away, self._full = self._away, False, False
            num_left = self._num_points
            self._changed.notify_all()
        if back:
            self._say(f"MLflow at {self._where} answers again; {num_left} kept metrics follow")

    def _note_failure(self, error: Exception) -> None:
        denied = isinstance(error, DeniedError)
        with self._changed:
            self._num_failures += 1
            first = not self._closing and (not self._away or self._denied is not denied)
            self._away, self._denied = True, denied
            self._changed.notify_all()
        if first:
            reason = _reason(error)
            self._say(
                f"MLflow at {self._where} {f'takes nothing: {reason}' if denied else f'does not answer ({reason})'}; "
                f"the run goes on, up to {self._max_points} metrics are kept and sent later"
            )


def _reason(error: BaseException) -> str:
    return redact(" ".join(str(error).split()) or type(error).__name__)[:400]
