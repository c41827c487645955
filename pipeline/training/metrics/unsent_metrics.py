"""Metrics that MLflow has not taken, as a file of the checkpoint behind them.

A process may be killed while MLflow is away. Who goes on from the checkpoint trains none of the steps before it again,
and so sends what was measured in them out of this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config_io import read_record, to_json
from pipeline.errors import PipelineError
from pipeline.progress import say
from pipeline.stores.storage import join_uri
from pipeline.tracking.metric_queue import MetricPoint
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.state_files import UNSENT_METRICS_JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class UnsentPoint:
    """One value of a curve."""

    key: str
    """Name of the curve."""
    value: str
    """Its value in digits that give the same number back; a text, since JSON has no NaN."""
    step: int
    """Training step."""
    time_ms: int
    """Milliseconds since 1970 (UTC) when it was measured: MLflow tells by it a point that it has after all."""

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        try:
            float(self.value)
        except ValueError:
            raise ValueError(f"value: must be a number, got {self.value!r}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class UnsentMetrics:
    """What is to be sent."""

    format_version: int = 2
    """Version of this record's form."""
    points: tuple[UnsentPoint, ...]
    """In the order in which they were queued."""


def encode_unsent(points: Iterable[MetricPoint]) -> bytes:
    """The file."""
    return to_json(
        UnsentMetrics(
            points=tuple(UnsentPoint(key=p.key, value=repr(p.value), step=p.step, time_ms=p.time_ms) for p in points)
        )
    )


def resend(run: TrackingRun, checkpoints: CheckpointStore, record: CheckpointRecord) -> None:
    """Queue what MLflow may lack of what lies behind a checkpoint: its link, and the metrics that are kept with it.

    What cannot be read is said, and is no reason to end a run.

    Args:
        run: The run.
        checkpoints: Its checkpoints.
        record: The one that is gone on from.
    """
    run.log_checkpoint(record.step, checkpoints.uri(record), record.digest)
    if UNSENT_METRICS_JSON not in record.names:
        return
    try:
        where = join_uri(checkpoints.uri(record), UNSENT_METRICS_JSON)
        run.resend(parse_unsent(checkpoints.read(record, UNSENT_METRICS_JSON), where))
    except PipelineError as error:
        say(f"metrics that MLflow had not got before step {record.step} are lost: {error}; the run goes on")


def parse_unsent(data: bytes, where: str) -> list[MetricPoint]:
    """The points in such a file, to be sent again.

    Args:
        data: Its bytes.
        where: Its URI, for messages.

    Raises:
        ConfigError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    record = read_record(UnsentMetrics, data, where, remedy="nothing needs to be done: only these metrics are lost")
    return [
        MetricPoint(key=p.key, value=float(p.value), step=p.step, time_ms=p.time_ms, is_resent=True)
        for p in record.points
    ]
