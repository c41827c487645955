"""A jump of the loss is one line with its samples; noise is none."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t as student_t

from pipeline.training.worker.loss_watch import LossWatch, SpikeRule, summary_of, worst_samples
from tests.pipeline.training.step_cases import single_rank

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


def test_noise_is_called_a_spike_as_often_as_student_says() -> None:
    """At six deviations never in 30,000 steps; at 2.5 as often as predicted, within 4 standard errors of the count."""
    logs = np.random.default_rng(0).normal(scale=0.5, size=30_000)
    quiet, lively = SpikeRule(), SpikeRule(num_deviations=2.5)
    lively.LEAST_FACTOR = 1.0  # type: ignore[misc]
    assert [log for log in logs if quiet.judge(math.exp(log)) is not None] == []
    found = sum(lively.judge(math.exp(log)) is not None for log in logs)
    judged = len(logs) - SpikeRule.WARM_UP_STEPS
    expected = judged * student_t.sf(2.5, SpikeRule.WINDOW_STEPS - 1)
    # Spikes enter the window cut to the limit: its deviation comes out smaller by a half percent, and the count is
    # larger by some 4 %.
    assert 1.04 * expected == pytest.approx(found, abs=4 * math.sqrt(expected))
    assert student_t.sf(6.0, SpikeRule.WARM_UP_STEPS - 1) < 1.1e-8, "as the docstring says, at the shortest window"


def test_a_loss_that_falls_is_quiet_and_one_that_jumps_is_not() -> None:
    rule, noise = SpikeRule(), np.random.default_rng(1).normal(scale=0.1, size=1000)
    assert all(rule.judge(math.exp(0.1 - step / 300 + noise[step])) is None for step in range(1000))
    usual = rule.judge(math.exp(0.1 - 1000 / 300 + 3.0))
    assert usual is not None and 0.03 < usual < 0.08
    assert rule.judge(math.exp(0.1 - 1001 / 300)) is None


def test_before_the_warm_up_and_within_half_as_much_again_nothing_is_said() -> None:
    rule = SpikeRule()
    assert all(rule.judge(loss) is None for loss in [1.0] * 20 + [100.0] + [1.0] * 300)
    assert rule.judge(1.4) is None, "of a loss without any noise too"
    assert rule.judge(1.6) == pytest.approx(1.0, rel=0.02)


def test_a_spike_hides_no_later_one_and_a_loss_that_stays_high_becomes_usual() -> None:
    rule, noise = SpikeRule(), np.random.default_rng(2).normal(scale=0.1, size=2000)
    for log in noise[:300]:
        rule.judge(math.exp(log))
    assert rule.judge(math.exp(20.0)) is not None
    assert all(rule.judge(math.exp(log)) is None for log in noise[300:310])
    assert rule.judge(math.exp(1.5)) is not None
    said = [rule.judge(math.exp(1.0 + log)) is not None for log in noise[310:810]]
    assert said[0] and not any(said[100:])


@pytest.mark.parametrize("loss", [0.0, -1.0, math.inf, math.nan])
def test_what_has_no_logarithm_is_passed_over(loss: float) -> None:
    rule = SpikeRule()
    for _ in range(200):
        assert rule.judge(1.0) is None and rule.judge(loss) is None
    assert rule.judge(3.0) == pytest.approx(1.0)


class Watched:
    """A watch over steps of four losses each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.watch, self.step = LossWatch(self.lines.append), 0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, factor: float = 1.0, is_finite: torch.Tensor = TRUE) -> None:
        losses = factor * (1.0 + 0.1 * torch.rand(4, generator=self.generator))
        losses[self.step % 4] *= 1.2
        self.watch.add(self.step, summary_of(losses, torch.arange(4) + 10 * self.step), is_finite)
        self.step += 1

    def interval(self, number: int = 10) -> None:
        for _ in range(number):
            self.add()
        self.watch.report()


def test_one_line_per_interval_names_the_step_the_loss_and_the_samples() -> None:
    watched = Watched()
    for _ in range(20):
        watched.interval()
    assert watched.lines == []
    watched.add(4.0)
    watched.add(9.0)  # of step 201, whose highest loss is that of the second sample
    watched.add()
    watched.watch.report()
    assert len(watched.lines) == 1
    line = watched.lines[0]
    assert line.startswith("step 201: loss 10.09") and ", far above the 1.1" in line, line
    assert line.endswith(" of the steps before; highest at sample 2011; so were 1 more of the last 3 steps"), line
    watched.interval()
    assert len(watched.lines) == 1


def test_a_step_that_was_skipped_is_neither_usual_nor_a_spike() -> None:
    watched, untouched = Watched(), Watched()
    for watch in (watched, untouched):
        for _ in range(20):
            watch.interval()
    watched.add(math.nan, FALSE)
    watched.add(50.0, FALSE)
    watched.watch.report()
    assert watched.lines == [] and watched.watch._rule._logs == untouched.watch._rule._logs


def test_no_steps_and_a_rule_that_fails_end_nothing() -> None:
    watched = Watched()
    watched.watch.report()

    def fail(_: float) -> None:
        raise ArithmeticError("cannot")

    watched.watch._rule = SimpleNamespace(judge=fail)  # type: ignore[assignment]
    watched.interval()
    watched.interval()
    assert watched.lines == ["watching the loss failed at step 10 (cannot); the run goes on"]


def test_the_worst_samples_of_many_ranks() -> None:
    def rows(*worst: tuple[float, int]) -> torch.Tensor:
        return torch.tensor([[1.0, 1.0, *pair] for pair in worst], dtype=torch.float64)

    assert worst_samples(rows((1.0, 873), (2.0, 12))) == "samples 12, 873"
    assert worst_samples(rows((1.0, 873), (math.inf, 12))) == "sample 12", "the others' are innocent"
    assert worst_samples(rows(*((float(i), i) for i in range(9)))) == "samples 8, 7, 6, 5"
    large = 2**48 - 1
    assert worst_samples(summary_of(torch.tensor([0.0, math.nan]), torch.tensor([1, large]))[None]) == f"sample {large}"
