"""RePaint: known pixels stay, the walk is the documented one, on a Gaussian completions tend to the exact law."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import (
    DDIM,
    SAMPLERS,
    Ancestral,
    Denoiser,
    DiffusionModel,
    Heun,
    Network,
    NetworkDenoiser,
    NoiseSchedule,
    Sampler,
    ScheduleConfig,
    SingleStepSampler,
    Spacing,
    Stream,
    Variance,
    ddim_step,
    make_schedule,
    repaint,
    spaced_timesteps,
    standard_normal,
)
from ddpm.editing.repaint import num_repaint_evaluations, repaint_sample, resampling_path

SCHEDULE = make_schedule(ScheduleConfig())
TWELVE_STEPS = DDIM(num_steps=12)
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
COVARIANCE = 0.25 * torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)


def correlated(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Exact for images of two pixels from N(MEAN, COVARIANCE); all of a batch are at one t."""
    alpha_bar = SCHEDULE.alpha_bar_at(t)[0]
    precision = torch.linalg.inv(alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64))
    distance = x_t.flatten(1) - alpha_bar.sqrt() * MEAN
    return ((1 - alpha_bar).sqrt() * distance @ precision).reshape(x_t.shape)


def completion_moments(given: float, num_resamples: int, spacing: Spacing, variance: Variance) -> tuple[float, float]:
    """Mean and variance of the second pixel's completion when the first is known, without Monte Carlo.

    RePaint is affine in all of its noise here. Its coefficients are read off by running it on a batch: nothing, then
    each number of x_T, of each move's noise and of the known pixels' noise = 1 in turn.
    """
    num_draws = len(resampling_path(50, 4, num_resamples)) - 1
    x_T = torch.zeros(3 + 4 * num_draws, 1, 1, 2, dtype=torch.float64)
    x_T[1, 0, 0, 0] = x_T[2, 0, 0, 1] = 1

    def noise(first_row: int) -> Any:
        def of_draw(draw: int) -> Tensor:
            z, row = torch.zeros_like(x_T), first_row + 2 * (draw - 1)
            z[row, 0, 0, 0] = z[row + 1, 0, 0, 1] = 1
            return z

        return of_draw

    made = repaint_sample(
        NetworkDenoiser(network=correlated, schedule=SCHEDULE, clip_x_0=False),
        SCHEDULE,
        x_T,
        None,
        sampler=Ancestral(variance=variance),
        x_0=torch.full_like(x_T, given),
        known=torch.tensor([True, False]).reshape(1, 1, 1, 2),
        timesteps=spaced_timesteps(SCHEDULE, 50, spacing),
        noise=noise(3),
        known_noise=noise(3 + 2 * num_draws),
        jump_length=4,
        num_resamples=num_resamples,
    )
    assert bool((made[..., 0] == given).all())
    unknown = made[:, 0, 0, 1]
    return float(unknown[0]), float((unknown[1:] - unknown[0]).square().sum())


@pytest.mark.parametrize(
    ("spacing", "choice", "limits", "ratio"),
    [
        ("quadratic", "fixed_large", (0.42, 0.12, 0.035), 1.04),
        ("quadratic", "fixed_small", (0.42, 0.12, 0.035), 0.81),
        ("linspace", "fixed_small", (0.43, 0.17, 0.145), 0.83),
    ],
)
def test_completions_of_a_gaussian_tend_to_its_exact_conditional(
    spacing: Spacing, choice: Variance, limits: tuple[float, ...], ratio: float
) -> None:
    """Of the way from the mean without to that with the known pixel, the share that is missing; no chance in it.

    It falls from 2/5 to 1/30 where many steps have little noise, to 1/7 with the sampler's defaults. What stays is the
    error of 50 steps, and of jumps that end at the least noisy step instead of without noise: with equal steps in t,
    known and new pixels hardly meet there.
    """
    mean = -0.2 + 0.8 * (0.9 - 0.3)
    variance = 0.25 * (1 - 0.8**2)
    errors = []
    for num_resamples in (1, 5, 20):
        got_mean, got_variance = completion_moments(0.9, num_resamples, spacing, choice)
        errors.append(abs(got_mean - mean) / (mean + 0.2))
    print(f"\nRePaint on a Gaussian: mean {got_mean:.4f} of {mean:.4f}, variance {got_variance:.4f} of {variance:.4f}")
    print("share of the way to the exact mean that is missing, 1, 5, 20 walks:", *(f"{e:.3f}" for e in errors))
    assert errors[0] > 0.3 and errors[0] > 2 * errors[1] and errors[1] > errors[2]
    assert all(error < limit for error, limit in zip(errors, limits, strict=True))
    assert got_variance / variance == pytest.approx(ratio, abs=0.02)


