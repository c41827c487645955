"""Micro-batches and workers cut a global batch in many ways: the gradient is that of the whole."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm import UNetConfig
from pipeline.data.data_order import DataConfig
from pipeline.training.trial import micro_batches
from pipeline.training.worker import training_step
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import CPU, OPTIMIZER, batch_of, make_network, make_task, small_network

pytestmark = pytest.mark.xdist_group("accumulation")  # the processes are started once for all
LANES = 4  # of two rows: three workers have 2, 2 and 4 of them
WORLDS = (1, 2, 3)
MICRO_BATCHES = (None, 2, 1)
NUM_STEPS = 20


@given(num_rows=st.integers(1, 40), more=st.integers(0, 40), size=st.none() | st.integers(1, 50))
def test_parts_are_in_order_of_equal_size_and_number(num_rows: int, more: int, size: int | None) -> None:
    parts = micro_batches(num_rows, num_rows + more, size)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= min(size or num_rows, min(sizes) + 1)
    assert len(parts) == min(num_rows, len(micro_batches(num_rows + more, num_rows + more, size)))


class Gradients(TrainingState):
    """Also keeps the gradients that it was given."""

    def apply_gradient(self, num_images: int) -> Tensor:
        self.seen = torch.cat([p.grad.flatten().clone() for p in self.network.parameters() if p.grad is not None])
        return super().apply_gradient(num_images)


def train(
    rank: int,
    world: int,
    steps: int,
    *,
    micro_batch: int | None = None,
    dropout: float = 0.0,
    make: Callable[[], nn.Module] | None = None,
    **changes: Any,
) -> Gradients:
    """One rank's state after some steps."""
    assert isinstance(MODEL.network, UNetConfig)
    network = dataclasses.replace(MODEL.network, dropout=dropout)
    task = make_task(network=network, micro_batch=micro_batch, data=DataConfig(lanes=LANES), **changes)
    made = make() if make else make_network(dataclasses.replace(MODEL, network=network))
    state = Gradients(made.to(torch.get_default_dtype()), OPTIMIZER)
    step, totals, watch = TrainingStep(task, state, CPU), LossTotals(20, CPU), LossWatch()
    while state.step < steps:
        step(batch_of(state.step, rank, world, lanes=LANES), totals, watch)
    step.check_skips()
    assert state.skipped_steps == ()
    return state


def in_double_precision() -> None:
    """Images are made in float32: here they are not, nor anything that follows from them."""
    original = training_step.images_to_x_0
    training_step.images_to_x_0 = lambda images, levels: original(images, levels).double()  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)


def every_way(rank: int, folder: str) -> None:
    """What three processes find, in groups of one to three."""
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    for is_double in (False, True):
        if is_double:
            in_double_precision()
        for world in WORLDS:
            if rank >= world:
                continue
            rendezvous = f"file://{folder}/{world}-{is_double}"
            torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
            for micro_batch in MICRO_BATCHES:
                if is_double:
                    state = train(rank, world, NUM_STEPS, micro_batch=micro_batch, dropout=0.0)
                    weights = [parameter.detach().flatten() for parameter in state.network.parameters()]
                    found[f"weights/{world}/{micro_batch}"] = torch.cat(weights)
                else:
                    state = train(rank, world, 1, micro_batch=micro_batch, dropout=0.0)
                    found[f"gradient/{world}/{micro_batch}"] = state.seen
            if not is_double and world < 3:
                state = train(rank, world, 1, micro_batch=4, dropout=0.5)  # of one worker two parts, of two one each
                found[f"dropout/{world}"] = state.seen
                state = train(rank, world, 1, micro_batch=None, dropout=0.5)
                found[f"dropout/{world}/whole"] = state.seen
            if not is_double and world == 2:
                for asked in (False, True):
                    state = train(rank, world, 3, make=small_network, compile=asked)
                    found[f"compiled/{asked}"] = state.seen
                found["graphs"] = torch.tensor(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/rank-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ways")
    torch.multiprocessing.spawn(every_way, args=(str(folder),), nprocs=3)
    ranks = [torch.load(Path(folder, f"rank-{rank}.pt"), weights_only=True) for rank in range(3)]
    for one, other in pairwise(ranks):
        assert all(torch.equal(one[name], other[name]) for name in other), "every rank has the same"
    yield ranks[0]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_however_the_batch_is_cut_the_gradient_and_what_comes_of_it_are_the_same(
    found: dict[str, Tensor], world: int, micro_batch: int | None
) -> None:
    of_gradient = difference(found[f"gradient/{world}/{micro_batch}"], found["gradient/1/None"])
    of_weights = difference(found[f"weights/{world}/{micro_batch}"], found["weights/1/None"])
    print(f"{world} workers, micro-batch {micro_batch}: gradient {of_gradient:.1e}, after 20 steps {of_weights:.1e}")
    assert of_gradient <= 1e-6 and of_weights <= 1e-9
    assert found["weights/1/None"].dtype == torch.float64


def test_dropout_goes_by_the_micro_batch_and_not_by_the_worker(found: dict[str, Tensor]) -> None:
    assert difference(found["dropout/2"], found["dropout/1"]) <= 1e-6
    assert torch.equal(found["dropout/2/whole"], found["dropout/2"]), "a worker's four are one part"
    assert difference(found["dropout/1/whole"], found["dropout/1"]) > 1e-3, "other masks"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPUs needs g++")
def test_two_workers_share_the_gradients_of_a_compiled_network(found: dict[str, Tensor]) -> None:
    of_gradient = difference(found["compiled/True"], found["compiled/False"])
    print(f"compiled against eager, two workers, third step: {of_gradient:.1e}")
    assert of_gradient < 1e-5
    assert found["graphs"] == 1, "what was compiled in the trial is what trains"


def test_a_micro_batch_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^micro_batch: at least 1, got 0"):
        make_task(micro_batch=0)
