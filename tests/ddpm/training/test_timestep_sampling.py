"""Stratified and importance-sampled t: one for each stratum, the right distribution, a state that survives."""

import collections

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import ImportanceSampler, Stream, random_integers, stratified_timesteps
from ddpm.training.timestep_sampling import uniform_timesteps

SEED = 5


def stratified(T: int, batch: int, step: int = 0, seed: int = SEED) -> Tensor:
    return stratified_timesteps(T, seed=seed, step=step, slots=torch.arange(batch), global_batch=batch).t


def test_uniform_is_the_draw_of_the_sample() -> None:
    ids, epochs = torch.arange(50), torch.arange(50) % 3
    chosen = uniform_timesteps(1000, seed=SEED, sample_ids=ids, epochs=epochs)
    assert torch.equal(chosen.t, random_integers(SEED, Stream.TRAIN_T, ids, epochs, 1000))
    assert torch.equal(chosen.weight, torch.ones(50))


@given(T=st.integers(1, 1200), batch=st.integers(1, 300), step=st.integers(0, 2**32 - 1))
def test_exactly_one_t_in_each_stratum(T: int, batch: int, step: int) -> None:
    """The i-th smallest t lies in [i T / B, (i + 1) T / B), whose ends are rounded down to a step."""
    t = stratified(T, batch, step).sort().values.tolist()
    assert all(i * T // batch <= t_i <= ((i + 1) * T - 1) // batch for i, t_i in enumerate(t))


def test_as_many_slots_as_steps_visit_every_step_once() -> None:
    for step in range(5):
        t = stratified(128, 128, step)
        assert t.sort().values.tolist() == list(range(128)) and t.tolist() != list(range(128))


def test_a_rank_s_slots_are_the_whole_batch_s() -> None:
    whole = stratified(1000, 96, 7)
    for slots in (torch.arange(40, 80), torch.tensor([95, 0, 3]), torch.zeros(0, dtype=torch.int64)):
        chosen = stratified_timesteps(1000, seed=SEED, step=7, slots=slots, global_batch=96)
        assert torch.equal(chosen.t, whole[slots]) and torch.equal(chosen.weight, torch.ones(len(slots)))


def test_strata_are_dealt_anew_in_every_step() -> None:
    """Of 64 slots one keeps its stratum by chance: 1 +- 1 of each step, 200 +- 14 of 200 steps."""
    strata = torch.stack([stratified(64, 64, step) for step in range(201)])
    assert abs(int((strata[1:] == strata[:-1]).sum()) - 200) < 5 * 200**0.5
    assert not torch.equal(stratified(64, 64, seed=SEED + 1), strata[0])
    assert torch.equal(stratified(64, 64), strata[0])


def test_golden_vector() -> None:
    """A run that is resumed by a later version must draw the same."""
    assert stratified(1000, 8, step=3).tolist() == GOLDEN


GOLDEN = [162, 901, 533, 832, 56, 378, 252, 640]


def test_each_slot_is_uniform_by_itself() -> None:
    """12 slots, T = 30: not a whole number of steps per stratum. Chi-squared at 1e-4."""
    t = torch.stack([stratified(30, 12, step) for step in range(2000)])
    for slot in (0, 11):
        assert scipy.stats.chisquare(np.bincount(t[:, slot], minlength=30)).pvalue > 1e-4


def test_a_batch_mean_varies_less_than_with_uniform_t() -> None:
    """For a loss linear in t, 64 strata leave 1/64^2 of the variance of a uniform batch's mean."""
    means = [float(stratified(10_000, 64, step).double().mean()) for step in range(200)]
    uniform_variance = 10_000**2 / 12 / 64
    assert np.var(means) == pytest.approx(uniform_variance / 64**2, rel=0.5)
    assert np.mean(means) == pytest.approx(4999.5, abs=4 * (uniform_variance / 64**2 / 200) ** 0.5)


def filled(second_moment: Tensor, *, history: int = 4, uniform_share: float = 0.001) -> ImportanceSampler:
    """A sampler that has seen losses with these moments and nothing else."""
    sampler = ImportanceSampler(len(second_moment), history=history, uniform_share=uniform_share)
    for _ in range(history):
        sampler.update(torch.arange(len(second_moment)), second_moment.sqrt())
    return sampler


def test_importance_is_uniform_until_every_t_has_its_history() -> None:
    sampler = ImportanceSampler(6, history=3)
    for _ in range(3):
        sampler.update(torch.arange(5), torch.arange(5).float() + 1)
        assert torch.equal(sampler.probabilities, torch.full((6,), 1 / 6, dtype=torch.float64))
        chosen = sampler.draw(seed=SEED, step=0, slots=torch.arange(20))
        assert torch.equal(chosen.weight, torch.ones(20))
    sampler.update(torch.tensor([5, 5, 5]), torch.ones(3))
    assert float(sampler.probabilities[4]) == pytest.approx(0.999 * 5 / 16 + 0.001 / 6)


def test_draws_have_the_stated_distribution_and_unbiased_weights() -> None:
    """20,000 draws, chi-squared at 1e-4; the weighted mean of f(t) = t is that over uniform t, within 5 errors."""
    moment = torch.linspace(0.1, 5, 20, dtype=torch.float64).square()
    sampler = filled(moment, uniform_share=0.01)
    chosen = sampler.draw(seed=SEED, step=3, slots=torch.arange(20_000))
    expected = sampler.probabilities * 20_000
    assert scipy.stats.chisquare(np.bincount(chosen.t, minlength=20), expected.numpy()).pvalue > 1e-4
    torch.testing.assert_close(chosen.weight.double(), 1 / (20 * sampler.probabilities[chosen.t]), rtol=1e-6, atol=0.0)
    values = (chosen.weight * chosen.t).double()
    assert float(values.mean()) == pytest.approx(9.5, abs=5 * float(values.std()) / 20_000**0.5)


def test_a_slot_s_draw_depends_on_seed_step_and_slot_alone() -> None:
    sampler = filled(torch.linspace(1, 4, 50, dtype=torch.float64))
    whole = sampler.draw(seed=SEED, step=9, slots=torch.arange(64))
    part = sampler.draw(seed=SEED, step=9, slots=torch.tensor([40, 3]))
    assert torch.equal(part.t, whole.t[[40, 3]]) and torch.equal(part.weight, whole.weight[[40, 3]])
    for other in (
        sampler.draw(seed=SEED, step=10, slots=torch.arange(64)),
        sampler.draw(seed=6, step=9, slots=torch.arange(64)),
    ):
        assert not torch.equal(other.t, whole.t)


@given(
    batches=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6),
    history=st.integers(1, 4),
)
def test_history_is_the_latest_losses_of_each_t_in_slot_order(batches: list[list[int]], history: int) -> None:
    sampler = ImportanceSampler(4, history=history)
    naive = [collections.deque[float](maxlen=history) for _ in range(4)]
    serial = 0.0
    for batch in batches:
        losses = []
        for t in batch:
            serial += 1
            naive[t].append(serial)
            losses.append(serial)
        sampler.update(torch.tensor(batch, dtype=torch.int64), torch.tensor(losses))
    state = sampler.state_dict()
    for t in range(4):
        remembered = state["losses"][t][state["losses"][t] > 0]
        assert sorted(remembered.tolist()) == sorted(naive[t])
        assert int(state["counts"][t]) == sum(batch.count(t) for batch in batches)


