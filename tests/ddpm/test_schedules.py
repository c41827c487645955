"""Tables against the definitions of the papers, computed a second way."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from hypothesis import given
from hypothesis import strategies as st

from ddpm.schedules import NoiseSchedule, ScheduleConfig, gather, make_schedule

BOTH = [ScheduleConfig(name="linear"), ScheduleConfig(name="cosine")]


def test_linear_is_the_paper_s() -> None:
    schedule = make_schedule(ScheduleConfig(name="linear", num_timesteps=1000))
    assert schedule.num_timesteps == schedule.num_train_timesteps == 1000
    assert float(schedule.beta[0]) == pytest.approx(1e-4, rel=1e-14)
    assert float(schedule.beta[999]) == pytest.approx(0.02, rel=1e-14)
    assert float(schedule.beta[333] - schedule.beta[332]) == pytest.approx(0.0199 / 999, rel=1e-9)
    # Ho et al., section 4: what is left of the signal at the end, D_KL(q(x_T | x_0) || N(0, I)) about 1e-5 bits.
    assert float(schedule.alpha_bar[999]) == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("T", [125, 250, 500])
def test_linear_ends_as_noisy_for_every_length(T: int) -> None:
    """The 1000 / T scaling keeps the integral of beta; only the second order differs."""
    end = float(make_schedule(ScheduleConfig(name="linear", num_timesteps=T)).alpha_bar[-1])
    assert math.log(end) == pytest.approx(math.log(4.0358e-5), rel=0.06)


def test_cosine_is_nichol_and_dhariwal_s() -> None:
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=1000))
    torch.testing.assert_close(schedule.beta.float(), betas_for_alpha_bar(1000), rtol=1e-6, atol=1e-7)

    def f(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 500, 990):  # before the cap on beta sets in
        assert float(schedule.alpha_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-10)
    assert float(schedule.beta.max()) == 0.999


@pytest.mark.parametrize("config", BOTH, ids=["linear", "cosine"])
def test_tables_are_float64_and_consistent(config: ScheduleConfig) -> None:
    schedule = make_schedule(config)
    product = 1.0
    for t in range(schedule.num_timesteps):
        assert float(schedule.alpha_bar_prev[t]) == product
        product *= 1 - float(schedule.beta[t])
        assert float(schedule.alpha_bar[t]) == pytest.approx(product, rel=1e-12)
        product = float(schedule.alpha_bar[t])
    for name in ("beta", "alpha", "alpha_bar", "alpha_bar_prev", "posterior_variance", "posterior_log_variance"):
        assert getattr(schedule, name).dtype == torch.float64
    assert float(schedule.posterior_variance[0]) == 0
    assert float(schedule.posterior_log_variance[0]) == math.log(float(schedule.posterior_variance[1]))
    torch.testing.assert_close(schedule.posterior_log_variance[1:].exp(), schedule.posterior_variance[1:])
    assert float(schedule.posterior_mean_coef_x_t[0]) == 0
    assert float(schedule.posterior_mean_coef_x_0[0]) == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize("config", BOTH, ids=["linear", "cosine"])
def test_respacing_to_every_step_changes_nothing(config: ScheduleConfig) -> None:
    schedule = make_schedule(config)
    same = schedule.respace(range(1000))
    assert torch.equal(same.alpha_bar, schedule.alpha_bar)
    torch.testing.assert_close(same.beta, schedule.beta, rtol=1e-10, atol=0)
    torch.testing.assert_close(same.posterior_variance, schedule.posterior_variance, rtol=1e-10, atol=0)


@given(steps=st.sets(st.integers(0, 99), min_size=1), inner=st.data())
def test_respacing_keeps_the_marginals_and_the_training_index(steps: set[int], inner: st.DataObject) -> None:
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=100))
    chain = schedule.respace(sorted(steps))
    assert chain.timesteps.tolist() == sorted(steps)
    assert torch.equal(chain.alpha_bar, schedule.alpha_bar[sorted(steps)])
    torch.testing.assert_close(torch.cumprod(1 - chain.beta, 0), chain.alpha_bar, rtol=1e-8, atol=1e-15)
    assert chain.num_train_timesteps == 100
    assert all(bool(getattr(chain, name).isfinite().all()) for name in ("posterior_log_variance", "beta"))
    again = inner.draw(st.sets(st.integers(0, len(steps) - 1), min_size=1))
    twice = chain.respace(sorted(again))
    assert twice.timesteps.tolist() == [sorted(steps)[i] for i in sorted(again)]


def test_gather_casts_last() -> None:
    table = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    got = gather(table, torch.tensor([1, 0, 1]), torch.zeros(3, 1, 2, 2))
    assert got.shape == (3, 1, 1, 1) and got.dtype == torch.float32
    assert got.flatten().tolist() == table[[1, 0, 1]].float().tolist()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_too_short_a_chain_is_refused_and_the_shortest_works(name: str) -> None:
    least = {"linear": 21, "cosine": 2}[name]
    make_schedule(ScheduleConfig(name=name, num_timesteps=least))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^num_timesteps: .* got "):
        ScheduleConfig(name=name, num_timesteps=least - 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("name", lambda: ScheduleConfig(name="quadratic")),  # type: ignore[arg-type]
        ("beta", lambda: NoiseSchedule.from_betas(torch.tensor([0.1, 1.0], dtype=torch.float64))),
        ("beta", lambda: NoiseSchedule.from_betas(torch.tensor([0.0, 0.1], dtype=torch.float64))),
        ("timesteps", lambda: make_schedule(BOTH[0]).respace([])),
        ("timesteps", lambda: make_schedule(BOTH[0]).respace([3, 2])),
        ("timesteps", lambda: make_schedule(BOTH[0]).respace([2, 2])),
        ("timesteps", lambda: make_schedule(BOTH[0]).respace([-1, 2])),
        ("timesteps", lambda: make_schedule(BOTH[0]).respace([0, 1000])),
    ],
)
def test_impossible_input_is_refused(field: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=rf"^{field}: "):
        call()
