"""How a training run's progress reaches the driver: a small actor that rank 0 writes to and the driver reads.

Ray can forward what workers print, but only together with everything else that they print.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.progress import Progress, say

_POLL_INTERVAL_S = 1.0


@dataclass(kw_only=True, slots=True)
class BoardState:
    """What the driver shows."""

    step: int
    """Steps done."""
    note: str = ""
    """The latest loss, in words."""
    lines: list[str] = field(default_factory=list)
    """Lines to print, in order; each is handed out once."""


class _Board:
    def __init__(self, step: int) -> None:
        self._state, self._failure = BoardState(step=step), ""

    def update(self, step: int, note: str) -> None:
        self._state.step, self._state.note = step, note

    def say(self, line: str) -> None:
        self._state.lines.append(line)

    def fail(self, message: str) -> None:
        self._failure = message

    def failure(self) -> str:
        return self._failure

    def read(self) -> BoardState:
        state = self._state
        self._state = BoardState(step=state.step, note=state.note)
        return state


@contextlib.contextmanager
def progress_board(title: str, total_steps: int, *, done: int = 0) -> Iterator[Any]:
    """Show the progress of a training run while the block runs.

    Args:
        title: What stands before the progress.
        total_steps: Steps of the whole run.
        done: Steps done by earlier attempts.

    Yields:
        The actor's handle: `update.remote(step, note)`, `say.remote(line)` and `fail.remote(message)` on a worker,
        `failure.remote()` on the driver.
    """
    # The driver's own node: the board must not be lost with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote(done)
    stop = threading.Event()
    with Progress(title, total_steps, "steps", done=done) as progress:
        follower = threading.Thread(target=_follow, args=(board, progress, done, stop), daemon=True)
        follower.start()
        try:
            yield board
        finally:
            stop.set()
            follower.join()
            ray.kill(board)


def _follow(board: Any, progress: Progress, shown: int, stop: threading.Event) -> None:
    stopping = False
    while not stopping:
        stopping = stop.wait(_POLL_INTERVAL_S)
        try:
            state: BoardState = ray.get(board.read.remote(), timeout=10 * _POLL_INTERVAL_S)
        except ray.exceptions.RayError:
            continue  # showing progress is never a reason to end a run
        for line in state.lines:
            say(line)
        progress.advance(state.step - shown, state.note)
        shown = state.step
