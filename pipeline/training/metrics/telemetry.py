"""Where a training worker's time goes: throughput, the share spent waiting for data, stalls at checkpoints."""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed

STALL_METRIC = "checkpoint_stall_s"
"""The metric: seconds for which the loop stood still at a checkpoint, for the copy and for the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Figures of one interval."""

    num_images: int
    """Images of the global batches."""
    images_per_s: float
    """As many per second of wall-clock time, pauses left out."""
    data_wait_share: float
    """Share of that time in which this worker waited for its next batch, 0 to 1."""
    productive_s: float
    """Seconds of it in which it did not wait."""


class StepClock:
    """Measures intervals of training steps on one worker."""

    def __init__(self) -> None:
        """Start the first interval now."""
        self._restart()

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self._waited_s = self._paused_s = 0.0
        self._num_images = 0

    def waited(self, seconds: float) -> None:
        """Count time in which no batch was there."""
        self._waited_s += seconds

    def stepped(self, num_images: int) -> None:
        """Count the images of a finished global batch."""
        self._num_images += num_images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block: grids and checkpoints are not training's throughput."""
        paused_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - paused_s

    def interval(self) -> Throughput:
        """The figures since the last call, and a new interval from now."""
        elapsed_s = max(time.perf_counter() - self._started_s - self._paused_s, 1e-9)
        waited_s = min(self._waited_s, elapsed_s)
        figures = Throughput(
            num_images=self._num_images,
            images_per_s=self._num_images / elapsed_s,
            data_wait_share=waited_s / elapsed_s,
            productive_s=elapsed_s - waited_s,
        )
        self._restart()
        return figures


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of tensors on a GPU, else of this process, resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def highest(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Collective: of each value the highest of any rank."""
    shared = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return dict(zip(values, shared.tolist()))


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
