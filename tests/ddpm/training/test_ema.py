"""The closed form of an exponential average, and what is not averaged."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm import Ema, EmaBank, PowerEma
from ddpm.training.ema import WeightAverage, _lerp_many


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


@pytest.mark.parametrize("make", [
    lambda model: Ema(model, 100),
    lambda model: Ema(model, 100, ramp_up_ratio=0.1),
    lambda model: PowerEma(model, 0.1),
])  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False])
def test_a_skipped_step_changes_nothing(make: Callable[[nn.Module], WeightAverage], is_first: bool) -> None:
    """Told as a number or by the device; a batch that is not finite has spoilt the buffers of its network."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = make(model)
    if not is_first:
        average.update(model, 8)
    before = copy.deepcopy(average.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1)
    model(torch.full((8, 2), torch.nan))
    for none in (0, torch.tensor(0)):
        average.update(model, none)
        assert all(torch.equal(before[name], tensor) for name, tensor in average.state_dict().items())
    assert average.num_images == 8 * (not is_first)


def test_an_accelerator_averages_alike_and_nothing_is_read_from_it() -> None:
    generator = torch.Generator().manual_seed(0)
    averages, weights = ([torch.randn(50, generator=generator) for _ in range(70)] for _ in range(2))
    expected = [average.double().lerp(weight.double(), 0.3) for average, weight in zip(averages, weights)]
    _lerp_many(averages, weights, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(averages, [tensor.float() for tensor in expected], rtol=0, atol=1e-6)
    model = nn.Linear(3, 2, device="meta")  # a device without numbers
    for average in (Ema(model, 100, ramp_up_ratio=0.1), PowerEma(model, 0.1)):
        average.update(model, 8)
        average.update(model, torch.tensor(8, device="meta"))
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            _ = average.num_images


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


@given(batch=st.integers(1, 512), num_updates=st.integers(2, 20), ratio=st.floats(0.01, 1.0))
def test_ramp_up_has_its_closed_form(batch: int, num_updates: int, ratio: float) -> None:
    """The first step takes the weights; the k-th after it keeps 2^(-1 / (ratio k)), whatever the batch size: with
    weights of 1 and then 0, what is left is 2^(-(1 + 1/2 + ... + 1/n) / ratio)."""
    ema = Ema(constant(5.0), 1e12, ramp_up_ratio=ratio)
    ema.update(constant(1.0), batch)
    assert torch.equal(ema.state_dict()["bias"], torch.ones(2, dtype=torch.float64))
    for _ in range(num_updates):
        ema.update(constant(0.0), batch)
    harmonic = sum(1 / k for k in range(1, num_updates + 1))
    expected = 0.5 ** (harmonic / ratio)
    assert float(ema.state_dict()["weight"][0, 0]) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert ema.num_images == batch * (num_updates + 1)


def test_ramp_up_ends_at_the_half_life() -> None:
    """From 20,000 images on, 5% of them are more than the half-life: both averages then move alike."""
    with_ramp, without = Ema(constant(0.0), 1000, ramp_up_ratio=0.05), Ema(constant(0.0), 1000)
    with_ramp.load_state_dict(without.state_dict(), num_images=20_000)
    for value in (3.0, -1.0):
        with_ramp.update(constant(value), 100)
        without.update(constant(value), 100)
    assert torch.equal(with_ramp.state_dict()["weight"], without.state_dict()["weight"])


def test_ramp_up_goes_on_after_a_restart_only_with_the_count() -> None:
    one, two, forgetful = (Ema(constant(0.0), 1e9, ramp_up_ratio=0.1) for _ in range(3))
    for value in (1.0, 2.0, 3.0):
        one.update(constant(value), 64)
    two.load_state_dict(one.state_dict(), num_images=one.num_images)
    forgetful.load_state_dict(one.state_dict())
    for ema in (one, two, forgetful):
        ema.update(constant(8.0), 64)
    assert torch.equal(one.state_dict()["bias"], two.state_dict()["bias"])
    assert torch.equal(forgetful.state_dict()["bias"], torch.full((2,), 8.0, dtype=torch.float64))


def test_an_average_is_today_s_to_the_last_bit() -> None:
    """Fixed numbers of the average without ramp-up: a stored run must go on as it began."""
    ema = Ema(constant(0.1), 5000)
    for value in (0.3, -0.7, 1.1):
        ema.update(constant(value), 128)
    assert float(ema.state_dict()["weight"][0, 0]).hex() == "0x1.b6ed7460ec79ep-4"
    assert list(ema.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_impossible_ramp_up_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"^ramp_up_ratio: "):
        Ema(nn.Linear(1, 1), 100, ramp_up_ratio=ratio)


@pytest.mark.parametrize("ratio", [None, 0.05])
def test_a_bank_is_several_averages_at_once(ratio: float | None) -> None:
    halflives = (100, 1000, 25_000)
    bank = EmaBank(constant(0.0), halflives, ramp_up_ratio=ratio)
    alone = [Ema(constant(0.0), halflife, ramp_up_ratio=ratio) for halflife in halflives]
    for value in (1.0, 4.0, -2.0):
        bank.update(constant(value), 32)
        for ema in alone:
            ema.update(constant(value), 32)
    assert bank.halflives_images == halflives
    for halflife, ema in zip(halflives, alone, strict=True):
        own, state = bank[halflife].state_dict(), bank.state_dict()
        for name, tensor in ema.state_dict().items():
            assert torch.equal(own[name], tensor) and torch.equal(state[f"{halflife}/{name}"], tensor)
    assert len(bank.state_dict()) == 6
    other = EmaBank(constant(9.0), halflives, ramp_up_ratio=ratio)
    other.load_state_dict({name: tensor.clone() for name, tensor in bank.state_dict().items()}, num_images=96)
    for b in (bank, other):
        b.update(constant(5.0), 32)
    assert all(torch.equal(tensor, bank.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_bank_refuses_repeats_and_the_state_of_other_halflives() -> None:
    for halflives in ((), (10, 10)):
        with pytest.raises(ValueError, match=r"^halflives_images: "):
            EmaBank(nn.Linear(1, 1), halflives)
    bank = EmaBank(nn.Linear(1, 1), (10, 20))
    for other in ((10, 30), (10,), (10, 20, 30)):
        with pytest.raises(ValueError, match=r"^state: "):
            bank.load_state_dict(EmaBank(nn.Linear(1, 1), other).state_dict())
    with pytest.raises(KeyError):
        bank[30]
