"""A step that is not finite is left out on the device, on all ranks and by bits, and the host does not wait for it."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import ImportanceSampler, ObjectiveConfig
from pipeline.training.train_task import TrainTask
from pipeline.training.worker.averages import Averages
from pipeline.training.worker.health import TooManySkipped
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep
from tests.host_waits import WaitsOfTheHost
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import (
    CPU,
    IMPORTANCE,
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
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    with single_rank("nccl" if request.node.get_closest_marker("gpu") else "gloo"):
        yield


class Trainer:
    """Steps of a task, as the training loop makes them."""

    checks_skips = False

    def __init__(self, task: TrainTask, state: TrainingState, device: torch.device = CPU) -> None:
        self.state, self.step = state, TrainingStep(task, state, device)
        self.totals = LossTotals(20, device)
        self.watch = LossWatch()

    def train(self, until: int) -> None:
        while self.state.step < until:
            self.step(batch_of(self.state.step), self.totals, self.watch)
            if self.checks_skips:
                self.step.check_skips()


def test_nan_in_one_sample_leaves_the_step_out_by_bits_and_training_goes_on() -> None:
    trainer = Trainer(task := make_task(), make_state(task))
    poison(trainer.state, math.nan, {3: 5})
    trainer.train(3)
    before = everything_of(trainer.state)
    trainer.train(4)
    assert trainer.state.skipped_steps == (3,)
    assert_equal_bits(before, everything_of(trainer.state))
    assert trainer.state.averages.num_images == 3 * 8
    trainer.train(6)
    assert trainer.state.skipped_steps == (3,) and trainer.state.averages.num_images == 5 * 8
    weights = "train_weights.safetensors/"
    after = everything_of(trainer.state)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(weights))


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(t_choice="stratified"), IMPORTANCE])
def test_a_run_with_a_skip_is_one_in_which_that_batch_was_left_out(objective: ObjectiveConfig) -> None:
    task = make_task(objective=objective)
    skipping, leaving = Trainer(task, make_state(task)), Trainer(task, make_state(task))
    poison(skipping.state, math.nan, {6: 2})
    skipping.train(12)
    leaving.train(6)
    leaving.state.leave_out()
    leaving.train(12)
    assert skipping.state.parts().position == leaving.state.parts().position
    assert skipping.state.skipped_steps == (6,)
    assert_equal_bits(everything_of(skipping.state), everything_of(leaving.state))
    assert skipping.totals.reduce() == leaving.totals.reduce(), "a skipped step does not count"


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too() -> None:
    """The square of 3e19 is no float32; twice 3e19 is one."""
    task = make_task()
    trainer = Trainer(task, make_state(task))
    seen: list[Tensor] = []
    trainer.train(1)
    last = list(trainer.state.network.parameters())[-1]
    last.register_hook(lambda gradient: seen.append(gradient.clone()))
    poison(trainer.state, 3e19, {1: 0})
    trainer.train(2)
    assert trainer.state.skipped_steps == (1,)
    assert seen[0].isnan().all(), "without NaN in the place of the loss it is finite"


def test_the_losses_of_a_skipped_step_do_not_count() -> None:
    t, losses = torch.tensor([0, 7, 19]), torch.tensor([1.0, 2.0, 4.0])
    totals = LossTotals(20, CPU)
    totals.add(t, losses, torch.tensor(True))
    totals.add(t, torch.tensor([math.nan, math.inf, 5.0]), torch.tensor(False))
    totals.add(t, torch.tensor([7.0, 8.0, 9.0]), torch.tensor(False))
    assert totals.reduce() == {
        "loss": pytest.approx(7 / 3), "loss_t_quartile_1": 1.0, "loss_t_quartile_2": 2.0, "loss_t_quartile_4": 4.0,
    }  # fmt: skip
    assert totals.reduce() == {}


@pytest.mark.parametrize("is_each", [True, False])
@pytest.mark.parametrize("left_out", [(), (2, 3)])
def test_too_many_skipped_steps_of_a_window_end_it_and_those_left_out_do_not_count(
    left_out: tuple[int, ...], is_each: bool
) -> None:
    """Looked at after each step, or after all."""
    task = make_task(max_skipped_batches=2, skip_window_steps=6, rollback=rollback_of(left_out))
    trainer = Trainer(task, make_state(task))
    # In the window of step 9 are 4 to 9; in that of step 11 are 6 to 11.
    poison(trainer.state, math.nan, {1: 0, 5: 0, 9: 0, 10: 3, 11: 4})
    trainer.train(2)
    for step in left_out:
        assert trainer.state.step == step
        trainer.state.leave_out()
    trainer.checks_skips = is_each
    with pytest.raises(TooManySkipped, match=r"^step 10: .* for 3 of the last 6 steps") as raised:
        trainer.train(12)
        trainer.step.check_skips()
    assert raised.value.steps == ((5, 9, 10) if is_each else (5, 9, 10, 11)), "what is known to be bad is left out"
    trainer.step.check_skips()


TOO_MANY = (
    "step {step}: the loss or its gradient is not finite, for 3 of the last 1000 steps (max_skipped_batches is 2); "
    "highest loss at {samples}"
)


def one_rank(rank: int, folder: str) -> None:
    """NaN in a sample of rank 1 alone; both say what they know."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    task = make_task(max_skipped_batches=2)
    state = make_state(task)
    step, totals, watch = TrainingStep(task, state, CPU), LossTotals(20, CPU), LossWatch()
    if rank == 1:
        poison(state, math.nan, {1: 0, 3: 0, 5: 2})
    try:
        while True:
            step(batch_of(state.step, rank, 2), totals, watch)
            step.check_skips()
    except TooManySkipped as error:
        result = {"message": str(error), "steps": error.steps, "at": state.step, "totals": totals.reduce()}
    weights = {name: tensor.tolist() for name, tensor in state.network.state_dict().items()}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result | {"weights": weights}))
    torch.distributed.destroy_process_group()


