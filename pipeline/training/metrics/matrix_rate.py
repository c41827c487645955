"""What a device can do at most, measured: the rate of products of large matrices.

A table of data sheets would name cards that are not there, and clocks that they do not keep. Needs torch alone.
"""

import time
from collections.abc import Callable

import torch

PASSES_PER_STEP = 3
"""Forward passes that a training step costs, by the usual count: the backward pass is two; what gradient checkpointing
computes again is not counted."""
_REPEATS = 20
_SIDE = {"cuda": 8192, "cpu": 512}


def matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several products of square matrices, a multiplication and an addition counted as two operations."""
    side = _SIDE.get(device.type, 2048)
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / fastest(lambda: one @ other, device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, at best."""
    seconds = []
    for _ in range(_REPEATS):
        wait_for(device)
        started_s = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
