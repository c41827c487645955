"""How the integration tests run jobs: with flags, as a user would, in a process of their own or in this one."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm import ModelConfig, ScheduleConfig, UNetConfig, build_network
from jobs import cli
from tests.processes import environment

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"

# A network small enough that starting Ray is most of a run.
TINY = [
    "--network.base-channels", "8", "--network.channel-multipliers", "1", "2", "--network.num-res-blocks", "1",
    "--network.num-groups", "4",
]  # fmt: skip
# Each validation is a process more; tests/pipeline/training/test_train.py has one.
EVERY_STEP = ["--log-interval-steps", "1", "--grid-interval-steps", "1000", "--validation.num-images", "0"]


def run_job(name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a job to its end in this process, which spares its start and that of a Ray; prints and exit code are kept."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run_job(importlib.import_module(f"jobs.{name}").JOB, flags)
    if check:
        assert code == 0, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess([name, *flags], code, out.getvalue(), err.getvalue())


def run_job_process(
    name: str,
    *flags: str,
    check: bool = True,
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end as a process, on a Ray of its own or that of the variables; a failure shows its prints."""
    finished = subprocess.run(
        [sys.executable, str(JOBS / f"{name}.py"), *flags],
        capture_output=True, text=True, cwd=cwd, env={**environment(), **(variables or {})},
    )  # fmt: skip
    if check:
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def start_job(
    name: str, *flags: str, log: Path | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a job with a Ray of its own, to be killed or watched; what it prints goes to `log`."""
    with Path(os.devnull if log is None else log).open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(JOBS / f"{name}.py"), *flags],
            stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**environment(), "PYTHONUNBUFFERED": "1", **(variables or {})},
        )  # fmt: skip


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


class SlowUNet(nn.Module):
    """The network of `TINY`; each pass takes as many seconds longer as a file says, while it is there."""

    def __init__(self, config: ModelConfig, slow_file: Path) -> None:
        super().__init__()
        self.unet, self.slow_file = build_network(config), slow_file

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(self.slow_file.read_text()))
        answer: Tensor = self.unet(x_t, t, label)
        return answer


def slow_unet(*, image_size: tuple[int, int], channels: int, num_classes: int | None, slow_file: str) -> nn.Module:
    """Factory of `SlowUNet` for `training_runs.HYBRID`: with a learned variance, and for 30 timesteps."""
    unet = UNetConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_groups=4,
        attention_resolutions=(4,),
        dropout=0.0,
        learned_variance=True,
    )
    config = ModelConfig(
        network=unet,
        schedule=ScheduleConfig(num_timesteps=30),
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
    )
    return SlowUNet(config, Path(slow_file))


def slow_tiny(slow_file: Path) -> list[str]:
    """Flags of a `SlowUNet`."""
    return [
        "--network.name", "own", "--network.factory", "tests.integration.jobs:slow_unet",
        "--network.options", "slow_file", str(slow_file),
    ]  # fmt: skip


class NoiseOrNan(ScaledNoise):
    """Answers with NaN while a file is there."""

    def __init__(self, num_classes: int | None, nan_file: str) -> None:
        super().__init__(num_classes, 0.5)
        self.nan_file = Path(nan_file)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        time.sleep(0.05)
        answer = super().forward(x_t, t, label)
        return answer * torch.nan if self.nan_file.exists() else answer


def noise_or_nan(
    *, image_size: tuple[int, int], channels: int, num_classes: int | None, nan_file: str = "no such file"
) -> nn.Module:
    """Factory of `NoiseOrNan`."""
    return NoiseOrNan(num_classes, nan_file)


def scaled_noise(
    *, image_size: tuple[int, int], channels: int, num_classes: int | None, scale: float = 0.5
) -> nn.Module:
    """Factory of `ScaledNoise`."""
    return ScaledNoise(num_classes, scale)
