"""Precision and layout of the network in training: what is stored stays float32, and how far the losses move."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.models.network_pass import NetworkPass, Precision, laid_out
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import (
    CPU,
    OPTIMIZER,
    batch_of,
    everything_of,
    make_network,
    make_task,
    single_rank,
)

NUM_STEPS = 60


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


def curve(**changes: Any) -> tuple[np.ndarray, TrainingState]:
    """The loss of each step, and the state after them."""
    network = dataclasses.replace(MODEL.network, dropout=0.0)  # type: ignore[type-var]  # its masks follow the layout
    task = make_task(network=network, **changes)
    made = laid_out(
        make_network(dataclasses.replace(MODEL, network=network)), CPU, channels_last=task.config.channels_last
    )
    state = TrainingState(made, OPTIMIZER)
    step, totals, losses = TrainingStep(task, state, CPU), LossTotals(20, CPU), []
    for number in range(NUM_STEPS):
        step(batch_of(number), totals, LossWatch())
        losses.append(totals.reduce()["loss"])
    return np.array(losses), state


@pytest.fixture(scope="module")
def in_float32() -> tuple[np.ndarray, TrainingState]:
    with single_rank():
        return curve()


def test_bf16_follows_the_losses_of_float32_and_stores_float32(in_float32: tuple[np.ndarray, TrainingState]) -> None:
    """Each loss within 5%, their means within 1%: bfloat16 has 8 bits of precision, of which errors of many cancel."""
    (exact, of_float32), (rounded, state) = in_float32, curve(precision="bf16")
    furthest, of_mean = np.abs(rounded / exact - 1).max(), abs(rounded.mean() / exact.mean() - 1)
    print(f"bf16: furthest loss {furthest:.1e}, mean of {NUM_STEPS} {of_mean:.1e}")
    assert 1e-5 < furthest < 0.05 and of_mean < 0.01
    assert exact[-10:].mean() < 0.9 * exact[:10].mean(), "it learns"
    dtypes = {name: tensor.dtype for name, tensor in everything_of(of_float32).items()}
    assert {name: tensor.dtype for name, tensor in everything_of(state).items()} == dtypes
    assert state.skipped_steps == ()


def test_channels_last_is_another_order_of_sums(in_float32: tuple[np.ndarray, TrainingState]) -> None:
    (exact, of_float32), (other, state) = in_float32, curve(channels_last=True)
    assert np.abs(other / exact - 1).max() < 1e-4
    shapes = {name: tensor.shape for name, tensor in everything_of(of_float32).items()}
    stored = everything_of(state)
    assert {name: tensor.shape for name, tensor in stored.items()} == shapes
    images = [tensor for tensor in stored.values() if tensor.ndim == 4]
    assert images and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in images), "all alike"


@pytest.mark.parametrize(
    ("precision", "channels_last", "dtype"), [("float32", False, torch.float32), ("bf16", True, torch.bfloat16)]
)
def test_what_the_network_is_given(precision: Precision, channels_last: bool, dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    class Convolution(torch.nn.Conv2d):
        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:  # type: ignore[override]
            seen.append(x_t)
            return super().forward(x_t)

    network = laid_out(Convolution(3, 4, 3, padding=1), CPU, channels_last=channels_last)
    evaluated = NetworkPass(network, CPU, precision=precision, channels_last=channels_last)
    prediction = evaluated(torch.rand(2, 3, 8, 8), torch.zeros(2), None)
    assert prediction.dtype == dtype and network.weight.dtype == torch.float32
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert network.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("precision", ["tf32", "float32", "bf16"])
def test_tf32_is_on_where_it_is_asked_for_alone(precision: Precision) -> None:
    NetworkPass(torch.nn.Linear(1, 1), CPU, precision=precision, channels_last=False)
    expected = "tf32" if precision == "tf32" else "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == expected
