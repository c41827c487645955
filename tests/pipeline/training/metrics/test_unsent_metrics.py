"""What MLflow had not taken goes on with the checkpoint: whoever is killed meanwhile, each value is there once."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FormatVersionError
from pipeline.stores.patience import PATIENCE_VARIABLE
from pipeline.tracking.metric_queue import MetricPoint
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from pipeline.training.checkpoints.state_files import UNSENT_METRICS_JSON
from pipeline.training.metrics.telemetry import STALL_METRIC
from pipeline.training.metrics.unsent_metrics import encode_unsent, parse_unsent
from pipeline.training.worker import rank_zero
from tests.pipeline.training.rank_zero_runs import Run


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero, "_FLUSH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(rank_zero, "_CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")


@pytest.fixture
def away(database: TrackingConfig) -> TrackingRun:
    """A run that is not at its server: whatever is logged waits."""
    return TrackingRun(str(database.uri), None, experiment=database.experiment, run_key=new_run_key())


def another(run: TrackingRun) -> TrackingRun:
    """The same run in another process, which has none of what waits in this one."""
    return TrackingRun(run.uri, None, experiment=run.experiment, run_key=run.run_key)


def train(run: Run, steps: int) -> None:
    """Log a value in every step; a checkpoint stands after every second one."""
    for _ in range(steps):
        run.rank_zero._task.run.log_metrics({"loss": run.state.step + 0.1}, run.state.step + 1)
        run.step()
        run.rank_zero._writer.wait("checkpoint")


def unsent_steps(run: Run) -> list[int]:
    record = run.checkpoints.newest()
    assert record is not None
    points = parse_unsent(run.checkpoints.read(record, UNSENT_METRICS_JSON), "here")
    return [point.step for point in points if point.key == "loss"]


def test_the_file_gives_the_same_numbers_back() -> None:
    values = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan]
    points = [
        MetricPoint(key=f"k{index}", value=value, step=2**40, time_ms=1795997420251)
        for index, value in enumerate(values)
    ]
    read = parse_unsent(encode_unsent(points), "here")
    assert [repr(point.value) for point in read] == [repr(value) for value in values]
    assert [(p.key, p.step, p.time_ms) for p in read] == [(p.key, p.step, p.time_ms) for p in points]
    assert all(point.is_resent for point in read)


def test_what_is_no_number_or_of_another_version_is_refused() -> None:
    data = encode_unsent([MetricPoint(key="loss", value=1.5, step=1, time_ms=0)])
    with pytest.raises(ConfigError, match=r"^here: points.0.value: must be a number, got 'many'"):
        parse_unsent(data.replace(b'"1.5"', b'"many"'), "here")
    with pytest.raises(FormatVersionError, match="has format_version 3"):
        parse_unsent(data.replace(b'"format_version":2', b'"format_version":3'), "here")


@pytest.mark.parametrize("is_sent_after_all", [False, True])
def test_a_process_killed_while_mlflow_is_away_loses_no_value(
    make: Callable[..., Run],
    database: TrackingConfig,
    away: TrackingRun,
    is_sent_after_all: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes of three are killed; the last one of them may get rid of what it had, before it dies."""
    first = make(tracking=away, keep_checkpoints=9)
    first.store.open.set()
    train(first, 5)
    assert unsent_steps(first) == [1, 2, 3, 4], "of its own steps, and not of those after it"

    again = another(away)
    second = make(tracking=again, goes_on=True)
    second.store.open.set()
    train(second, 3)
    assert unsent_steps(second) == [1, 2, 3, 4, 5, 6]

    monkeypatch.setattr(rank_zero, "_FLUSH_TIMEOUT_S", 60.0)  # from here on MLflow answers, if slowly
    opened = TrackingRun.open(database, away.run_key)
    if is_sent_after_all:
        assert again.flush() == 0
    third = make(tracking=opened, goes_on=True)
    third.store.open.set()
    train(third, 2)
    third.rank_zero.close()
    history = TrackingRun.open(database, away.run_key).metric_history("loss")
    assert history == [(step, step - 1 + 0.1) for step in range(1, 9)]
    record = third.checkpoints.newest()
    assert record is not None and UNSENT_METRICS_JSON not in record.names, "MLflow has everything"


def test_what_a_checkpoint_holds_is_not_called_lost(make: Callable[..., Run], away: TrackingRun) -> None:
    run = make(tracking=away)
    run.store.open.set()
    train(run, 2)
    run.rank_zero.finish()
    run.rank_zero.close()
    (line,) = [line for line in run.lines if "metrics or files of run" in line]
    assert ": 1 metrics or files of run " in line and "among them the link to " in line, "no metric"

    run.lines.clear()
    other = make(tracking=another(away), goes_on=True)
    other.store.open.set()
    train(other, 1)
    other.rank_zero.close()
    (line,) = [line for line in run.lines if "metrics or files of run" in line]
    assert ": 2 metrics or files of run " in line, "the link, and the metric of the step after the checkpoint"


def test_a_damaged_file_of_metrics_is_said_and_ends_no_run(
    make: Callable[..., Run], away: TrackingRun, tmp_path: Path
) -> None:
    run = make(tracking=away)
    run.store.open.set()
    train(run, 2)
    (file,) = tmp_path.glob(f"checkpoints/step-*/{UNSENT_METRICS_JSON}")
    file.write_bytes(file.read_bytes().replace(b"loss", b"lass"))
    other = make(tracking=another(away), goes_on=True)
    (line,) = [line for line in run.lines if "are lost: " in line]
    assert line.startswith("metrics that MLflow had not got before step 2 are lost: ") and str(file) in line
    assert other.state.step == 2


def test_the_checkpoints_link_and_the_stall_at_it_are_sent_too(
    make: Callable[..., Run], database: TrackingConfig, away: TrackingRun
) -> None:
    run = make(tracking=away)
    run.store.open.set()
    train(run, 2)
    other = make(tracking=TrackingRun.open(database, away.run_key), goes_on=True)
    other.rank_zero.close()
    tracked = TrackingRun.open(database, away.run_key)
    assert [step for step, _ in tracked.metric_history(STALL_METRIC)] == [2]
    record = run.checkpoints.newest()
    tags = connect(tracked.uri).get_run(tracked.require_id()).data.tags
    assert record is not None and tags["ddpm.checkpoint"] == run.checkpoints.uri(record)
