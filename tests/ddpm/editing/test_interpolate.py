"""Interpolation: slerp keeps the statistics of noise, ends are the inputs, and the error of the round trip falls."""

import itertools
import math
from functools import partial
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
    ScheduleConfig,
    Stream,
    interpolate_images,
    invert_images,
    make_schedule,
    slerp,
    standard_normal,
)
from ddpm.editing.interpolate import num_interpolation_evaluations
from tests.ddpm.oracles import SKEWED

SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))
DETERMINISTIC_DDIM = partial(DDIM, eta=0.0)


def noises(stream: Stream, num_images: int = 8) -> Tensor:
    return standard_normal(1, stream, torch.arange(num_images), 0, (3, 16, 16))


def test_slerp_keeps_the_norm_of_noise_where_a_straight_line_does_not() -> None:
    """|z|^2 / D of D = 768 normals has the standard deviation sqrt(2/768) = 0.051: beyond 6 of them never."""
    a, b = noises(Stream.X_T), noises(Stream.STEP)
    for weight in (0.0, 0.2, 0.5, 0.9, 1.0):
        squares = slerp(a, b, torch.full((8,), weight)).square().mean(dim=(1, 2, 3))
        assert float((squares - 1).abs().max()) < 6 * math.sqrt(2 / 768)
    assert float(torch.lerp(a, b, 0.5).square().mean(dim=(1, 2, 3)).max()) < 0.6


def test_slerp_is_the_arc_between_vectors() -> None:
    """At right angles: cos and sin. Its ends are exact, and parallel vectors are joined by a line."""
    a, b = torch.zeros(5, 1, 1, 2), torch.zeros(5, 1, 1, 2)
    a[..., 0], b[..., 1] = 3.0, 3.0
    weight = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    got = slerp(a, b, weight)
    expected = 3 * torch.stack(((weight * math.pi / 2).cos(), (weight * math.pi / 2).sin()), dim=1)
    torch.testing.assert_close(got[:, 0, 0, :], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(a, 2 * a, weight), a * (1 + weight)[:, None, None, None])
    assert torch.equal(slerp(a * 0, b * 0, weight), a * 0)
    noise, other = noises(Stream.X_T), noises(Stream.STEP)
    torch.testing.assert_close(slerp(noise, other, torch.zeros(8)), noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(noise, other, torch.ones(8)), other, rtol=0, atol=1e-6)


def model_of(network: Network) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=SCHEDULE, image_shape=(1, 4, 4))


def between(
    weight: float, num_steps: int, kind: Any = DETERMINISTIC_DDIM, **changes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """On data for which the flow is known; two different images of six."""
    x_0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 - 0.8
    rows = changes.pop("rows", [0, 1, 2])
    first, second = x_0[:3][rows], x_0[3:][rows]
    sampler = kind(num_steps=num_steps, clip_x_0=False, **changes)
    made = interpolate_images(
        model_of(SKEWED.network(SCHEDULE)), sampler, first, second, torch.full((len(rows),), weight),
        first_label=None, second_label=None, sample_ids=torch.arange(3)[rows],
    )  # fmt: skip
    return made, first, second


@pytest.mark.parametrize(("weight", "end"), [(0.0, 1), (1.0, 2)])
def test_the_ends_are_the_inputs_but_for_the_walk_up_and_down(weight: float, end: int) -> None:
    """First order: half the error with twice the steps. The walk up is DDIM's, whatever walks down."""
    errors = []
    for num_steps in (50, 100, 200):
        answer = between(weight, num_steps)
        errors.append(float((answer[0] - answer[end]).abs().max()))
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.5)
    solver = between(weight, 200, DPMSolver2M)
    assert float((solver[0] - solver[end]).abs().max()) < 0.03


def test_halfway_differs_from_both_and_does_not_depend_on_the_batch() -> None:
    made, first, second = between(0.5, 40)
    assert not bool(torch.isclose(made, first, atol=1e-3).all()) and not bool(torch.isclose(made, second).all())
    for rows in ([2, 1, 0], [1]):
        torch.testing.assert_close(between(0.5, 40, rows=rows)[0], made[rows], rtol=0, atol=1e-12)


def test_an_inversion_is_not_limited() -> None:
    """Clipping cannot be undone: the latents are the same whether the sampler clips or not."""
    x_0, model = torch.full((2, 1, 2, 2), 0.95), model_of(SKEWED.network(SCHEDULE))
    clipped, free = (
        invert_images(model, DDIM(num_steps=20, eta=0.0, clip_x_0=clip, dynamic_threshold=threshold), x_0, None)
        for clip, threshold in ((True, 0.9), (False, None))
    )
    assert torch.equal(clipped, free)


def test_labels_go_with_their_images_and_the_nearer_one_comes_down() -> None:
    seen = list[list[int]]()

    def watching(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        seen.append(label.tolist())
        return 0.5 * x_t

    sampler = Heun(num_steps=3)
    images, weight = torch.zeros(3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.8])

    def run(first: Tensor | None, second: Tensor | None) -> Tensor:
        return interpolate_images(
            model_of(watching), sampler, images, images, weight,
            first_label=first, second_label=second, sample_ids=torch.arange(3),
        )  # fmt: skip

    run(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    assert seen[:6] == [[1, 2, 3]] * 3 + [[4, 5, 6]] * 3
    assert set(map(tuple, seen[6:])) == {(1, 2, 6)}
    assert len(seen) == num_interpolation_evaluations(SCHEDULE, sampler)
    with pytest.raises(ValueError, match=r"^second_label: "):
        run(None, torch.tensor([4, 5, 6]))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (DDIM, {"eta": 0.5}, r"^name: .*without noise of its own, got ddim with noise.*choose ddim with eta 0"),
        (Ancestral, {}, r"^name: .*without noise.*got ancestral"),
        (DPMSolver2MSDE, {}, r"^name: .*without noise.*got dpm_solver_2m_sde"),
        (Heun, {"churn": 1.0}, r"^name: .*without noise of its own, got heun with noise"),
    ],
)
def test_samplers_with_noise_are_refused(kind: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        between(0.5, 10, kind, **changes)