def test_all_ranks_skip_alike_and_say_the_same_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["steps"] == [1, 3, 5] and one["at"] == 6
    sample = batch_of(5, 1, 2).sample_ids[2]
    assert one["message"] == TOO_MANY.format(step=5, samples=f"sample {sample}")


def test_the_host_reads_nothing_until_it_asks_what_was_skipped() -> None:
    state = make_state(make_task())
    with WaitsOfTheHost(CPU) as waits:
        for _ in range(3):
            for parameter in state.network.parameters():
                parameter.grad = torch.ones_like(parameter)
            state.apply_gradient(8)
    assert waits.found == []
    with WaitsOfTheHost(CPU) as waits:
        assert state.skipped_steps == state.skipped_steps == ()
    assert waits.found == ["Tensor.tolist of [3]"], "all at once, and once"


@pytest.mark.parametrize("name", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("t_choice", ["uniform", "stratified", "importance"])
def test_the_host_waits_for_nothing_in_a_step(t_choice: Any, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", from which nothing can be read: there is no number on it. Gloo and the optimiser do not
    know it, and are left out here; the test before has the optimiser."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    network = dataclasses.replace(MODEL.network, learned_variance=name == "hybrid")
    model = dataclasses.replace(MODEL, network=network)
    objective = ObjectiveConfig(name=name, t_choice=t_choice)
    task = make_task(network=network, objective=objective, horizontal_flip=True, label_drop=0.1, micro_batch=8)
    task, meta = dataclasses.replace(task, model_config=model), torch.device("meta")
    state = make_state(task)
    state.averages = Averages(state.network.to(meta), task.config.optimizer, (0.05,))
    if state.importance is not None:
        state.importance = ImportanceSampler(20, device=meta)
    monkeypatch.setattr(state._optimizer, "step", lambda: None)
    trainer = Trainer(task, state, meta)
    with WaitsOfTheHost(meta) as waits:
        trainer.step(batch_of(0), trainer.totals, trainer.watch)
    assert waits.found == []
    with pytest.raises(RuntimeError, match="meta"):
        _ = state.skipped_steps


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits() -> None:
    device = torch.device("cuda", 0)
    trainer = Trainer(task := make_task(horizontal_flip=True, label_drop=0.1), make_state(task, device), device)
    trainer.train(3)  # what is made once, is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.skipped_steps == ()
    assert trainer.state.averages.num_images == 8 * 8


@pytest.mark.gpu
def test_a_gpu_leaves_a_step_out_by_bits() -> None:
    device = torch.device("cuda", 0)
    trainer = Trainer(task := make_task(), make_state(task, device), device)
    trainer.train(3)
    before = everything_of(trainer.state)
    next(trainer.state.network.parameters()).register_hook(lambda gradient: gradient * math.nan)
    trainer.train(4)
    assert trainer.state.skipped_steps == (3,)
    assert_equal_bits(before, everything_of(trainer.state))