def test_converges_to_the_optimal_distribution() -> None:
    """Losses |N(0, 1)| s_t, of the t that it drew itself: p(t) approaches s_t / sum, each to 5% with 200 losses."""
    scale = torch.linspace(0.2, 2, 10, dtype=torch.float64)
    sampler, generator = ImportanceSampler(10, history=200), torch.Generator().manual_seed(0)
    for step in range(80):
        t = sampler.draw(seed=SEED, step=step, slots=torch.arange(128)).t
        sampler.update(t, scale[t] * torch.randn(128, generator=generator, dtype=torch.float64).abs())
    assert int(sampler.state_dict()["counts"].min()) >= 200
    torch.testing.assert_close(sampler.probabilities, scale / scale.sum(), rtol=0.2, atol=0.0)


def test_state_round_trip_goes_on_as_if_nothing_had_happened() -> None:
    one, other = ImportanceSampler(7, history=2), ImportanceSampler(7, history=2)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randint(7, (32,), generator=generator), torch.rand(32, generator=generator)) for _ in range(6)]
    for batch in batches[:3]:
        one.update(*batch)
    stored = one.state_dict()
    other.load_state_dict(stored)
    for batch in batches[3:]:
        one.update(*batch)
        other.update(*batch)
    assert torch.equal(one.probabilities, other.probabilities)
    assert not torch.equal(stored["losses"], one.state_dict()["losses"]), "state_dict gives copies"
    drawn = [s.draw(seed=SEED, step=1, slots=torch.arange(50)).t for s in (one, other)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_batch_that_is_not_finite_or_skipped_changes_nothing(bad: float | None) -> None:
    sampler = filled(torch.ones(3, dtype=torch.float64))
    before = sampler.state_dict()
    losses = torch.tensor([1.0, 2.0 if bad is None else bad])
    sampler.update(torch.tensor([0, 1]), losses, is_trained=torch.tensor(bad is not None))
    assert all(torch.equal(before[name], tensor) for name, tensor in sampler.state_dict().items())
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), is_trained=torch.tensor(True))
    assert sampler.state_dict()["counts"].tolist() == [5, 5, 4]


def test_nothing_is_read_from_the_device() -> None:
    """The device "meta" has no numbers that could be read."""
    sampler = ImportanceSampler(7, device="meta")
    chosen = sampler.draw(seed=SEED, step=1, slots=torch.arange(5, device="meta"))
    sampler.update(chosen.t, chosen.weight, is_trained=chosen.weight.sum() > 0)
    assert chosen.t.device.type == chosen.weight.device.type == "meta"


def test_impossible_samplers_and_foreign_states_are_refused() -> None:
    for field, arguments in {
        "num_timesteps": {"num_timesteps": 0},
        "history": {"num_timesteps": 3, "history": 0},
        "uniform_share": {"num_timesteps": 3, "uniform_share": 1.1},
    }.items():
        with pytest.raises(ValueError, match=rf"^{field}: "):
            ImportanceSampler(**arguments)  # type: ignore[arg-type]
    for state in (ImportanceSampler(4).state_dict(), ImportanceSampler(3, history=9).state_dict(), {}):
        with pytest.raises(ValueError, match=r"^state: "):
            ImportanceSampler(3).load_state_dict(state)
