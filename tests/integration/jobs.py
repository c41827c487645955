"""How the integration tests run jobs as a user would: as processes, with flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"

# A network small enough that starting Ray is most of a run.
TINY = [
    "--network.base-channels", "8", "--network.channel-multipliers", "1", "2", "--network.num-res-blocks", "1",
    "--network.num-groups", "4",
]  # fmt: skip
EVERY_STEP = ["--log-interval-steps", "1", "--grid-interval-steps", "1000"]


def run_job(name: str, *flags: str, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a job to its end; with `check`, a failure shows what it printed."""
    finished = subprocess.run(
        [sys.executable, str(JOBS / f"{name}.py"), *flags], capture_output=True, text=True, cwd=cwd, env=environment()
    )
    if check:
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def start_job(name: str, *flags: str) -> subprocess.Popen[str]:
    """Start a job in a process group of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, str(JOBS / f"{name}.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
        start_new_session=True,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """This process's environment, without the address of a cluster that a test may have started."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def records(run: Path) -> list[dict[str, object]]:
    """The checkpoint records of a run's output folder, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((run / "checkpoints" / "_records").glob("*.json"))]


class ScaledNoise(nn.Module):
    """A caller's own network: a per-class scale of x_t."""

    def __init__(self, num_classes: int | None, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(((num_classes or 0) + 1,), scale))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        index = torch.full_like(t, len(self.scale) - 1) if label is None else label
        return x_t * self.scale[index][:, None, None, None]


def scaled_noise(
    *, image_size: tuple[int, int], channels: int, num_classes: int | None, scale: float = 0.5
) -> nn.Module:
    """Factory of `ScaledNoise`."""
    return ScaledNoise(num_classes, scale)
