"""Where a training worker's time goes: throughput, the share spent waiting for data, stalls at checkpoints."""

import time
from dataclasses import dataclass
from types import TracebackType

STALL_METRIC = "checkpoint_stall_s"
"""The metric: seconds for which the loop stood still at a checkpoint, for the copy and for the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Figures of one interval."""

    images_per_s: float
    """Images of the global batches per second of wall-clock time."""
    data_wait_share: float
    """Share of the wall-clock time in which this worker waited for its next batch, 0 to 1."""


class StepClock:
    """Measures intervals of training steps on one worker."""

    def __init__(self) -> None:
        """Start the first interval now."""
        self._restart()

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self._waited_s = 0.0
        self._num_images = 0

    def waited(self, seconds: float) -> None:
        """Count time in which no batch was there."""
        self._waited_s += seconds

    def stepped(self, num_images: int) -> None:
        """Count the images of a finished global batch."""
        self._num_images += num_images

    def interval(self) -> Throughput:
        """The figures since the last call, and a new interval from now."""
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        figures = Throughput(
            images_per_s=self._num_images / elapsed_s, data_wait_share=min(self._waited_s / elapsed_s, 1.0)
        )
        self._restart()
        return figures


class Stall:
    """Measures how long the loop stands still: what happens inside `with stall`."""

    seconds = 0.0
    """Length of the latest stall."""

    def __enter__(self) -> None:
        """The loop stands still from now."""
        self._started_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The loop goes on."""
        self.seconds = time.perf_counter() - self._started_s
