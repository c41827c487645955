"""The loop on one rank, without Ray: which batches it trains on, and what it logs."""

from collections.abc import Iterator

import pytest
import torch

from pipeline.training.train_board import Orders
from pipeline.training.worker.health import TooManySkipped
from pipeline.training.worker.step_profile import StepProfile
from pipeline.training.worker.train_loop import Instruments, _steps
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.step_cases import (
    CPU,
    assert_equal_bits,
    batch_of,
    everything_of,
    make_state,
    make_task,
    poison,
    rollback_of,
    single_rank,
)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


class NoSystem:
    """In the place of the machine's figures."""

    def gather(self) -> dict[str, float]:
        return {}


INSTRUMENTS = Instruments(system=NoSystem(), profile=StepProfile(0, CPU, lambda trace, table: None))  # type: ignore[arg-type]


class Recorded:
    """In the place of rank 0's record: what it was given."""

    def __init__(self, state: TrainingState) -> None:
        self.state, self.logged, self.steps = state, dict[int, dict[str, float]](), list[int]()
        self.saved: list[int] = []

    def log(self, metrics: dict[str, float], _: object) -> None:
        self.logged[self.state.step] = metrics

    def after_step(self) -> None:
        self.steps.append(self.state.step)

    def save_now(self) -> None:
        self.saved.append(self.state.step)


class Asked:
    """In the place of the group's control: something is asked before a step, or nothing at all."""

    def __init__(self, orders: Orders = Orders.NONE, before_step: int = -1) -> None:
        self._orders, self._before_step = orders, before_step

    def begin(self, step: int) -> None:
        pass

    def agreed(self, step: int) -> Orders:
        return self._orders if step == self._before_step else Orders.NONE

    def end(self) -> None:
        pass


def run(left_out: tuple[int, ...], poisoned: tuple[int, ...] = ()) -> Recorded:
    task = make_task(steps=20, log_interval_steps=5, rollback=rollback_of(left_out), max_skipped_batches=2)
    recorded = Recorded(make_state(task))
    poison(recorded.state, float("nan"), dict.fromkeys(poisoned, 1))
    _steps(task, Asked(), recorded.state, map(batch_of, range(20)), recorded, CPU, INSTRUMENTS)  # type: ignore[arg-type]
    return recorded


def test_left_out_batches_are_read_and_passed_over_and_everything_else_goes_its_way() -> None:
    """Beside a run in which one of them was skipped, and one in which none was: the window is not touched."""
    left_out = run((4, 9, 19))
    assert left_out.steps == list(range(1, 21)) and sorted(left_out.logged) == [5, 10, 15, 20]
    assert left_out.state.step == 20 and left_out.state.skipped_steps == (4, 9, 19)
    assert all(metrics["loss"] > 0 and metrics["grad_norm"] > 0 for metrics in left_out.logged.values())
    averages = left_out.state.averages
    assert averages.num_images == 17 * 8
    skipping = run((9, 19), poisoned=(4,))
    assert skipping.state.skipped_steps == (4, 9, 19)
    assert_equal_bits(everything_of(skipping.state), everything_of(left_out.state))
    assert {step: metrics["loss"] for step, metrics in skipping.logged.items()} == {
        step: metrics["loss"] for step, metrics in left_out.logged.items()
    }
    # Four of the window, of which two count.
    assert run((4, 9), poisoned=(10, 12)).state.skipped_steps == (4, 9, 10, 12)
    unbroken = run(())
    assert not torch.equal(*(next(iter(one.state.network.state_dict().values())) for one in (unbroken, left_out))), (
        "it makes a difference"
    )


def test_an_interval_without_a_trained_step_has_no_loss_and_no_norm() -> None:
    recorded = run((0, 1, 2, 3, 4))
    assert (
        recorded.logged[5].keys() == {"data_wait_share", "peak_memory_bytes"}
        and {"loss", "grad_norm"} <= recorded.logged[10].keys()
    )


@pytest.mark.parametrize("orders", [Orders.NONE, Orders.SAVE, Orders.LEAVE])
def test_a_run_that_has_diverged_writes_no_checkpoint(orders: Orders) -> None:
    """Losses are logged much later: it is found when a checkpoint is due or asked for, and nothing is logged."""
    due = 8 if orders == Orders.NONE else 50
    task = make_task(log_interval_steps=50, checkpoint_interval_steps=due, max_skipped_batches=2)
    recorded = Recorded(make_state(task))
    poison(recorded.state, float("nan"), dict.fromkeys((1, 3, 5), 1))
    batches = map(batch_of, range(20))
    with pytest.raises(TooManySkipped) as raised:
        _steps(task, Asked(orders, 8), recorded.state, batches, recorded, CPU, INSTRUMENTS)  # type: ignore[arg-type]
    assert raised.value.steps == (1, 3, 5) and recorded.state.step == 8
    assert recorded.saved == [] and recorded.logged == {} and max(recorded.steps) == (7 if due == 8 else 8)
