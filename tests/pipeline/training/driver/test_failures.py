"""Failures are counted since the newest checkpoint, and what can only fail again is not tried again."""

import pytest

from pipeline import errors
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    LeaseLostError,
    ObjectMissingError,
    PipelineError,
    ShardCorruptError,
    StorageAccessError,
    StorageError,
    StorageUnfitError,
    TrackingUnavailableError,
    TrainingDivergedError,
)
from pipeline.training.driver.failures import MAX_LOSSES, Failure, FailureCount

LOST = Failure(error=None, kind="", message="lost worker 1", step=7)


def said(message: str, step: int = 7, error: PipelineError | None = None, kind: str = "RuntimeError") -> Failure:
    return Failure(error=error, kind=kind, message=message, step=step)


def test_lost_workers_are_replaced_so_often_without_a_new_checkpoint() -> None:
    count = FailureCount(2, -1)
    assert [count.why_not_again(LOST, -1) for _ in range(2)] == [None, None]
    assert count.why_not_again(LOST, -1) == "failure 3 without a new checkpoint, workers.max_failures is 2"


def test_with_a_new_checkpoint_the_count_begins_again() -> None:
    count = FailureCount(1, 0)
    for step in range(5, 100, 5):
        assert count.why_not_again(LOST, step) is None
    assert count.number == 1
    assert count.why_not_again(LOST, 95) is not None


def test_no_step_is_no_place() -> None:
    """Before its first step a worker stands nowhere: what fails there twice may have two causes."""
    count = FailureCount(5, -1)
    assert [count.why_not_again(said("x", -1), -1) for _ in range(5)] == [None] * 5


def test_an_older_checkpoint_is_no_progress() -> None:
    """The newest was found damaged: the run goes on from the one before it."""
    count = FailureCount(1, 50)
    assert count.why_not_again(LOST, 45) is None
    assert count.why_not_again(LOST, 45) is not None


def test_no_failure_is_allowed_where_none_is() -> None:
    assert FailureCount(0, -1).why_not_again(LOST, -1) is not None


@pytest.mark.parametrize(
    "error",
    [
        ShardCorruptError("x"),
        ConfigError("x"),
        ObjectMissingError("x"),
        StorageAccessError("x"),
        StorageUnfitError("x"),
        LeaseLostError("x"),
        TrainingDivergedError("x"),
    ],
)
def test_what_would_be_the_same_again_is_not_tried_again(error: PipelineError) -> None:
    failure = said("x", error=error, kind=type(error).__name__)
    assert FailureCount(3, -1).why_not_again(failure, -1) == "it would be the same again"


@pytest.mark.parametrize("error", [StorageError("x"), TrackingUnavailableError("x")])
def test_a_server_may_be_back_next_time(error: PipelineError) -> None:
    """Also where it was away at the same step: that says nothing about the step."""
    count = FailureCount(2, -1)
    assert [count.why_not_again(said("x", 7, error), -1) for _ in range(2)] == [None, None]
    assert count.why_not_again(said("x", 7, error), -1) is not None


def test_a_checkpoint_that_was_not_read_back_as_written_is_made_again_once() -> None:
    count = FailureCount(3, -1)
    assert count.why_not_again(said("x", 7, CheckpointError("x")), -1) is None
    assert count.why_not_again(said("x", 7, CheckpointError("x")), -1) is not None


def test_lost_machines_are_no_failures_and_have_a_bound_of_their_own() -> None:
    count = FailureCount(1, 0)
    assert not any(count.is_one_loss_too_many(0) for _ in range(MAX_LOSSES))
    assert count.number == 0 and count.why_not_again(LOST, 0) is None
    assert count.is_one_loss_too_many(0)
    assert not count.is_one_loss_too_many(5), "a new checkpoint"


def test_every_error_of_the_project_is_one_or_the_other() -> None:
    """A new class must be thought of: is it final, or worth another try?"""
    final = {name for name in dir(errors) if isinstance(kind := getattr(errors, name), type)
             and issubclass(kind, PipelineError) and said("x", error=kind("x")).is_final}  # fmt: skip
    tried_again = {
        "PipelineError", "StorageError", "CheckpointError", "TrackingUnavailableError", "CommitConflictError",
        "TrainingFailedError", "LeaseHeldError", "StoppedError",
    }  # fmt: skip
    known = {name for name in dir(errors) if isinstance(k := getattr(errors, name), type) and issubclass(k, Exception)}
    assert final | tried_again == known and not final & tried_again


def test_the_same_error_at_the_same_step_is_not_tried_a_third_time() -> None:
    count = FailureCount(10, -1)
    assert count.why_not_again(said("worker 0: index 12 is out of bounds at 0x7f12"), -1) is None
    assert "the same at step 7" in str(count.why_not_again(said("worker 1: index 13 is out of bounds at 0x7faa"), -1))


@pytest.mark.parametrize(
    "other", [said("worker 0: index 12 is out of bounds", 8), said("worker 0: another"), said("worker 0: index 12 is "
    "out of bounds", kind="ValueError"), LOST]
)  # fmt: skip
def test_another_error_or_another_step_is_tried_again(other: Failure) -> None:
    count = FailureCount(10, -1)
    assert count.why_not_again(said("worker 0: index 12 is out of bounds"), -1) is None
    assert count.why_not_again(other, -1) is None


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:35012",
        "Connection reset by peer",
        "NCCL communicator was aborted on rank 1",
        "Timed out waiting 1800000ms for recv operation to complete",
        "recvValue failed on SocketImpl(fd=75)",
    ],
)
def test_what_is_said_of_a_lost_peer_is_no_error_of_ones_own(message: str) -> None:
    count = FailureCount(10, -1)
    assert [count.why_not_again(said(message), -1) for _ in range(5)] == [None] * 5
