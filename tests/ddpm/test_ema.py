"""The closed form of an exponential average, and what is not averaged."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm.ema import Ema


def constant(value: float) -> nn.Linear:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@given(halflife=st.floats(1, 1e6), batch=st.integers(1, 4096), num_updates=st.integers(1, 20))
def test_closed_form(halflife: float, batch: int, num_updates: int) -> None:
    """From w_0 under constant weights w: w + (w_0 - w) 2^(-images / halflife), whatever the batch size."""
    ema = Ema(constant(5.0), halflife)
    for _ in range(num_updates):
        ema.update(constant(-1.0), batch)
    expected = -1.0 + 6.0 * 0.5 ** (batch * num_updates / halflife)
    assert float(ema.state_dict()["weight"][1, 2]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_half_is_left_after_a_halflife() -> None:
    ema = Ema(constant(1.0), 1000)
    for _ in range(10):
        ema.update(constant(0.0), 100)
    torch.testing.assert_close(ema.state_dict()["bias"], torch.full((2,), 0.5, dtype=torch.float64))


def test_varying_weights_are_weighted_by_their_age() -> None:
    ema, decay = Ema(constant(0.0), 64), 0.5 ** (32 / 64)
    for value in (1.0, 4.0, -2.0):
        ema.update(constant(value), 32)
    expected = (1 - decay) * (1.0 * decay**2 + 4.0 * decay - 2.0)
    assert float(ema.state_dict()["bias"][0]) == pytest.approx(expected, rel=1e-12)


def test_buffers_are_copied_and_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, 100)
    for _ in range(3):
        model(torch.randn(8, 2))
    before = copy.deepcopy(model.state_dict())
    ema.update(model, 8)
    state = ema.state_dict()
    assert int(state["1.num_batches_tracked"]) == 3
    assert torch.equal(state["1.running_mean"], model.state_dict()["1.running_mean"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(tensor.requires_grad for tensor in state.values())


def test_tied_parameters_are_averaged_under_both_names() -> None:
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight
    model = nn.ModuleDict({"a": a, "b": b})
    ema = Ema(model, 100)
    with torch.no_grad():
        a.weight.add_(1)
    ema.update(model, 100)
    state = ema.state_dict()
    torch.testing.assert_close(state["a.weight"], a.weight.detach() - 0.5)
    assert torch.equal(state["a.weight"], state["b.weight"])


def test_state_round_trip_goes_on_as_if_nothing_had_happened() -> None:
    one, other = Ema(constant(1.0), 100), Ema(constant(9.0), 100)
    one.update(constant(2.0), 30)
    stored = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other.load_state_dict(stored)
    for ema in (one, other):
        ema.update(constant(3.0), 30)
    target = constant(0.0)
    other.copy_to(target)
    assert torch.equal(target.weight, one.state_dict()["weight"])
    assert not torch.equal(stored["weight"], other.state_dict()["weight"])


def test_another_network_s_state_is_refused() -> None:
    ema = Ema(nn.Linear(3, 2), 100)
    with pytest.raises(ValueError, match=r"^state: .*bias"):
        ema.load_state_dict({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"^state: weight .*\[2, 3\], got \[1, 3\]"):
        ema.load_state_dict({"weight": torch.zeros(1, 3), "bias": torch.zeros(2)})


@pytest.mark.parametrize("halflife", [0, -1, float("nan")])
def test_impossible_halflife_is_refused(halflife: float) -> None:
    with pytest.raises(ValueError, match=r"^halflife_images: "):
        Ema(nn.Linear(1, 1), halflife)
