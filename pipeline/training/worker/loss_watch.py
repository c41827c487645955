"""Steps whose loss is far above that of the steps before: one line, with the samples to look at.

What a step leaves is kept on the device, as a row of four numbers, and read when the losses are logged.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor

from pipeline.progress import say
from pipeline.training.side_work import SideWork

_MAX_NAMED = 4


def summary_of(losses: Tensor, sample_ids: Tensor) -> Tensor:
    """What is kept of this rank's losses in a step.

    Args:
        losses: [b].
        sample_ids: [b], below 2^48, on the same device.

    Returns:
        float64 [4] on that device: their number, sum, the highest (infinity where it is not finite), its sample id.
    """
    highest, place = losses.nan_to_num(torch.inf, torch.inf).max(dim=0)
    number = torch.full_like(highest, len(losses))
    return torch.stack([n.double() for n in (number, losses.sum(), highest, sample_ids.take(place))])


def gather_rows(rows: Tensor) -> Tensor:
    """Collective: the rows [n, 4] of every rank, [world, n, 4] on the host."""
    everyone = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, rows)
    return torch.stack(everyone).cpu()


def worst_samples(rows: Tensor) -> str:
    """The samples of the highest losses in words, the highest first.

    Args:
        rows: One step's row of every rank [world, 4]. Where one has a loss that is not finite, only such are named.
    """
    worst = sorted(((highest, int(sample)) for _, _, highest, sample in rows.tolist()), reverse=True)
    if math.isinf(worst[0][0]):
        worst = [pair for pair in worst if math.isinf(pair[0])]
    ids = [str(sample) for _, sample in worst[:_MAX_NAMED]]
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(ids)}"


class SpikeRule:
    """Judges the mean losses of steps, in order, by those of the steps before.

    A spike is a loss at least 1.5 times the usual one whose logarithm lies above the mean of the last 256 logarithms by
    more than six of their standard deviations. Were they independent and Gaussian, the ratio would follow Student's t,
    and one step in 10^8 would be called a spike that is none. Nothing is said of the first 128 steps. A spike counts as
    no more than the limit that it crossed, so that it hides no later one, and a loss that stays high becomes usual.

    Args:
        num_deviations: Six, but for tests.
    """

    WINDOW_STEPS, WARM_UP_STEPS, LEAST_FACTOR = 256, 128, 1.5

    def __init__(self, num_deviations: float = 6.0) -> None:
        """Nothing is usual yet."""
        self._num_deviations = num_deviations
        self._logs: deque[float] = deque(maxlen=self.WINDOW_STEPS)

    def judge(self, loss: float) -> float | None:
        """The usual loss, where this one is a spike; it is usual for the next."""
        if not 0 < loss < math.inf:  # nothing to take the logarithm of
            return None
        log, usual = math.log(loss), None
        if (n := len(self._logs)) >= self.WARM_UP_STEPS:
            mean = statistics.fmean(self._logs)
            deviation = math.sqrt(sum((other - mean) ** 2 for other in self._logs) / (n - 1))
            # Of one more draw from the mean of n: sqrt(1 + 1/n).
            limit = mean + max(math.log(self.LEAST_FACTOR), self._num_deviations * deviation * math.sqrt(1 + 1 / n))
            if log > limit:
                log, usual = limit, math.exp(mean)
        self._logs.append(log)
        return usual


class LossWatch:
    """Looks for spikes in the losses of the steps since the last report.

    A resumed run has seen nothing yet.

    Args:
        report: Takes the lines, on rank 0.
    """

    def __init__(self, report: Callable[[str], None] = say) -> None:
        """Begin with no steps."""
        self._rows: dict[int, Tensor] = {}
        self._rule, self._report = SpikeRule(), report
        self._watching = SideWork("watching the loss", report)

    def add(self, step: int, summary: Tensor, is_finite: Tensor) -> None:
        """Keep the `summary_of` a step, unless the step is skipped; nothing waits for the device.

        Args:
            step: Its index.
            summary: float64 [4].
            is_finite: 0-dim, on the device.
        """
        self._rows[step] = torch.where(is_finite, summary, 0.0)

    def report(self) -> None:
        """Collective: say the worst spike since the last report, if there is one."""
        if not self._rows:
            return
        steps, rows = list(self._rows), gather_rows(torch.stack(list(self._rows.values())))
        self._rows = {}
        if torch.distributed.get_rank() == 0:
            with self._watching.attempt(steps[-1] + 1):
                self._judge(steps, rows)

    def _judge(self, steps: list[int], rows: Tensor) -> None:
        numbers, sums = rows[:, :, :2].sum(dim=0).unbind(dim=1)
        spikes = [
            (loss / usual, index, loss, usual)
            for index, loss in enumerate((sums / numbers).tolist())  # NaN where the step was skipped
            if (usual := self._rule.judge(loss)) is not None
        ]
        if not spikes:
            return
        _, index, loss, usual = max(spikes)
        more = f"; so were {len(spikes) - 1} more of the last {len(steps)} steps" if len(spikes) > 1 else ""
        self._report(
            f"step {steps[index]}: loss {loss:.4g}, far above the {usual:.4g} of the steps before; highest at "
            f"{worst_samples(rows[:, index])}{more}"
        )
