"""Partial diffusion: strength from nothing to everything, the documented draws, and the exact law on a Gaussian."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    DiffusionModel,
    DPMSolver2M,
    DPMSolver2MSDE,
    Heun,
    Network,
    NetworkDenoiser,
    Sampler,
    ScheduleConfig,
    Stream,
    generate,
    make_schedule,
    partial_diffusion,
    repaint,
    spaced_timesteps,
    standard_normal,
)
from ddpm.editing.partial import num_partial_steps
from tests.ddpm.oracles import GAUSSIAN

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
IDS = torch.tensor([4711, 0, 2**40 + 3, 12])
CHOSEN = [
    Ancestral(num_steps=10),
    DDIM(num_steps=10),
    DPMSolver2M(num_steps=10, spacing="log_snr"),
    DPMSolver2MSDE(num_steps=10),
    Heun(num_steps=10, spacing="karras", churn=5.0),
]


def elementwise(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network without sums: rounding cannot depend on the batch."""
    return torch.tanh(x_t * 0.7 + (t / 1000).to(x_t)[:, None, None, None])


def model_of(network: Network) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=SCHEDULE, image_shape=(1, 5, 6))


def edited(sampler: Sampler, strength: float, rows: list[int], **changes: Any) -> tuple[Tensor, Tensor]:
    x_0 = torch.rand(4, 1, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = partial_diffusion(
        model_of(changes.pop("network", elementwise)),
        sampler,
        x_0[rows],
        None,
        strength=strength,
        seed=changes.pop("seed", 5),
        sample_ids=IDS[rows],
    )
    return made, x_0[rows]


@pytest.mark.parametrize("sampler", CHOSEN, ids=lambda s: s.name)
def test_strength_0_returns_the_image_and_1_is_generate(sampler: Sampler) -> None:
    untouched, x_0 = edited(sampler, 0.0, [0, 1, 2, 3])
    assert torch.equal(untouched, x_0)
    replaced, _ = edited(sampler, 1.0, [0, 1, 2, 3])
    plain = generate(model_of(elementwise), sampler, seed=5, sample_ids=IDS, label=None)
    assert torch.equal(replaced, plain)
    between, _ = edited(sampler, 0.5, [0, 1, 2, 3])
    assert not torch.equal(between, x_0) and not torch.equal(between, plain)


@pytest.mark.parametrize("sampler", CHOSEN, ids=lambda s: s.name)
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    batch, _ = edited(sampler, 0.4, [0, 1, 2, 3])
    for rows in ([3, 2, 1, 0], [2], [1, 3]):
        assert torch.equal(edited(sampler, 0.4, rows)[0], batch[rows])
    for a, b in itertools.combinations(batch, 2):
        assert not torch.equal(a, b)
    assert not torch.equal(edited(sampler, 0.4, [0], seed=6)[0], batch[:1])


def test_the_more_strength_the_less_is_left() -> None:
    network = GAUSSIAN.network(SCHEDULE)
    distances = []
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9):
        made, x_0 = edited(DDIM(num_steps=50), strength, [0, 1, 2, 3], network=network)
        distances.append(float((made - x_0).square().mean()))
    assert distances == sorted(distances)


def test_the_draws_are_the_documented_ones() -> None:
    """Four of ten steps: x_t is q_sample at the fourth with x_T's noise; the steps count their draws from 1."""
    made, x_0 = edited(DDIM(num_steps=10), 0.4, [0, 1, 2, 3])
    timesteps = spaced_timesteps(SCHEDULE, 10, "linspace")[:4]
    alpha_bar = float(SCHEDULE.alpha_bar[timesteps[-1]])
    eps = standard_normal(5, Stream.X_T, IDS, 0, (1, 5, 6))
    expected = DDIM(eta=1.0).sample(
        NetworkDenoiser(network=elementwise, schedule=SCHEDULE),
        SCHEDULE,
        alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps,
        None,
        timesteps=timesteps,
        noise=lambda draw: standard_normal(5, Stream.STEP, IDS, draw, (1, 5, 6)),
    )
    torch.testing.assert_close(made, expected.clamp(-1, 1))


@pytest.mark.parametrize("sampler", CHOSEN, ids=lambda s: s.name)
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.4, 1.0])
def test_evaluations_are_counted(sampler: Sampler, strength: float) -> None:
    calls = list[int]()

    def counting(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append(len(x_t))
        return elementwise(x_t, t, label)

    edited(sampler, strength, [0], network=counting)
    assert len(calls) == sampler.num_evaluations(SCHEDULE, num_partial_steps(10, strength))


def test_steps_of_a_strength() -> None:
    assert [num_partial_steps(100, s) for s in (0.0, 0.001, 0.07, 0.071, 0.5, 1.0)] == [0, 1, 7, 8, 50, 100]
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^strength: .*got"):
            num_partial_steps(10, strength)


def test_the_analytic_variance_reaches_the_edits() -> None:
    """At full strength, and with nothing known, the same as generate's; both chains are respaced."""
    sampler = Ancestral(num_steps=10, variance="analytic")
    error = 0.4 * (1 - SCHEDULE.alpha_bar)
    common: dict[str, Any] = {"seed": 5, "sample_ids": IDS, "x_0_error": error}
    model, x_0 = model_of(elementwise), torch.zeros(4, 1, 5, 6)
    plain = generate(model, sampler, label=None, **common)
    nothing = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    replaced = partial_diffusion(model, sampler, x_0, None, strength=1.0, **common)
    painted = repaint(model, sampler, x_0, nothing, None, jump_length=1, num_resamples=1, **common)
    assert torch.equal(replaced, plain) and torch.equal(painted, plain)
    common["x_0_error"] = 0.5 * error
    assert not torch.equal(partial_diffusion(model, sampler, x_0, None, strength=1.0, **common), plain)
