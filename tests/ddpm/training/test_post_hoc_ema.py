"""Power-function averages against brute force, quadrature and a network trained for real."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpm import (
    DiffusionModel,
    ModelConfig,
    PowerEma,
    PowerProfile,
    ScheduleConfig,
    UNetConfig,
    build_network,
    combine_snapshots,
    fit_post_hoc_ema,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
)
from ddpm.training.post_hoc_ema import MAX_SIGMA_REL, gamma_from_sigma_rel, inner_products, sigma_rel_from_gamma

lengths = st.floats(0.005, MAX_SIGMA_REL)


def paper_gamma(sigma_rel: float) -> float:
    """The exponent from the paper's cubic, by the eigenvalues of its companion matrix."""
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def profile(tau: float, end: float, gamma: float) -> float:
    """The density at tau of a profile that ends at `end`."""
    return (gamma + 1) * (tau / end) ** gamma / end if tau <= end else 0.0


@given(sigma_rel=lengths)
def test_gamma_is_the_root_of_the_cubic_and_goes_back(sigma_rel: float) -> None:
    gamma = gamma_from_sigma_rel(sigma_rel)
    assert gamma == pytest.approx(paper_gamma(sigma_rel), rel=1e-9, abs=1e-9)
    assert sigma_rel_from_gamma(gamma) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_paper_s_two_exponents(sigma_rel: float, gamma: float) -> None:
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 6.94, 40.0])
def test_a_length_is_the_standard_deviation_of_its_profile(gamma: float) -> None:
    moments = [quad(lambda tau, k=k: tau**k * profile(tau, 1.0, gamma), 0, 1)[0] for k in (0, 1, 2)]
    assert moments[0] == pytest.approx(1)
    assert sigma_rel_from_gamma(gamma) == pytest.approx(math.sqrt(moments[2] - moments[1] ** 2), rel=1e-7)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, 1.0, math.nan])
def test_lengths_that_no_profile_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_rel: "):
        PowerProfile(num_images=1, sigma_rel=sigma_rel)


def test_the_longest_average_is_the_plain_mean() -> None:
    assert gamma_from_sigma_rel(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-12)
    ema = PowerEma(nn.Linear(1, 1).double(), MAX_SIGMA_REL)
    for value in (1.0, 5.0, 9.0):
        ema.update(constant(value), 7)
    assert float(ema.state_dict()["bias"]) == pytest.approx(5.0, rel=1e-12)


def constant(value: float) -> nn.Linear:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@given(
    sigma_rel=lengths,
    steps=st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 512)), min_size=1, max_size=12),
)
def test_an_average_is_the_integral_over_its_steps(sigma_rel: float, steps: list[tuple[float, int]]) -> None:
    """Whatever the batch sizes: each step's weights weigh as the profile's integral over its images."""
    ema, gamma = PowerEma(constant(100.0), sigma_rel), paper_gamma(sigma_rel)
    end = sum(num_images for _, num_images in steps)
    expected, seen = 0.0, 0
    for value, num_images in steps:
        ema.update(constant(value), num_images)
        share = ((seen + num_images) / end) ** (gamma + 1) - (seen / end) ** (gamma + 1)
        expected, seen = expected + share * value, seen + num_images
    assert float(ema.state_dict()["weight"]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert ema.num_images == end


def test_a_restart_needs_the_count() -> None:
    one, two, wrong = (PowerEma(constant(0.0), 0.1) for _ in range(3))
    for value in (1.0, 2.0, 3.0):
        one.update(constant(value), 64)
    two.load_state_dict(one.state_dict(), num_images=192)
    wrong.load_state_dict(one.state_dict(), num_images=256)
    for ema in (one, two, wrong):
        ema.update(constant(8.0), 64)
    assert torch.equal(one.state_dict()["bias"], two.state_dict()["bias"])
    assert not torch.allclose(one.state_dict()["bias"], wrong.state_dict()["bias"], rtol=1e-3)


@given(
    ends=st.tuples(st.integers(1, 10_000_000), st.integers(1, 10_000_000)),
    sigmas=st.tuples(st.floats(0.02, MAX_SIGMA_REL), st.floats(0.02, MAX_SIGMA_REL)),
)
def test_inner_products_are_integrals(ends: tuple[int, int], sigmas: tuple[float, float]) -> None:
    one, two = (PowerProfile(num_images=end, sigma_rel=s) for end, s in zip(ends, sigmas, strict=True))
    (a, b), (g, h) = ends, (paper_gamma(s) for s in sigmas)
    unit = max(ends)
    # tau = min(a, b) u: the product is smooth in u on [0, 1]
    low = min(a, b)
    expected, _ = quad(
        lambda u: profile(low * u, a, g) * profile(low * u, b, h) * low * unit, 0, 1, epsabs=0, epsrel=1e-10
    )
    got = float(inner_products([one], [two], unit_images=float(unit)))
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-250)
    assert float(inner_products([two], [one], unit_images=float(unit))) == pytest.approx(got, rel=1e-12)


