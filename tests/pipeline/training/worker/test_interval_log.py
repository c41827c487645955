"""An interval's figures: what they are, and that nothing about them ends a run."""

import dataclasses
import math
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm import flops_per_image
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.metrics import efficiency
from pipeline.training.metrics.efficiency import Efficiency
from pipeline.training.metrics.matrix_rate import matrix_flops_per_s
from pipeline.training.metrics.telemetry import Throughput
from pipeline.training.worker import interval_log
from pipeline.training.worker.interval_log import IntervalLog
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import CPU, make_state, make_task, single_rank

THROUGHPUT = Throughput(num_images=600, images_per_s=100.0, data_wait_share=0.5, productive_s=3.0)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


class Recorded:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.shown: list[tuple[int, int, str]] = []
        self.run = SimpleNamespace(log_metrics=lambda metrics, step: self.logged.append((metrics, step)))
        self.board = SimpleNamespace(update=SimpleNamespace(remote=lambda *args: self.shown.append(args)))


def test_use_of_the_device_and_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "matrix_flops_per_s", lambda device, dtype: 1e9)
    monkeypatch.setattr("pipeline.training.metrics.efficiency.time.time", lambda: 1100.0)
    task = dataclasses.replace(make_task(), begun_at_s=1000.0)
    figures = Efficiency(task, CPU, world=2).of(THROUGHPUT, step=1000)
    of_one = 100.0 * 3 * flops_per_image(MODEL) / 2
    assert figures == {
        "model_flops_per_s": of_one,
        "model_flops_utilisation": pytest.approx(of_one / 1e9),
        "goodput": pytest.approx(1000 * 8 * (3.0 / 600) / 100.0),
    }
    assert "goodput" not in Efficiency(make_task(), CPU, world=1).of(THROUGHPUT, step=1000)


def test_the_rate_of_matrix_products_is_one_of_this_machine() -> None:
    assert 1e8 < matrix_flops_per_s(CPU, torch.float32) < 1e14


def test_figures_go_to_the_run_and_to_the_terminal() -> None:
    recorded, state = Recorded(), make_state(make_task())
    state.step = 7
    task = dataclasses.replace(make_task(), run=recorded.run, board=recorded.board, group=3)
    IntervalLog(task, CPU).log(state, {"loss": 0.25, "data_wait_share": 0.5}, THROUGHPUT)
    ((metrics, step),) = recorded.logged
    assert step == 7 and all(math.isfinite(value) for value in metrics.values())
    assert metrics.keys() == {
        *("loss", "data_wait_share", "learning_rate", "images_per_s", "skipped_batches"),
        *("model_flops_per_s", "model_flops_utilisation"),
    }
    assert recorded.shown == [(3, 7, "loss 0.2500, 100 img/s")]


def test_what_cannot_be_measured_or_shown_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no counter")

    lines: list[str] = []
    monkeypatch.setattr(interval_log, "say", lines.append)
    monkeypatch.setattr(interval_log, "Efficiency", fails)
    recorded = Recorded()
    log = IntervalLog(dataclasses.replace(make_task(), run=recorded.run, board=recorded.board), CPU)
    monkeypatch.setattr(log._gauges, "show", fails)
    for _ in range(3):
        log.log(make_state(make_task()), {"loss": 0.25}, THROUGHPUT)
    log.close()
    assert len(recorded.logged) == len(recorded.shown) == 3
    assert lines == [
        "measuring the hardware failed at step 0 (no counter); the run goes on",
        "telling Ray's metrics failed at step 0 (no counter); the run goes on",
        "measuring the hardware failed 3 times",
        "telling Ray's metrics failed 3 times",
    ]


def test_the_loop_asks_a_server_that_never_answers_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is logged, the thread that trains opens no connection: the run's own thread does."""
    asked_by: list[str] = []
    asked = threading.Event()
    connect = socket.socket.connect

    def note(self: socket.socket, address: Any) -> None:
        asked_by.append(threading.current_thread().name)
        asked.set()
        connect(self, address)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        monkeypatch.setattr(socket.socket, "connect", note)
        run = TrackingRun(f"http://127.0.0.1:{silent.getsockname()[1]}", "a" * 32)
        task = dataclasses.replace(make_task(), run=run, board=Recorded().board)
        log, state = IntervalLog(task, CPU), make_state(make_task())
        for step in range(50):
            state.step = step
            log.log(state, {"loss": 0.25}, THROUGHPUT)
        run.log_file(b"png", "samples/step-000000050.png")
        assert asked.wait(60), "somebody asks"
        monkeypatch.setattr(socket.socket, "connect", connect)
        assert run.close(timeout_s=0.1) > 0
    assert threading.current_thread().name not in asked_by
