"""Classifier-free guidance: closed forms on Gaussians, one call per step, the interval, the rescaling."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm import (
    SAMPLERS,
    DiffusionModel,
    DPMSolver2M,
    GuidedNetwork,
    Network,
    NetworkDenoiser,
    PredictionType,
    ScheduleConfig,
    generate,
    make_schedule,
    predict_x_0_and_eps,
    spaced_timesteps,
)
from tests.ddpm.oracles import Mixture

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
NULL = 2
T = torch.tensor([0, 1, 500, 999])


def conditional_network(means: list[float], variances: list[float], kind: PredictionType = "eps") -> Network:
    """Exact for data that is N(means[label], variances[label])."""
    networks = [
        Mixture(weights=(1.0,), means=(m,), variances=(v,)).network(SCHEDULE, kind)
        for m, v in zip(means, variances, strict=True)
    ]

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        answers = torch.stack([network(x_t, t, None) for network in networks])
        return answers[label, torch.arange(len(x_t))]

    return network


def guided(network: Network, scale: float, **options: object) -> GuidedNetwork:
    return GuidedNetwork(network=network, schedule=SCHEDULE, null_label=NULL, scale=scale, **options)  # type: ignore[arg-type]


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["eps", "x_0", "v"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_moves_the_mean_of_equally_wide_gaussians(scale: float, kind: PredictionType) -> None:
    """N(0.5, s^2) against N(-0.1, s^2): at every t the guided prediction is exact for N(-0.1 + 0.6 scale, s^2)."""
    network = guided(conditional_network([9.0, 0.5, -0.1], [0.04] * 3, kind), scale)
    moved = Mixture(weights=(1.0,), means=(-0.1 + 0.6 * scale,), variances=(0.04,))
    x_t, label = images(0, 4, 2, 3, 3), torch.ones(4, dtype=torch.int64)
    expected = moved.network(SCHEDULE, kind)(x_t, T, None)
    torch.testing.assert_close(network(x_t, T, label), expected, rtol=0, atol=1e-9)


def test_guidance_multiplies_densities() -> None:
    """Score of p(x_t | y)^s p(x_t)^(1 - s): for Gaussians a Gaussian, whose precision is the weighted sum of theirs."""
    scale, alpha_bar = 1.5, SCHEDULE.alpha_bar[T]
    network = guided(conditional_network([0.0, 0.5, -0.1], [0.1, 0.04, 0.25]), scale)
    x_t = images(1, 4, 1, 2, 2)
    precisions, centres = [], []
    for mean, variance, weight in ((0.5, 0.04, scale), (-0.1, 0.25, 1 - scale)):
        precision = weight / (alpha_bar * variance + 1 - alpha_bar)
        precisions.append(precision)
        centres.append(precision * alpha_bar.sqrt() * mean)
    score = sum(centres)[:, None, None, None] - sum(precisions)[:, None, None, None] * x_t  # type: ignore[index]
    expected = -(1 - alpha_bar).sqrt()[:, None, None, None] * score
    torch.testing.assert_close(network(x_t, T, torch.ones(4, dtype=torch.int64)), expected, rtol=0, atol=1e-10)


def test_a_guided_sampler_makes_the_moved_gaussian() -> None:
    network = guided(conditional_network([9.0, 0.3, -0.1], [0.04] * 3), 2.0)
    moved = Mixture(weights=(1.0,), means=(0.7,), variances=(0.04,))
    x_T, label = images(2, 3, 1, 4, 4), torch.ones(3, dtype=torch.int64)
    got, expected = (
        DPMSolver2M().sample(
            NetworkDenoiser(network=net, schedule=SCHEDULE, clip_x_0=False),
            SCHEDULE,
            x_T,
            label,
            timesteps=spaced_timesteps(SCHEDULE, 20, "linspace"),
        )
        for net in (network, moved.network(SCHEDULE))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


class Counting:
    """Counts calls and remembers the batches; labels shift the answer."""

    def __init__(self, channels: int = 1) -> None:
        self.channels, self.batches, self.labels = channels, list[int](), list[list[int]]()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None and len(x_t) == len(t) == len(label)
        self.batches.append(len(x_t))
        self.labels.append(label.tolist())
        answer = torch.tanh(0.7 * x_t + (t / 1000 + label)[:, None, None, None].to(x_t))
        return torch.cat([answer * (1 + 0.1 * k) for k in range(self.channels)], dim=1)


def sample(network: Network, name: str = "ddim", **options: object) -> Tensor:
    ids = torch.arange(3)
    model = DiffusionModel(network=network, schedule=SCHEDULE, image_shape=(1, 4, 4), null_label=NULL)
    sampler = SAMPLERS[name](num_steps=8, **options)  # type: ignore[arg-type]
    return generate(model, sampler, seed=4, sample_ids=ids, label=ids % 2)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm_solver_2m", "dpm_solver_2m_sde", "heun"])
def test_scale_1_is_bit_equal_to_no_guidance(name: str) -> None:
    network = Counting()
    off = sample(network, name=name, spacing="karras")
    ones = torch.arange(3) % 2
    again = generate(
        DiffusionModel(network=guided(network, 1.0), schedule=SCHEDULE, image_shape=(1, 4, 4)),
        SAMPLERS[name](num_steps=8, spacing="karras"),  # type: ignore[call-arg]
        seed=4,
        sample_ids=torch.arange(3),
        label=ones,
    )
    assert torch.equal(off, again)
    assert set(network.batches) == {3}
    assert not torch.equal(off, sample(network, name=name, spacing="karras", guidance_scale=1.5))


def test_one_call_per_step_with_both_labels() -> None:
    network = Counting()
    sample(network, name="dpm_solver_2m", guidance_scale=3.0)
    assert network.batches == [6] * 8
    assert network.labels == [[0, 1, 0, NULL, NULL, NULL]] * 8


def test_guided_only_within_the_interval() -> None:
    """Above its low end and up to its high end; outside, one conditional call, bit-equal to no guidance."""
    t = torch.tensor([100, 300, 301, 600, 601])
    sigma = SCHEDULE.sigma(t)
    interval = (float(sigma[1]), float(sigma[3]))
    network, x_t, label = Counting(), images(3, 5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    got = guided(network, 3.0, interval=interval)(x_t, t, label)
    everywhere, nowhere = guided(network, 3.0)(x_t, t, label), network(x_t, t, label)
    inside = torch.tensor([False, False, True, True, False])
    assert torch.equal(got[inside], everywhere[inside]) and torch.equal(got[~inside], nowhere[~inside])
    assert not bool((everywhere == nowhere).all(dim=(1, 2, 3)).any())
    network.batches.clear()
    guided(network, 3.0, interval=(1e6, 1e7))(x_t, t, label)
    assert network.batches == [5]
    network.batches.clear()
    sample(network, guidance_scale=3.0, guidance_interval=(0.2, 2.0))
    steps = torch.tensor(spaced_timesteps(SCHEDULE, 8, "linspace")).flip(0)
    expected = [6 if 0.2 < float(s) <= 2.0 else 3 for s in SCHEDULE.sigma(steps)]
    assert network.batches == expected and len(set(expected)) == 2


def test_no_signal_at_all_is_guided() -> None:
    """Sigma is infinite there: no interval is one that ends at infinity, not at a large number."""
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    x_t, label, t = images(5, 1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), torch.tensor([999])
    for interval, batch in ((None, 2), ((0.0, math.inf), 2), ((0.0, 1e9), 1)):
        network = Counting()
        GuidedNetwork(network=network, schedule=schedule, null_label=NULL, scale=2.0, interval=interval)(x_t, t, label)
        assert network.batches == [batch]


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_lin_et_al_s(rescale: float) -> None:
    """Section 3.4, image by image: x_cfg (rescale std(x_pos) / std(x_cfg) + 1 - rescale)."""
    network, x_t, label = Counting(), images(4, 4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
    got = guided(network, 5.0, rescale=rescale)(x_t, T, label)
    conditional, plain = network(x_t, T, label), guided(network, 5.0)(x_t, T, label)
    for i in range(4):
        factor = statistics.stdev(conditional[i].flatten().tolist()) / statistics.stdev(plain[i].flatten().tolist())
        torch.testing.assert_close(got[i], plain[i] * (rescale * factor + 1 - rescale), rtol=1e-12, atol=0)
    assert bool((got.std(dim=(1, 2, 3)) < plain.std(dim=(1, 2, 3))).any())


def test_only_rescaling_depends_on_what_is_predicted() -> None:
    """One network as eps, x_0 and v: the same x_0_hat without; with it, each keeps a deviation of its own."""
    x_t, t, label = images(5, 3, 1, 4, 4), torch.tensor([300, 500, 700]), torch.ones(3, dtype=torch.int64)

    def x_0_hat(kind: PredictionType, rescale: float) -> Tensor:
        network = guided(conditional_network([9.0, 0.5, -0.1], [0.1, 0.04, 0.25], kind), 3.0, rescale=rescale)
        return predict_x_0_and_eps(SCHEDULE, x_t, t, network(x_t, t, label), kind)[0]

    for kind in ("x_0", "v"):
        torch.testing.assert_close(x_0_hat(kind, 0.0), x_0_hat("eps", 0.0), rtol=0, atol=1e-10)
        assert float((x_0_hat(kind, 0.7) - x_0_hat("eps", 0.7)).abs().amax(dim=(1, 2, 3)).min()) > 0.01


def test_rescaling_a_constant_prediction_leaves_it() -> None:
    def zeros(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return torch.zeros_like(x_t)

    got = guided(zeros, 5.0, rescale=0.7)(images(4, 4, 1, 6, 6), T, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(got, torch.zeros_like(got))


def test_a_learned_variance_is_the_conditional_one() -> None:
    network, x_t, label = Counting(channels=2), images(6, 4, 1, 3, 3), torch.tensor([0, 1, 0, 1])
    got, conditional = guided(network, 4.0)(x_t, T, label), network(x_t, T, label)
    assert got.shape == (4, 2, 3, 3)
    assert torch.equal(got[:, 1:], conditional[:, 1:])
    torch.testing.assert_close(got[:, :1], guided(Counting(), 4.0)(x_t, T, label))


def test_low_precision_answers_are_combined_in_the_precision_of_x_t() -> None:
    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return Counting()(x_t, t, label).to(torch.bfloat16)

    assert guided(network, 2.0)(images(7, 4, 1, 2, 2), T, torch.zeros(4, dtype=torch.int64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("label", lambda: guided(Counting(), 2.0)(images(0, 4, 1, 2, 2), T, None)),
        ("guidance_scale", lambda: guided(Counting(), -1.0)),
        ("guidance_scale", lambda: guided(Counting(), math.inf)),
        ("guidance_interval", lambda: guided(Counting(), 2.0, interval=(2.0, 1.0))),
        ("guidance_interval", lambda: guided(Counting(), 2.0, interval=(-1.0, 1.0))),
        ("guidance_rescale", lambda: guided(Counting(), 2.0, rescale=1.5)),
    ],
)
def test_impossible_guidance_is_refused(field: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*got"):
        call()
