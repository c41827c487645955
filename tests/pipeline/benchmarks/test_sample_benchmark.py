"""The benchmark of the sampling job at a tiny size, in one process: its sides, its ratios, what it writes."""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm import DDIM, DPMSolver2M, ScheduleConfig
from pipeline.benchmarks import sample_benchmark
from pipeline.benchmarks.sample_benchmark import SampleBenchmarkConfig, SampleBenchmarkResult, benchmark_sample
from pipeline.generation.sample_config import SampleConfig
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.tiny_models import TINY_UNET


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(config: SampleConfig) -> SimpleNamespace:
        started_s = time.perf_counter()
        made = make_in_process(config)
        assert len(made) == 1, "one output shard"
        return SimpleNamespace(evaluations_per_s=8 * 3 / (time.perf_counter() - started_s))

    monkeypatch.setattr(sample_benchmark, "ray_session", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(sample_benchmark, "sample", sample)
    monkeypatch.setattr(sample_benchmark, "_in_a_process", lambda measure, *arguments: measure(*arguments))


def config(tmp_path: Path, **changes: Any) -> SampleBenchmarkConfig:
    values: dict[str, Any] = {
        "network": TINY_UNET,
        "schedule": ScheduleConfig(name="cosine"),
        "image_size": (8, 8),
        "channels": 1,
        "num_classes": 2,
        "sampler": DDIM(num_steps=3),
        "batch_size": 4,
        "num_batches": 2,
        "rounds": 2,
        "output": str(tmp_path / "report"),
    }
    return SampleBenchmarkConfig(**(values | changes))


def test_all_sides_take_turns_and_the_ratios_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = benchmark_sample(config(tmp_path))
    assert len(result.job) == len(result.bare) == len(result.diffusers) == 2 and result.without_diffusers == ""
    assert min(*result.job, *result.bare, *result.diffusers) > 0 and result.evaluations_per_image == 3
    written = json.loads((tmp_path / "report" / "sample.json").read_text())
    assert written["job_over_bare"] == list(result.ratios(result.bare) or ())
    assert written["img_nfe_per_s"]["job"] == list(result.job) and written["config"]["batch_size"] == 4
    lines = capsys.readouterr()
    assert "round 2: job " in lines.out + lines.err and " img·NFE/s, bare loop " in lines.out + lines.err


def test_without_diffusers_it_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = benchmark_sample(config(tmp_path, sampler=DPMSolver2M(num_steps=3), rounds=1))
    assert result.diffusers == () and result.ratios(result.diffusers) is None
    assert result.without_diffusers.startswith("sampler: must be ddim or ancestral without guidance beside diffusers")
    monkeypatch.setattr(sample_benchmark, "find_spec", lambda name: None)
    result = benchmark_sample(config(tmp_path, rounds=1))
    assert result.without_diffusers == "it is not installed (pip install diffusers)"


def test_ratios_are_of_one_round() -> None:
    """Where a machine is half as fast in one round, both sides are, and the ratio stays."""
    result = SampleBenchmarkResult(
        job=(90.0, 45.0, 100.0),
        bare=(100.0, 50.0, 100.0),
        diffusers=(),
        evaluations_per_image=1,
        flops_per_evaluation=1,
        without_diffusers="",
    )
    assert result.ratios(result.bare) == (0.9, 0.9, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "rounds: must be at least 1, got 0; choose a positive number"),
        ({"num_classes": 3}, "num_classes: must divide the 8 images of a run, got 3; choose another num_batches, or"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **changes)
    assert str(caught.value).startswith(words)
