"""Tables against the definitions of the papers, computed a second way."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar, rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln

from ddpm import NoiseSchedule, ScheduleConfig, make_schedule
from ddpm.process.schedules import gather

BOTH = [ScheduleConfig(name="linear"), ScheduleConfig(name="cosine")]
EVERY = [
    *BOTH,
    ScheduleConfig(name="linear", zero_terminal_snr=True),
    ScheduleConfig(name="cosine", zero_terminal_snr=True, shift=2.0),
    ScheduleConfig(name="linear", shift=0.5, num_timesteps=100),
]
NAMES = ["linear", "cosine", "linear-zero", "cosine-shift-zero", "linear-shift"]


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
        ("beta", lambda: NoiseSchedule.from_betas(torch.tensor([0.1, 0.2]))),
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


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_terminal_snr_is_lin_et_al_s(name: str) -> None:
    """Their Algorithm 1 as diffusers has it, run in float64."""
    plain = make_schedule(ScheduleConfig(name=name))  # type: ignore[arg-type]
    zero = make_schedule(ScheduleConfig(name=name, zero_terminal_snr=True))  # type: ignore[arg-type]
    torch.testing.assert_close(zero.beta, rescale_zero_terminal_snr(plain.beta), rtol=1e-9, atol=1e-12)
    assert float(zero.alpha_bar[-1]) == 0 and float(zero.beta[-1]) == 1 and float(zero.alpha_bar[-2]) > 0
    assert float(zero.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-14)
    for chain in (zero, zero.respace([0, 10, 999]), zero.respace([999])):
        for table in ("posterior_variance", "posterior_log_variance", "posterior_mean_coef_x_0", "angle"):
            assert bool(getattr(chain, table).isfinite().all()), table
        # From nothing but noise the posterior mean is that of x_{t-1} given x_0: no part of x_t is kept.
        assert float(chain.posterior_mean_coef_x_t[-1]) == 0
    assert float(zero.log_snr(torch.tensor([999]))) == -math.inf
    assert float(zero.sigma(torch.tensor([999.0], dtype=torch.float64))) == math.inf


@pytest.mark.parametrize("shift", [0.5, 4.0])
def test_shift_moves_the_log_snr(shift: float) -> None:
    plain, shifted = (make_schedule(ScheduleConfig(name="cosine", shift=s)) for s in (1.0, shift))
    t = torch.arange(1000)
    expected = plain.log_snr(t) - 2 * math.log(shift)
    torch.testing.assert_close(shifted.log_snr(t), expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(shifted.sigma(t), shift * plain.sigma(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
def test_continuous_in_t(config: ScheduleConfig) -> None:
    """The tables' own entries at integers; between them strictly less signal the later."""
    schedule = make_schedule(config)
    T = schedule.num_timesteps
    integers = torch.arange(T)
    for of_t in (schedule.alpha_bar_at, schedule.log_snr, schedule.sigma):
        assert torch.equal(of_t(integers.double()), of_t(integers))
    assert torch.equal(schedule.alpha_bar_at(integers), schedule.alpha_bar)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    torch.testing.assert_close(schedule.log_snr(integers), snr.log(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.sigma(integers), snr.rsqrt(), rtol=1e-12, atol=0)
    dense = torch.linspace(0, T - 1, 10 * T, dtype=torch.float64)
    assert bool((schedule.alpha_bar_at(dense).diff() < 0).all())
    log_snr = schedule.log_snr(dense)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(schedule.alpha_bar_at(dense), log_snr.sigmoid(), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(schedule.t_at_log_snr(log_snr), dense, rtol=0, atol=2e-9)
    assert torch.equal(schedule.t_at_log_snr(schedule.log_snr(integers)), integers.double())


def test_between_the_steps_of_the_linear_schedule() -> None:
    """The product of 1 - b - i d over i has a continuation by the gamma function."""
    schedule = make_schedule(BOTH[0])
    b, d = 1e-4, 0.0199 / 999
    c = (1 - b) / d
    t = torch.linspace(0, 999, 500, dtype=torch.float64)
    expected = (t + 1) * math.log(d) + gammaln(c + 1) - torch.from_numpy(gammaln(c - t.numpy()))
    torch.testing.assert_close(schedule.alpha_bar_at(t).log(), expected, rtol=2e-4, atol=1e-6)
    late = t > 20
    torch.testing.assert_close(schedule.alpha_bar_at(t).log()[late], expected[late], rtol=1e-6, atol=0)


def test_between_the_steps_of_the_cosine_schedule() -> None:
    """The formula at any t, before the cap on beta sets in."""
    t = torch.linspace(0, 990, 500, dtype=torch.float64)
    f = (
        torch.cos(((t + 1) / 1000 + 0.008) / 1.008 * (math.pi / 2)).square()
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    torch.testing.assert_close(make_schedule(BOTH[1]).alpha_bar_at(t), f, rtol=1e-6, atol=0)


def test_beyond_the_ends() -> None:
    schedule = make_schedule(BOTH[0])
    assert schedule.t_at_log_snr(torch.tensor([-100.0, 100.0], dtype=torch.float64)).tolist() == [999, 0]
    for t in (-0.1, 999.1, math.nan):
        with pytest.raises(ValueError, match=r"^t: "):
            schedule.alpha_bar_at(torch.tensor([5.0, t], dtype=torch.float64))


def test_respacing_to_places_between_steps() -> None:
    schedule = make_schedule(BOTH[1])
    places = [0.0, 3.25, 700.5, 999.0]
    chain = schedule.respace(places)
    assert chain.timesteps.dtype == torch.float64 and chain.timesteps.tolist() == places
    assert torch.equal(chain.alpha_bar, schedule.alpha_bar_at(torch.tensor(places, dtype=torch.float64)))
    torch.testing.assert_close(torch.cumprod(chain.alpha, 0), chain.alpha_bar, rtol=1e-8, atol=1e-15)
    integers = schedule.respace([0.0, 10.0, 999.0])
    assert torch.equal(integers.beta, schedule.respace([0, 10, 999]).beta)
    with pytest.raises(ValueError, match=r"^timesteps: must be integers in a chain that is respaced"):
        schedule.respace([0, 10, 20]).respace([0.5, 1.0])


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
def test_from_alpha_bar_is_from_betas_the_other_way(config: ScheduleConfig) -> None:
    schedule = make_schedule(config)
    again = NoiseSchedule.from_alpha_bar(schedule.alpha_bar)
    torch.testing.assert_close(again.beta, schedule.beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(again.posterior_variance, schedule.posterior_variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "alpha_bar",
    [[0.9, 0.9], [0.9, 0.95], [1.0, 0.5], [0.5, -0.1], [0.5, 0.0, -0.1], [math.nan], [], [[0.9, 0.5]]],
)
def test_impossible_alpha_bar(alpha_bar: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^alpha_bar: "):
        NoiseSchedule.from_alpha_bar(torch.tensor(alpha_bar, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^alpha_bar: "):
        NoiseSchedule.from_alpha_bar(torch.tensor([0.5]))


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_impossible_shift(shift: float) -> None:
    with pytest.raises(ValueError, match=r"^shift: .*got"):
        ScheduleConfig(shift=shift)
