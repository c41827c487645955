"""Random t is unbiased, standard errors are true, statistics merge: 2 x 2 images of four levels, 25 steps."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ddpm import (
    BoundStatistics,
    ImageBound,
    LikelihoodConfig,
    RunningMoments,
    ScheduleConfig,
    bound_of_images,
    make_schedule,
)
from tests.ddpm.pixel_oracle import FOUR, exact_model, images_of

SEED = 3
SHORT = make_schedule(ScheduleConfig(name="cosine", num_timesteps=25))


def bound(
    num_images: int, config: LikelihoodConfig | None = None, *, first: int = 0, probabilities: Tensor | None = None
) -> ImageBound:
    """Of 2 x 2 images of four levels under a chain of 25 steps."""
    ids = torch.arange(first, first + num_images)
    return bound_of_images(
        exact_model(SHORT, FOUR, 2),
        config or LikelihoodConfig(),
        seed=SEED,
        sample_ids=ids,
        x_0=images_of(FOUR, ids, 2),
        label=None,
        probabilities=probabilities,
    )


def pilot() -> Tensor:
    return BoundStatistics.of(bound(200, first=10**6)).importance(uniform_share=0.1)


def random_config(terms: str, terms_per_image: int) -> LikelihoodConfig:
    return LikelihoodConfig(terms=terms, terms_per_image=terms_per_image)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full_sum() -> ImageBound:
    return bound(16_000)


@pytest.mark.parametrize("terms", ["uniform", "stratified", "importance"])
def test_random_t_agrees_with_the_full_sum(terms: str, full_sum: ImageBound) -> None:
    """16,000 images, 8 terms of 25 for each: the mean of the difference within 4 of its standard errors of 0."""
    estimate = bound(16_000, random_config(terms, 8), probabilities=pilot() if terms == "importance" else None)
    for part in ("bits_per_dim", "decoder", "denoising"):
        values = getattr(estimate, part) - getattr(full_sum, part)
        difference = RunningMoments.from_samples(values[:, None]).estimate(0)
        assert 0 < difference.standard_error < 0.05
        assert abs(difference.value) < 4 * difference.standard_error


def test_stratified_and_importance_vary_less() -> None:
    def error(terms: str, probabilities: Tensor | None = None) -> float:
        statistics = BoundStatistics.of(bound(2000, random_config(terms, 5), probabilities=probabilities))
        return statistics.bits_per_dim.standard_error

    uniform = error("uniform")
    assert error("stratified") < 0.9 * uniform
    assert error("importance", pilot()) < 0.5 * uniform


@pytest.mark.parametrize("terms", ["all", "uniform", "stratified", "importance"])
def test_standard_error_is_the_spread_of_repetitions(terms: str) -> None:
    """200 repetitions of 50 images each, with other images, noise and t; the spread's own error is 5%."""
    config = LikelihoodConfig() if terms == "all" else random_config(terms, 6)
    whole = bound(200 * 50, config, probabilities=pilot() if terms == "importance" else None)
    statistics = [
        BoundStatistics.of(
            dataclasses.replace(
                whole,
                **{name: getattr(whole, name)[start : start + 50] for name in ("prior", "t", "terms", "weight")},
            )
        )
        for start in range(0, 10_000, 50)
    ]
    for name in ("bits_per_dim", "prior", "denoising"):
        estimates = [getattr(s, name) for s in statistics]
        spread = float(torch.tensor([e.value for e in estimates]).std())
        reported = sum(e.standard_error for e in estimates) / 200
        assert reported == pytest.approx(spread, rel=0.2)


def test_as_many_strata_as_steps_is_the_full_sum() -> None:
    full, stratified = bound(7), bound(7, random_config("stratified", 25))
    assert torch.equal(stratified.t, full.t) and torch.equal(stratified.terms, full.terms)
    assert torch.equal(stratified.weight, full.weight)


@pytest.mark.parametrize("terms", ["all", "uniform", "stratified", "importance"])
def test_an_image_s_bound_is_its_own(terms: str) -> None:
    config = LikelihoodConfig() if terms == "all" else random_config(terms, 4)
    probabilities = pilot() if terms == "importance" else None
    whole = bound(9, config, probabilities=probabilities)
    alone = bound(1, config, first=6, probabilities=probabilities)
    torch.testing.assert_close(whole.bits_per_dim[6:7], alone.bits_per_dim, rtol=1e-12, atol=0.0)
    assert torch.equal(whole.t[6:7], alone.t)


@pytest.mark.parametrize("parts", [[30], [1, 29], [10, 10, 10], [7, 2, 20, 1]])
def test_statistics_merge_in_any_partition(parts: list[int]) -> None:
    for config in (LikelihoodConfig(), random_config("uniform", 2)):
        whole = BoundStatistics.of(bound(30, config))
        merged, start = None, 0
        for size in parts:
            part = BoundStatistics.of(bound(size, config, first=start))
            merged, start = part if merged is None else part + merged, start + size
        assert merged is not None and merged.num_images == 30
        for name in ("bits_per_dim", "prior", "denoising", "decoder"):
            ours, theirs = getattr(merged, name), getattr(whole, name)
            assert ours.value == pytest.approx(theirs.value, rel=1e-12)
            assert ours.standard_error == pytest.approx(theirs.standard_error, rel=1e-9)
        assert torch.equal(merged.by_t.count, whole.by_t.count)
        torch.testing.assert_close(merged.by_t.mean, whole.by_t.mean, rtol=1e-12, atol=1e-15)


def test_terms_add_up_to_the_whole() -> None:
    statistics = BoundStatistics.of(bound(20))
    parts = statistics.prior.value + statistics.denoising.value + statistics.decoder.value
    assert statistics.bits_per_dim.value == pytest.approx(parts)
    assert float(statistics.by_t.mean[0]) == pytest.approx(statistics.decoder.value)
    assert float(statistics.by_t.mean[1:].sum()) == pytest.approx(statistics.denoising.value)


def test_statistics_of_different_measurements_do_not_merge() -> None:
    clipped, free = bound(2), bound(2, LikelihoodConfig(clip_x_0=False))
    short = bound(2, LikelihoodConfig(num_steps=5))
    longer = dataclasses.replace(clipped, num_timesteps=26)
    for other in (free, short, longer):
        with pytest.raises(ValueError, match=r"^other: "):
            BoundStatistics.of(clipped) + BoundStatistics.of(other)


def test_probabilities_are_for_importance_only() -> None:
    uniform = torch.full((25,), 1 / 25, dtype=torch.float64)
    for config, probabilities in (
        (LikelihoodConfig(), uniform),
        (random_config("uniform", 2), uniform),
        (random_config("importance", 2), None),
        (random_config("importance", 2), uniform[:-1]),
    ):
        with pytest.raises(ValueError, match=r"^probabilities: "):
            bound(2, config, probabilities=probabilities)