def snapshots(num: int, *, sigma_rels: tuple[float, ...] = (0.05, 0.10), every: int = 100) -> list[PowerProfile]:
    return [PowerProfile(num_images=k * every, sigma_rel=s) for k in range(1, num + 1) for s in sigma_rels]


def test_a_tracked_average_is_its_last_snapshot() -> None:
    fit = fit_post_hoc_ema(snapshots(32), PowerProfile(num_images=3200, sigma_rel=0.10))
    assert fit.weights[-1] == pytest.approx(1, abs=1e-8)
    assert max(abs(weight) for weight in fit.weights[:-1]) < 1e-8
    assert fit.residual < 1e-6


@given(num=st.integers(1, 40), sigma_rel=st.floats(0.03, 0.25), every=st.integers(1, 10**9))
def test_the_fit_is_the_best_with_sum_one(num: int, sigma_rel: float, every: int) -> None:
    target = PowerProfile(num_images=num * every, sigma_rel=sigma_rel)
    at_hand = snapshots(num, every=every)
    fit = fit_post_hoc_ema(at_hand, target)
    assert sum(fit.weights) == pytest.approx(1, abs=1e-12)
    gammas = [paper_gamma(snapshot.sigma_rel) for snapshot in at_hand]
    u = np.linspace(0, 1, 20_001)[1:]  # midpoints would do as well: this checks, it does not fit

    def distance(weights: np.ndarray) -> float:
        combined = np.zeros_like(u)
        for weight, snapshot, gamma in zip(weights, at_hand, gammas, strict=True):
            end = snapshot.num_images / target.num_images
            combined += weight * np.where(u <= end, (gamma + 1) * (u / end) ** gamma / end, 0)
        wanted = (paper_gamma(sigma_rel) + 1) * u ** paper_gamma(sigma_rel)
        return float(np.sqrt(((combined - wanted) ** 2).mean() / (wanted**2).mean()))

    best = distance(np.array(fit.weights))
    assert best == pytest.approx(fit.residual, rel=0.05, abs=2e-3)
    rng = np.random.default_rng(num)
    for _ in range(3):  # no neighbour with the same sum is better
        direction = rng.standard_normal(len(fit.weights))
        assert distance(np.array(fit.weights) + 0.1 * (direction - direction.mean())) >= best * (1 - 1e-3)


def test_what_cannot_be_fitted_is_refused() -> None:
    target = PowerProfile(num_images=100, sigma_rel=0.1)
    for wrong in ([], snapshots(1) * 2, snapshots(2)):
        with pytest.raises(ValueError, match=r"^snapshots: "):
            fit_post_hoc_ema(wrong, target)
    with pytest.raises(ValueError, match=r"^num_images: "):
        PowerProfile(num_images=0, sigma_rel=0.1)


