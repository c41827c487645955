"""Where the time of a few steps goes: a trace for Perfetto or chrome://tracing, and a table."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_STEPS_BEFORE = 10
"""Left alone: they are slower than those that follow."""
_TABLE_ROWS = 30


class StepProfile:
    """Watches some steps of a worker, once.

    Args:
        num_steps: How many; 0 for none.
        device: Where the network lives.
        keep: Takes the trace, gzipped JSON, and the table.
    """

    def __init__(self, num_steps: int, device: torch.device, keep: Callable[[bytes, str], object]) -> None:
        """Watch from the next step on."""
        self._keep, self._is_cuda = keep, device.type == "cuda"
        self._profiler: profile | None = None
        if num_steps:
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])],
                schedule=schedule(wait=_STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1),
                on_trace_ready=self._take,
            )
            self._profiler.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Watch no more; a trace that is not whole is let go."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            self._keep = lambda trace, table: None
            profiler.stop()

    def _take(self, profiler: profile) -> None:
        by = "self_device_time_total" if self._is_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS)
        with tempfile.TemporaryDirectory(prefix="ddpm-profile-") as folder:
            file = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(file))
            self._keep(file.read_bytes(), table)
