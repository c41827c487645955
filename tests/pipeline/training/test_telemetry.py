"""Throughput and waiting of an interval, by a clock that the test turns."""

import pytest

from pipeline.training.telemetry import StepClock, Throughput


def test_each_interval_counts_its_own_images_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("pipeline.training.telemetry.time.perf_counter", lambda: now)
    clock = StepClock()
    for _ in range(4):
        clock.waited(0.5)
        clock.stepped(16)
    now += 8.0
    assert clock.interval() == Throughput(images_per_s=8.0, data_wait_share=0.25)
    clock.waited(3.0)  # measured a little before the interval began: never more than all of it
    now += 2.0
    assert clock.interval() == Throughput(images_per_s=0.0, data_wait_share=1.0)
    assert clock.interval().images_per_s == 0.0, "an interval of no length"