def uncorrelated(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A network without sums: rounding cannot depend on the batch. Labels shift it."""
    shift = t / 1000 if label is None else t / 1000 + label
    return torch.tanh(x_t * 0.7 + shift.to(x_t)[:, None, None, None])


def model_of(network: Network) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=SCHEDULE, image_shape=(2, 5, 6))


def completed(rows: list[int], sampler: Sampler = TWELVE_STEPS, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Images, inputs and mask of some of seven ids."""
    ids = torch.tensor([4711, 0, 2**40 + 3, 12, 13, 14, 2**32])
    x_0 = torch.rand(7, 2, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.zeros(5, 6, dtype=torch.bool)
    known[:2] = True
    values: dict[str, Any] = {"jump_length": 3, "num_resamples": 3, "seed": 7, **changes}
    made = repaint(
        model_of(uncorrelated), sampler, x_0[rows], known[None, None], (ids % 4)[rows], sample_ids=ids[rows], **values
    )
    return made, x_0[rows], known


@pytest.mark.parametrize("sampler", [Ancestral(num_steps=12), DDIM(num_steps=12, eta=0.3)], ids=lambda s: s.name)
def test_known_pixels_are_exact_and_images_do_not_depend_on_their_batch(sampler: Sampler) -> None:
    made, x_0, known = completed([0, 1, 2, 3, 4, 5, 6], sampler=sampler)
    assert torch.equal(made[:, :, known], x_0[:, :, known])
    assert not bool((made[:, :, ~known] == x_0[:, :, ~known]).any())
    assert float(made.abs().max()) <= 1
    for rows in ([6, 5, 4, 3, 2, 1, 0], [2], [5, 0, 3]):
        assert torch.equal(completed(rows, sampler=sampler)[0], made[rows])
    for a, b in itertools.combinations(made, 2):
        assert not torch.equal(a, b)
    assert not torch.equal(completed([0], sampler=sampler, seed=8)[0], made[:1])
    assert not torch.equal(completed([0], sampler=sampler, num_resamples=2)[0], made[:1])


def test_what_is_hidden_has_no_effect() -> None:
    ids, known = torch.arange(2), torch.tensor([True, True, False]).expand(3, 3)[None, None]
    x_0 = torch.linspace(-1, 1, 18).reshape(2, 1, 3, 3)

    def fill(given: Tensor) -> Tensor:
        return repaint(
            model_of(uncorrelated), DDIM(num_steps=9), given, known, None,
            jump_length=2, num_resamples=2, seed=0, sample_ids=ids,
        )  # fmt: skip

    assert torch.equal(fill(x_0), fill(torch.where(known, x_0, 77.0)))


@pytest.mark.parametrize("kind", [Ancestral, DDIM])
def test_nothing_known_and_no_jumps_is_the_plain_sampler_with_the_documented_draws(kind: Any) -> None:
    ids, shape = torch.arange(3), (1, 4, 4)
    denoise = NetworkDenoiser(network=uncorrelated, schedule=SCHEDULE)
    x_T = standard_normal(3, Stream.X_T, ids, 0, shape)
    timesteps = spaced_timesteps(SCHEDULE, 10, "linspace")

    def noise(draw: int) -> Tensor:
        return standard_normal(3, Stream.STEP, ids, draw, shape)

    plain = kind().sample(denoise, SCHEDULE, x_T, None, timesteps=timesteps, noise=noise)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    made = repaint(
        model_of(uncorrelated), kind(num_steps=10), torch.zeros(3, 1, 4, 4), nothing, None,
        jump_length=10, num_resamples=1, seed=3, sample_ids=ids,
    )  # fmt: skip
    assert torch.equal(made, plain.clamp(-1, 1))


def test_the_known_part_is_noised_to_each_level_with_its_own_stream() -> None:
    """Everything known: what the network is shown is q_sample of the given images, anew at each move."""
    ids, shape, seen = torch.arange(2), (1, 2, 2), list[Tensor]()

    def watching(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        seen.append(x_t)
        return uncorrelated(x_t, t, label)

    x_0 = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
    made = repaint(
        model_of(watching), DDIM(num_steps=5), x_0,
        torch.ones(1, 1, 2, 2, dtype=torch.bool), None, jump_length=2, num_resamples=2, seed=3, sample_ids=ids,
    )  # fmt: skip
    assert torch.equal(made, x_0)
    path = resampling_path(5, 2, 2)
    assert path == [5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    chain = SCHEDULE.respace(spaced_timesteps(SCHEDULE, 5, "linspace"))
    for draw, (level, next_level) in enumerate(itertools.pairwise(path), start=1):
        if level == 5 or next_level > level:
            continue
        alpha_bar = float(chain.alpha_bar[level - 1])
        before = path[draw - 2]
        if before > level:  # what this move starts from was given after the move before it
            z = standard_normal(3, Stream.INPAINT, ids, draw - 1, shape)
            expected = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * z
        else:
            now, then = alpha_bar, float(chain.alpha_bar[before - 1])
            z = standard_normal(3, Stream.INPAINT, ids, draw - 2, shape)
            low = math.sqrt(then) * x_0 + math.sqrt(1 - then) * z
            back = standard_normal(3, Stream.STEP, ids, draw - 1, shape)
            expected = math.sqrt(now / then) * low + math.sqrt(1 - now / then) * back
        num_calls = sum(there < here for here, there in itertools.pairwise(path[:draw]))
        torch.testing.assert_close(seen[num_calls], expected)


@given(num_steps=st.integers(1, 60), jump_length=st.integers(1, 20), num_resamples=st.integers(1, 6))
def test_the_path_walks_each_stretch_as_often_as_asked(num_steps: int, jump_length: int, num_resamples: int) -> None:
    path = resampling_path(num_steps, jump_length, num_resamples)
    moves = [there - here for here, there in itertools.pairwise(path)]
    assert path[0] == num_steps and path[-1] == 0 and 0 not in path[:-1]
    assert set(moves) <= {-1, jump_length}
    num_stretches = (num_steps - 1) // jump_length
    assert moves.count(jump_length) == num_stretches * (num_resamples - 1)
    assert num_repaint_evaluations(num_steps, jump_length, num_resamples) == moves.count(-1)
    jumped_from = [here for here, there in itertools.pairwise(path) if there > here]
    assert all((level - 1) % jump_length == 0 for level in jumped_from)
    for level in range(1, num_steps - jump_length + 1, jump_length):
        assert jumped_from.count(level) == num_resamples - 1


def test_evaluations_are_counted() -> None:
    calls = list[int]()

    def counting(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        calls.append(len(x_t))
        return x_t

    repaint(
        model_of(counting), DDIM(num_steps=30),
        torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool), None,
        jump_length=7, num_resamples=4, seed=0, sample_ids=torch.arange(1),
    )  # fmt: skip
    assert len(calls) == num_repaint_evaluations(30, 7, 4) == 30 + 4 * 7 * 3


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("jump_length", {"jump_length": 0}),
        ("num_resamples", {"num_resamples": 0}),
        ("name", {"sampler": Heun(num_steps=12)}),
    ],
)
def test_impossible_requests_are_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .*got"):
        completed([0], **changes)


def test_any_sampler_of_single_steps_can_walk() -> None:
    """One that nobody registered too; the others are refused by name."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Quiet(SingleStepSampler):
        name: str = "quiet"

        @property
        def is_deterministic(self) -> bool:
            return True

        def step(
            self, chain: NoiseSchedule, denoise: Denoiser, x_t: Tensor, t: Tensor, label: Tensor | None, *,
            eps: Tensor, x_0_error: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            return ddim_step(chain, denoise, x_t, t, label, eta=0.0, eps=eps)

    ours, ddim = (completed([0, 1], sampler)[0] for sampler in (Quiet(num_steps=12), DDIM(num_steps=12, eta=0.0)))
    assert torch.equal(ours, ddim)
    for kind in set(SAMPLERS.values()) - {Ancestral, DDIM}:
        with pytest.raises(ValueError, match=rf"^name: inpainting walks with ancestral or ddim, got {kind().name}; "):  # type: ignore[call-arg]
            completed([0], kind())  # type: ignore[call-arg]
