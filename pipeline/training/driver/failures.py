"""Whether a group of workers that failed is tried again: counted against progress, not over the whole run.

What would only fail again is not tried again: errors that say so by their class, and those that come back unchanged at
the same step. Lost nodes and preemptions are no failures of the run, and are not counted.
"""

import re
from dataclasses import dataclass

from pipeline.errors import (
    DatasetError,
    LeaseLostError,
    ObjectMissingError,
    PipelineError,
    StorageAccessError,
    StorageError,
    StorageUnfitError,
    TrackingUnavailableError,
    TrainingDivergedError,
    UsageError,
)

_FINAL = (
    UsageError,
    DatasetError,
    ObjectMissingError,
    StorageAccessError,
    StorageUnfitError,
    LeaseLostError,
    TrainingDivergedError,
)
# What the ranks that are left say of one that has gone; the texts are those of gloo, NCCL and torch's store.
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|timed out waiting|broken pipe|socket timeout|remote process exited"
    r"|rank\(?s?\)? .*(exited|died)|recvvalue failed|failed to recv|nccl.*(error|abort)|heartbeat",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """How a group of workers ended."""

    error: PipelineError | None
    """What ended it, where that was an error of this project's."""
    kind: str
    """Class of what ended it; empty where a worker's process was lost."""
    message: str
    """In one line."""
    step: int
    """Step at which it came; -1 if that is not known."""

    @property
    def is_final(self) -> bool:
        """Whether the same would follow however often it is tried."""
        return isinstance(self.error, _FINAL)

    @property
    def is_of_lost_peer(self) -> bool:
        """Whether it says of another worker that it has gone."""
        return _LOST_PEER.search(self.message) is not None

    @property
    def signature(self) -> tuple[str, str, int] | None:
        """What is alike in two failures of one cause; None where an end says nothing about its cause."""
        is_outage = isinstance(self.error, StorageError | TrackingUnavailableError)
        if not self.kind or self.step < 0 or is_outage or self.is_of_lost_peer:
            return None
        return self.kind, re.sub(r"0x[0-9a-f]+|\d+", "#", self.message), self.step


MAX_LOSSES = 20
"""Lost nodes, preemptions and starts in vain without a new checkpoint in between, after which a run ends: it may be
what takes its machines down."""


class FailureCount:
    """Counts failures, and losses of machines, since the newest checkpoint.

    Args:
        max_failures: Failures in a row, without a newer checkpoint between them, after which a group is replaced.
        checkpoint_step: Step of the newest checkpoint; -1: there is none.
    """

    def __init__(self, max_failures: int, checkpoint_step: int) -> None:
        """Begin with none."""
        self._max_failures, self._checkpoint_step = max_failures, checkpoint_step
        self._signatures: set[tuple[str, str, int]] = set()
        self.number = 0
        """Failures since the newest checkpoint."""
        self._num_losses = 0

    def why_not_again(self, failure: Failure, checkpoint_step: int) -> str | None:
        """Count a failure.

        Args:
            failure: What has happened.
            checkpoint_step: Step of the checkpoint that the next group would go on from; -1: there is none.

        Returns:
            Why no other group should be tried; None: one should.
        """
        self._look_for_progress(checkpoint_step)
        self.number += 1
        if failure.is_final:
            return "it would be the same again"
        signature = failure.signature
        if signature is not None and signature in self._signatures:
            return f"the same at step {failure.step} as before, so it is not tried again"
        if signature is not None:
            self._signatures.add(signature)
        if self.number > self._max_failures:
            return f"failure {self.number} without a new checkpoint, workers.max_failures is {self._max_failures}"
        return None

    def is_one_loss_too_many(self, checkpoint_step: int) -> bool:
        """Count a loss of machines, which is no failure of the run; checkpoint_step as above."""
        self._look_for_progress(checkpoint_step)
        self._num_losses += 1
        return self._num_losses > MAX_LOSSES

    def _look_for_progress(self, checkpoint_step: int) -> None:
        if checkpoint_step > self._checkpoint_step:
            self._checkpoint_step, self.number, self._num_losses = checkpoint_step, 0, 0
            self._signatures.clear()
