"""A trace of a few steps, and a table of where their time went."""

import gzip
import json
from typing import Any

import torch

from pipeline.training.worker.step_profile import StepProfile
from tests.pipeline.training.step_cases import CPU


def work(profile: StepProfile, num_steps: int) -> None:
    for _ in range(num_steps):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profile.step()


def test_the_steps_asked_for_are_in_the_trace() -> None:
    kept: list[tuple[bytes, str]] = []
    profile = StepProfile(3, CPU, lambda trace, table: kept.append((trace, table)))
    work(profile, 12)
    assert kept == [], "ten are left alone, and the trace is not whole"
    work(profile, 10)
    profile.close()
    ((trace, table),) = kept
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace))["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#10", "ProfilerStep#11", "ProfilerStep#12"}
    assert "aten::mm" in table and "Self CPU" in table


def test_a_trace_that_is_not_whole_is_let_go() -> None:
    kept: list[object] = []
    profile = StepProfile(3, CPU, lambda *both: kept.append(both))
    work(profile, 11)
    profile.close()
    profile.close()
    assert kept == []


def test_none_is_asked_for() -> None:
    profile = StepProfile(0, CPU, lambda *_: None)
    work(profile, 20)
    profile.close()
