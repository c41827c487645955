"""When a run has skipped so many steps that going on is no use.

Every rank comes to the same answer at the same step, with the same words.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from pipeline.training.train_config import TrainConfig
from pipeline.training.worker.loss_watch import gather_rows, worst_samples


class TooManySkipped(Exception):
    """More global batches of a window were skipped than a run bears; equal on every rank.

    It tells the training loop, not the operator: training may go back to a checkpoint and leave these batches out.

    Args:
        steps: Global batches of the window that were skipped, in order, and any after it.
        message: What the operator is told where there is no going back.
    """

    def __init__(self, steps: tuple[int, ...], message: str) -> None:
        """Keep both."""
        super().__init__(steps, message)
        self.steps = steps
        """Global batches of the window that were skipped, in order, and any after it."""

    def __str__(self) -> str:
        message: str = self.args[1]
        return message


class SkipLimit:
    """Allows so many skipped steps in a window.

    Args:
        config: Has the window and the number.
        left_out_steps: Global batches that are left out on purpose; they do not count.
        skipped_steps: Those of before the start, about which nothing is said until another one is skipped.
    """

    def __init__(self, config: TrainConfig, left_out_steps: Iterable[int], skipped_steps: Sequence[int]) -> None:
        """Begin with what a checkpoint knows."""
        self._config, self._left_out, self._num_known = config, frozenset(left_out_steps), len(skipped_steps)

    def check(self, skipped_steps: Sequence[int], summaries: Mapping[int, Tensor]) -> None:
        """Look at what was skipped since the last call; collective if that is too much.

        Args:
            skipped_steps: Global batches that were not trained on, in order; equal on every rank.
            summaries: `summary_of` this rank's part of each step that was tried since the last call.

        Raises:
            TooManySkipped: On every rank alike.
        """
        config, tried = self._config, [step for step in skipped_steps if step not in self._left_out]
        new = [step for step in skipped_steps[self._num_known :] if step not in self._left_out]
        self._num_known = len(skipped_steps)
        for step in new:
            window = [other for other in tried if step - config.skip_window_steps < other <= step]
            if len(window) > config.max_skipped_batches:
                raise TooManySkipped(
                    (*window, *(other for other in new if other > step)),
                    f"step {step}: the loss or its gradient is not finite, for {len(window)} of the last "
                    f"{config.skip_window_steps} steps (max_skipped_batches is {config.max_skipped_batches}); highest "
                    f"loss at {worst_samples(gather_rows(summaries[step][None])[:, 0])}",
                )
