"""Philox against the published vectors and another library; purity, distribution and exact thresholds of the draws.

Statistics use fixed seeds and bounds of five standard errors: one such bound fails a correct generator with
probability 5.7e-7, all of them together (under 60) with less than 4e-5; and then for ever, as nothing changes between
runs.
"""

import math

import pytest
import randomgen
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import Stream, bernoulli, philox4x32, random_integers, random_words, standard_normal
from tests.seeds import SEEDS

SEED = 0x0123456789ABCDEF
SIGMAS = 5.0

word = st.integers(0, 2**32 - 1)
sample_id = st.integers(0, 2**48 - 1)


def oracle_words(counter: list[int], seed: int, num_words: int) -> list[int]:
    """randomgen's words from a counter on; it steps its counter before each block."""
    start = sum(value << (32 * i) for i, value in enumerate(counter))
    generator = randomgen.Philox(key=seed, counter=(start - 1) % 2**128, number=4, width=32)
    return [int(value) for value in generator.random_raw(num_words)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: list[int], key: tuple[int, int], words: list[int]
) -> None:
    assert philox4x32(torch.tensor(counter), key).tolist() == words


@given(counter=st.lists(word, min_size=4, max_size=4), k0=word, k1=word)
def test_philox_equals_randomgen(counter: list[int], k0: int, k1: int) -> None:
    assert philox4x32(torch.tensor(counter), (k0, k1)).tolist() == oracle_words(counter, k1 << 32 | k0, 4)


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(Stream),
    ids=st.lists(sample_id, min_size=1, max_size=4),
    draw=word,
    num_words=st.integers(1, 13),
)
def test_words_have_the_documented_counter(
    seed: int, stream: Stream, ids: list[int], draw: int, num_words: int
) -> None:
    expected = [
        [
            oracle_words([element // 4, i & 0xFFFFFFFF, (i >> 32) << 16 | stream, draw], seed, 4)[element % 4]
            for element in range(num_words)
        ]
        for i in ids
    ]
    assert random_words(seed, stream, torch.tensor(ids), draw, num_words).tolist() == expected


def test_draws_may_differ_per_sample() -> None:
    ids, draws = torch.tensor([5, 5, 9]), torch.tensor([0, 7, 2**32 - 1])
    together = random_words(SEED, Stream.STEP, ids, draws, 6)
    for row, (i, draw) in enumerate(zip(ids.tolist(), draws.tolist(), strict=True)):
        assert torch.equal(together[row], random_words(SEED, Stream.STEP, torch.tensor([i]), draw, 6)[0])


def test_stream_numbers_are_permanent() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "X_T": 0,
        "STEP": 1,
        "CHURN": 2,
        "INPAINT": 3,
        "TRAIN_T": 16,
        "TRAIN_EPS": 17,
        "TRAIN_FLIP": 18,
        "TRAIN_LABEL_DROP": 19,
        "TRAIN_T_SLOT": 20,
        "ORDER_SHARDS": 32,
        "ORDER_ROWS": 33,
        "EVAL_EPS": 48,
        "EVAL_X_0": 49,
        "EVAL_BOUND_EPS": 50,
        "EVAL_BOUND_T": 51,
        "EVAL_PROBE": 52,
        "EVAL_X_0_ERROR_EPS": 53,
        "EVAL_X_0_ERROR_T": 54,
        "EVAL_SUBSET": 55,
    }


def test_normals_are_box_muller_of_the_words() -> None:
    """Recomputed by Python's libm from the words, with an odd size; in float64, so that its last bits may differ."""
    words = random_words(SEED, Stream.X_T, torch.tensor([4711]), 3, 8)[0].tolist()
    u = [(w + 0.5) / 2**32 for w in words]
    expected = [
        math.sqrt(-2 * math.log(u[i - i % 2])) * (math.sin if i % 2 else math.cos)(2 * math.pi * u[i - i % 2 + 1])
        for i in range(7)
    ]
    exact = standard_normal(SEED, Stream.X_T, torch.tensor([4711]), 3, (7,), torch.float64)[0]
    torch.testing.assert_close(exact, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)
    rounded = standard_normal(SEED, Stream.X_T, torch.tensor([4711]), 3, (7,))[0]
    assert torch.equal(rounded, exact.to(torch.float32))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_of_a_sample_does_not_depend_on_its_batch(seed: int) -> None:
    ids, shape = torch.tensor([3, 2**47 + 11, 0, 4711, 2**32, 2**32 - 1, 8]), (3, 5, 7)
    batch = standard_normal(seed, Stream.STEP, ids, 2, shape)
    reversed_batch = standard_normal(seed, Stream.STEP, ids.flip(0), 2, shape)
    assert torch.equal(reversed_batch.flip(0), batch)
    for row in range(7):
        assert torch.equal(standard_normal(seed, Stream.STEP, ids[row : row + 1], 2, shape)[0], batch[row])
    assert len({tuple(noise.flatten().tolist()) for noise in batch}) == 7


@pytest.mark.parametrize("other", ["seed", "stream", "id", "draw"])
def test_each_part_of_the_counter_changes_the_noise(other: str) -> None:
    ids = torch.tensor([1])
    a = standard_normal(SEED, Stream.X_T, ids, 0, (64,))
    b = {
        "seed": lambda: standard_normal(SEED + 2**32, Stream.X_T, ids, 0, (64,)),
        "stream": lambda: standard_normal(SEED, Stream.STEP, ids, 0, (64,)),
        "id": lambda: standard_normal(SEED, Stream.X_T, ids + 2**32, 0, (64,)),
        "draw": lambda: standard_normal(SEED, Stream.X_T, ids, 1, (64,)),
    }[other]()
    assert not bool((a == b).any())


@pytest.fixture(scope="module")
def ten_million() -> Tensor:
    """[1000 ids, 10000 elements], in float64 so that ties of float32 do not matter."""
    return standard_normal(SEED, Stream.TRAIN_EPS, torch.arange(1000), 0, (10_000,), torch.float64)


def test_moments_of_ten_million_draws(ten_million: Tensor) -> None:
    n = ten_million.numel()
    mean, variance = float(ten_million.mean()), float(ten_million.square().mean())
    skewness, kurtosis = float(ten_million.pow(3).mean()), float(ten_million.pow(4).mean())
    assert abs(mean) < SIGMAS * math.sqrt(1 / n)
    assert abs(variance - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs(skewness) < SIGMAS * math.sqrt(15 / n)
    assert abs(kurtosis - 3) < SIGMAS * math.sqrt(96 / n)


@pytest.mark.parametrize("beyond", [1.0, 2.0, 3.0, 4.0, 5.0])
def test_tails_of_ten_million_draws(ten_million: Tensor, beyond: float) -> None:
    probability = scipy.stats.norm.sf(beyond)
    for count in (int((ten_million > beyond).sum()), int((ten_million < -beyond).sum())):
        assert scipy.stats.binomtest(count, ten_million.numel(), probability).pvalue > 5.7e-7


def test_shape_of_the_distribution(ten_million: Tensor) -> None:
    assert scipy.stats.kstest(ten_million[:100].flatten().numpy(), "norm").pvalue > 5.7e-7


@pytest.mark.parametrize("axis", [0, 1], ids=["ids", "elements"])
@pytest.mark.parametrize("power", [1, 2], ids=["values", "squares"])
def test_no_correlation_along_ids_or_elements(ten_million: Tensor, axis: int, power: int) -> None:
    """Squares too: the normals of a Box-Muller pair share a radius, and a wrong angle shows only there."""
    x = ten_million**power - (power - 1)  # mean 0 in either case
    scale = 1 if power == 1 else 2  # variance of x
    for lag in (1, 2, 3, 4, 8):
        a, b = x.narrow(axis, 0, x.shape[axis] - lag), x.narrow(axis, lag, x.shape[axis] - lag)
        assert abs(float((a * b).mean())) < SIGMAS * scale / math.sqrt(a.numel()), lag


def test_no_correlation_between_streams_draws_and_seeds(ten_million: Tensor) -> None:
    ids, shape = torch.arange(100), (10_000,)
    x = ten_million[:100]
    others = [
        standard_normal(SEED, Stream.X_T, ids, 0, shape, torch.float64),
        standard_normal(SEED, Stream.TRAIN_EPS, ids, 1, shape, torch.float64),
        standard_normal(SEED + 1, Stream.TRAIN_EPS, ids, 0, shape, torch.float64),
    ]
    for other in others:
        assert abs(float((x * other).mean())) < SIGMAS / math.sqrt(x.numel())


def test_extreme_words_give_finite_normals() -> None:
    """u is never 0 or 1; the largest radius is that of u = 2^-33."""
    assert math.sqrt(-2 * math.log(2**-33)) < 6.77
    noise = standard_normal(SEED, Stream.X_T, torch.arange(64), 0, (4096,))
    assert bool(noise.isfinite().all()) and float(noise.abs().max()) < 6.77


@pytest.mark.parametrize("upper", [2, 10, 1000])
def test_integers_are_uniform(upper: int) -> None:
    draws = random_integers(SEED, Stream.TRAIN_T, torch.arange(1_000_000), 0, upper)
    assert 5.7e-7 < scipy.stats.chisquare(draws.bincount(minlength=upper).numpy()).pvalue < 1 - 5.7e-7


@given(i=sample_id, draw=word, upper=st.integers(1, 2**31))
def test_integers_are_the_floor_of_word_times_upper(i: int, draw: int, upper: int) -> None:
    w = int(random_words(SEED, Stream.TRAIN_T, torch.tensor([i]), draw, 1))
    value = int(random_integers(SEED, Stream.TRAIN_T, torch.tensor([i]), draw, upper))
    assert value == w * upper // 2**32 < upper


@given(i=sample_id, draw=word)
def test_bernoulli_threshold_is_exact(i: int, draw: int) -> None:
    """True exactly when w / 2^32 < p: a p equal to the word's fraction is False, the next larger one True."""
    ids = torch.tensor([i])
    w = int(random_words(SEED, Stream.TRAIN_FLIP, ids, draw, 1))
    assert not bool(bernoulli(SEED, Stream.TRAIN_FLIP, ids, draw, w / 2**32))
    assert bool(bernoulli(SEED, Stream.TRAIN_FLIP, ids, draw, (w + 1) / 2**32))


def test_bernoulli_never_at_0_always_at_1_and_rarely_at_a_tenth() -> None:
    ids = torch.arange(1_000_000)
    assert not bool(bernoulli(SEED, Stream.TRAIN_FLIP, ids, 0, 0.0).any())
    assert bool(bernoulli(SEED, Stream.TRAIN_FLIP, ids, 0, 1.0).all())
    count = int(bernoulli(SEED, Stream.TRAIN_FLIP, ids, 0, 0.1).sum())
    assert abs(count - 100_000) < SIGMAS * math.sqrt(1_000_000 * 0.1 * 0.9)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("seed", lambda: random_words(-1, Stream.X_T, torch.tensor([0]), 0, 1)),
        ("seed", lambda: random_words(2**64, Stream.X_T, torch.tensor([0]), 0, 1)),
        ("ids", lambda: random_words(0, Stream.X_T, torch.tensor([0, -1]), 0, 1)),
        ("ids", lambda: random_words(0, Stream.X_T, torch.tensor([2**48]), 0, 1)),
        ("draws", lambda: random_words(0, Stream.X_T, torch.tensor([0]), 2**32, 1)),
        ("draws", lambda: random_words(0, Stream.X_T, torch.tensor([0]), torch.tensor([-1]), 1)),
        ("num_words", lambda: random_words(0, Stream.X_T, torch.tensor([0]), 0, -1)),
        ("upper", lambda: random_integers(0, Stream.X_T, torch.tensor([0]), 0, 0)),
        ("upper", lambda: random_integers(0, Stream.X_T, torch.tensor([0]), 0, 2**31 + 1)),
        ("probability", lambda: bernoulli(0, Stream.X_T, torch.tensor([0]), 0, 1.5)),
        ("probability", lambda: bernoulli(0, Stream.X_T, torch.tensor([0]), 0, math.nan)),
    ],
)
def test_out_of_range_is_refused(field: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=rf"^{field}: "):
        call()


@pytest.mark.gpu
def test_gpu_draws_the_same() -> None:
    ids = torch.arange(64)
    words = random_words(SEED, Stream.X_T, ids.cuda(), 0, 1024).cpu()
    assert torch.equal(words, random_words(SEED, Stream.X_T, ids, 0, 1024))
    here, there = (standard_normal(SEED, Stream.X_T, where, 0, (1024,)).cpu() for where in (ids, ids.cuda()))
    torch.testing.assert_close(there, here, rtol=2**-23, atol=0)