def test_combining_sums_weights_and_takes_the_newest_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    states = []
    for k in range(3):
        state = {name: torch.full_like(tensor, k + 1) for name, tensor in model.state_dict().items()}
        states.append({name: t.half() if t.is_floating_point() else t for name, t in state.items()})
    combined = combine_snapshots(model, iter(states), (2.0, -3.0, 2.0))
    assert list(combined) == list(model.state_dict())
    torch.testing.assert_close(combined["0.weight"], torch.full((2, 2), 2.0))
    torch.testing.assert_close(combined["1.running_mean"], torch.full((2,), 3.0))
    assert combined["1.num_batches_tracked"] == 3 and combined["1.num_batches_tracked"].dtype == torch.int64
    for weights in ((1.0,), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"^states: "):
            combine_snapshots(model, iter(states), weights)
    with pytest.raises(ValueError, match=r"^state: "):
        combine_snapshots(nn.Linear(2, 2), iter(states), (1.0, 1.0, 1.0))


def train_for_real(num_steps: int, batch: int) -> Iterator[nn.Module]:
    """A small U-Net on scikit-learn's digits; yields it after every step."""
    unet = UNetConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4
    )
    config = ModelConfig(network=unet, schedule=ScheduleConfig(name="cosine"), image_size=(8, 8), channels=1)
    network = build_network(config, seed=0)
    model = DiffusionModel.of(config, network)
    images = torch.from_numpy(np.round(load_digits().images * 255 / 16).astype(np.uint8))[..., None]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(num_steps):
        ids = torch.arange(step * batch, (step + 1) * batch)
        noised = make_training_batch(
            model,
            images_to_x_0(images[ids % len(images)]),
            None,
            seed=0,
            sample_ids=ids,
            epochs=torch.zeros_like(ids),
            flip=False,
            label_drop=0.0,
        )
        optimizer.zero_grad()
        per_sample_loss(model, noised).mean().backward()
        optimizer.step()
        yield network


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in state.values()])


def test_a_length_that_was_not_tracked() -> None:
    """sigma_rel 0.075 from 32 snapshots of 0.05 and 0.10 after 320 steps of real training.

    Against the average that was computed directly: by this class, and from its definition in float64.
    """
    every, batch, wanted = 10, 16, 0.075
    tracked: dict[float, PowerEma] = {}
    taken: list[tuple[PowerProfile, dict[str, Tensor]]] = []
    by_hand, gamma, network = None, paper_gamma(wanted), None
    for step, network in enumerate(train_for_real(320, batch), start=1):
        if not tracked:
            tracked = {s: PowerEma(network, s) for s in (0.05, 0.10, wanted)}
            by_hand = torch.zeros_like(flat(network.state_dict()))
        for ema in tracked.values():
            ema.update(network, batch)
        assert by_hand is not None
        by_hand += (step ** (gamma + 1) - (step - 1) ** (gamma + 1)) * flat(network.state_dict())
        if step % every == 0:
            for s in (0.05, 0.10):
                state = {name: tensor.clone() for name, tensor in tracked[s].state_dict().items()}
                taken.append((PowerProfile(num_images=step * batch, sigma_rel=s), state))
    assert network is not None and by_hand is not None and len(taken) == 64
    by_hand /= 320 ** (gamma + 1)
    fit = fit_post_hoc_ema([p for p, _ in taken], PowerProfile(num_images=320 * batch, sigma_rel=wanted))
    direct, last = flat(tracked[wanted].state_dict()), flat(network.state_dict())
    distance = float((direct - last).norm())

    def error(dtype: torch.dtype, truth: Tensor) -> float:
        stored = ({name: tensor.to(dtype) for name, tensor in state.items()} for _, state in taken)
        return float((flat(combine_snapshots(network, stored, fit.weights)) - truth).norm()) / distance

    errors = [error(torch.float32, truth) for truth in (direct, by_hand)]
    half = error(torch.float16, by_hand)
    nearest = min(float((flat(tracked[s].state_dict()) - direct).norm()) / distance for s in (0.05, 0.10))
    print(
        f"sigma_rel {wanted} from 32 snapshots, error as a share of |theta_ema - theta_last|: {errors[0]:.1e}, "
        f"from the definition {errors[1]:.1e}; snapshots in float16 {half:.1e}; nearest tracked average {nearest:.1e}; "
        f"residual of the profile {fit.residual:.1e}"
    )
    assert max(errors) <= 1e-3 and 1e-3 < half < 0.1 < nearest
