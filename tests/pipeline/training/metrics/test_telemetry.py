"""Throughput, waiting and stalls of an interval, by a clock that the test turns."""

import pytest

from pipeline.training.metrics.telemetry import Stall, StepClock, Throughput


def test_each_interval_counts_its_own_images_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("pipeline.training.metrics.telemetry.time.perf_counter", lambda: now)
    clock = StepClock()
    for _ in range(4):
        clock.waited(0.5)
        clock.stepped(16)
    now += 8.0
    assert clock.interval() == Throughput(num_images=64, images_per_s=8.0, data_wait_share=0.25, productive_s=6.0)
    clock.waited(3.0)  # measured a little before the interval began: never more than all of it
    now += 2.0
    assert clock.interval() == Throughput(num_images=0, images_per_s=0.0, data_wait_share=1.0, productive_s=0.0)
    for _ in range(2):
        now += 1.0
        clock.stepped(16)
        with clock.paused():
            now += 30.0
    assert clock.interval() == Throughput(num_images=32, images_per_s=16.0, data_wait_share=0.0, productive_s=2.0), (
        "without pauses"
    )
    assert clock.interval().images_per_s == 0.0, "an interval of no length"


def test_a_stall_is_what_happens_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("pipeline.training.metrics.telemetry.time.perf_counter", lambda: now)
    stall = Stall()
    for seconds in (3.0, 0.5):
        with stall:
            now += seconds
        now += 7.0
        assert stall.seconds == seconds
