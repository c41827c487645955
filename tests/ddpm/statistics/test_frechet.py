"""Moments that merge, and the Frechet distance against scipy and closed forms."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm import FrechetComparison, Moments, frechet_distance


def samples(seed: int, n: int, d: int) -> Tensor:
    """Correlated, off-centre, on different scales."""
    generator = torch.Generator().manual_seed(seed)
    x, mix = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (d, d)))
    return x @ mix + 10 * torch.randn(d, generator=generator, dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(count=101, mean=mean.double(), m2=100 * covariance.double())


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 59), max_size=5, unique=True))
def test_moments_merge_in_any_partition(seed: int, cuts: list[int]) -> None:
    x = samples(seed, 60, 4)
    parts = [Moments.from_samples(part) for part in torch.tensor_split(x, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    backwards = parts[-1]
    for part in reversed(parts[:-1]):
        backwards = part + backwards
    for moments in (merged, backwards):
        assert moments.count == 60
        torch.testing.assert_close(moments.mean, x.mean(dim=0))
        np.testing.assert_allclose(
            moments.covariance().numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10
        )


def test_merging_does_not_cancel_far_from_the_origin() -> None:
    """Sums of squares would lose every digit here: the mean is 1e8 standard deviations."""
    x = samples(0, 1000, 2)
    near = Moments.from_samples(x[:300]) + Moments.from_samples(x[300:])
    far = Moments.from_samples(x[:300] + 2**30) + Moments.from_samples(x[300:] + 2**30)
    torch.testing.assert_close(far.covariance(), near.covariance(), rtol=1e-6, atol=1e-6)


def test_float32_samples_are_summed_in_float64() -> None:
    x = samples(0, 100, 3).float()
    moments = Moments.from_samples(x)
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance().numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 32])
@pytest.mark.parametrize("seed", range(5))
def test_distance_equals_scipy_on_nonsingular_covariances(seed: int, d: int) -> None:
    a, b = samples(seed, 4 * d + 5, d), samples(seed + 1000, 3 * d + 5, d)
    covariances = [np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = a.numpy().mean(0) - b.numpy().mean(0)
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    got = frechet_distance(Moments.from_samples(a), Moments.from_samples(b))
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    a=st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 4)), min_size=3, max_size=3),
    b=st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 4)), min_size=3, max_size=3),
)
def test_distance_of_diagonal_gaussians(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    """Sum over the axes of (difference of means)^2 + (difference of standard deviations)^2; 0 deviations included."""
    expected = sum((ma - mb) ** 2 + (sa - sb) ** 2 for (ma, sa), (mb, sb) in zip(a, b, strict=True))
    moments = [
        gaussian(torch.tensor([m for m, _ in x]), torch.diag(torch.tensor([s for _, s in x], dtype=torch.float64) ** 2))
        for x in (a, b)
    ]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_singular_covariances() -> None:
    """Fewer images than dimensions, and constant pixels: closed forms hold, nothing is NaN."""
    few = Moments.from_samples(torch.cat((samples(0, 5, 20), torch.zeros(5, 4, dtype=torch.float64)), dim=1))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9 * float(few.covariance().trace()))
    u = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    v = torch.tensor([0.0, 0.8, 0.6], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    a, b = gaussian(zero, 4 * torch.outer(u, u)), gaussian(zero, 9 * torch.outer(v, v))
    # Rank one: tr (C_a C_b)^(1/2) = 2 * 3 * |u.v|.
    assert frechet_distance(a, b) == pytest.approx(4 + 9 - 2 * 2 * 3 * 0.64, abs=1e-10)
    point = gaussian(zero, torch.zeros(3, 3))
    assert frechet_distance(a, point) == pytest.approx(4, abs=1e-12)


SCALES = torch.logspace(-3, 3, 60, dtype=torch.float64)
SOME_PIXELS = (torch.arange(60) % 3 > 0).double()
PAIRS = {
    "more vectors than dimensions": (samples(0, 200, 60), samples(1, 90, 60)),
    "few": (samples(0, 6, 60), samples(1, 20, 60)),
    "few and many": (samples(0, 6, 60), samples(1, 200, 60)),
    "many and few": (samples(0, 200, 60), samples(1, 6, 60)),
    "half the dimensions, and one more": (samples(0, 30, 60), samples(1, 31, 60)),
    "as many as dimensions, and one more": (samples(0, 60, 60), samples(1, 61, 60)),
    "two": (samples(0, 2, 60), samples(1, 2, 60)),
    "few, the same": (samples(0, 12, 60), samples(0, 12, 60)),
    "many, the same": (samples(0, 200, 60), samples(0, 200, 60)),
    "few, of which some are equal": (samples(0, 6, 60).repeat(3, 1), samples(1, 12, 60)),
    "few, constant pixels": (samples(0, 12, 60) * SOME_PIXELS, samples(1, 20, 60) * SOME_PIXELS),
    "many, constant pixels": (samples(0, 200, 60) * SOME_PIXELS, samples(1, 90, 60) * SOME_PIXELS),
    "few, pixels constant in one": (samples(0, 12, 60) * SOME_PIXELS, samples(1, 20, 60)),
    "few, one point": (samples(0, 1, 60).expand(3, 60), samples(1, 20, 60)),
    "few, unequal scales": (samples(0, 12, 60) * SCALES, samples(1, 20, 60) * SCALES),
    "many, unequal scales": (samples(0, 200, 60) * SCALES, samples(1, 90, 60) * SCALES),
    "few, scales the other way": (samples(0, 12, 60) * SCALES, samples(1, 20, 60) * SCALES.flip(0)),
    "few, of unequal lengths": (
        samples(0, 12, 60) * torch.logspace(-4, 0, 12, dtype=torch.float64)[:, None],
        samples(1, 20, 60),
    ),
    "few, far from each other": (samples(0, 12, 60), 1e-4 * samples(1, 20, 60)),
    "levels of 8 bits": (samples(0, 12, 60).round() / 255, samples(1, 20, 60).round() / 255),
}


def by_whole_decompositions(x: Tensor, y: Tensor) -> tuple[float, np.ndarray, float]:
    """Distance, influences of x, and the size of what cancels in either, by D x D matrices, whatever their rank."""
    (mean_x, cov_x, root_x), (mean_y, cov_y, root_y) = (whole_root(z.numpy()) for z in (x, y))
    u, s, _ = np.linalg.svd(root_x.T @ root_y)
    distance = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y) - 2 * s.sum()
    deviation = x.numpy() - mean_x
    z = deviation @ np.linalg.pinv(root_x, rcond=1e-12).T @ u
    influence = 2 * deviation @ (mean_x - mean_y) + (deviation**2).sum(1) - z**2 @ s
    influence -= (np.trace(cov_x) - s.sum()) * (len(x) - 1) / len(x)
    size = ((mean_x - mean_y) ** 2).sum() + (deviation**2).sum(1).max() + np.trace(cov_x + cov_y)
    return float(distance), influence, float(size)


def whole_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, covariance and a root of it, [D, D]; eigenvalues that are only rounding are 0."""
    covariance = np.cov(x, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0
    return x.mean(0), covariance, vectors * values**0.5


@pytest.mark.parametrize(("x", "y"), PAIRS.values(), ids=PAIRS.keys())
def test_a_comparison_equals_whole_decompositions(x: Tensor, y: Tensor) -> None:
    """In the span of few vectors too, and of sets that were merged; for vectors all at once or some of them."""
    distance, influence, size = by_whole_decompositions(x, y)
    for a in (Moments.from_samples(x), Moments.from_samples(x[:1]) + Moments.from_samples(x[1:])):
        comparison = FrechetComparison.of(a, Moments.from_samples(y))
        assert comparison.distance == pytest.approx(distance, rel=1e-10, abs=1e-12 * size)
        found = torch.cat((comparison.influence(x[:2]), comparison.influence(x[2:])))
        np.testing.assert_allclose(found.numpy(), influence, rtol=1e-10, atol=1e-12 * size)


def test_few_vectors_are_decomposed_in_their_span_and_once() -> None:
    class Decompositions(TorchDispatchMode):
        ranks: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "linalg" in str(func):
                self.ranks.append(min(args[0].shape))
            return func(*args, **(kwargs or {}))

    x, y = samples(0, 6, 60), samples(1, 30, 60)
    a, b, more = (Moments.from_samples(z) for z in (x, y, samples(2, 31, 60)))
    with Decompositions() as found:
        comparison = FrechetComparison.of(a, b)
        assert found.ranks == [5, 29, 5]
        comparison.influence(x)
        assert len(found.ranks) == 3
        FrechetComparison.of(a, more)
    assert found.ranks[3:] == [5, 60, 5], "of more than half as many as dimensions, the whole"


def test_the_rank_is_found_not_taken_from_the_count() -> None:
    """Moments that are given, not measured: every dimension counts, though three vectors could not span them."""
    variance = torch.arange(1.0, 21.0, dtype=torch.float64)
    three = Moments(count=3, mean=torch.zeros(20, dtype=torch.float64), m2=2 * torch.diag(variance))
    point = gaussian(torch.zeros(20), torch.zeros(20, 20))
    assert frechet_distance(three, point) == pytest.approx(210, rel=1e-12)
    assert frechet_distance(three, gaussian(torch.zeros(20), torch.diag(4 * variance))) == pytest.approx(210, rel=1e-12)


def test_distance_is_symmetric_and_ignores_rotations() -> None:
    a, b = samples(1, 50, 6), samples(2, 40, 6)
    rotation = torch.linalg.qr(samples(3, 6, 6))[0]
    distance = frechet_distance(Moments.from_samples(a), Moments.from_samples(b))
    assert frechet_distance(Moments.from_samples(b), Moments.from_samples(a)) == pytest.approx(distance, rel=1e-12)
    rotated = frechet_distance(Moments.from_samples(a @ rotation), Moments.from_samples(b @ rotation))
    assert rotated == pytest.approx(distance, rel=1e-10)


def test_too_few_samples_and_other_dimensions_are_refused() -> None:
    one, pair, wide = (Moments.from_samples(torch.zeros(n, d)) for n, d in ((1, 2), (2, 2), (2, 3)))
    with pytest.raises(ValueError, match=r"^samples: "):
        Moments.from_samples(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"^count: "):
        frechet_distance(pair, one)
    with pytest.raises(ValueError, match=r"^b: "):
        frechet_distance(pair, wide)
