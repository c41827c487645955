"""Moments that merge in any partition, also where quantities are missing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import RunningMoments


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_merge_in_any_partition(seed: int, cuts: list[int]) -> None:
    """60 values of 5 quantities, of which some have few or none, in parts that may be empty."""
    generator = torch.Generator().manual_seed(seed)
    values = 1e3 + torch.randn(60, generator=generator, dtype=torch.float64)
    index = torch.randint(4, (60,), generator=generator) % 5
    bounds = sorted(cuts)
    parts = [
        RunningMoments.from_entries(i, v, 5)
        for i, v in zip(index.tensor_split(bounds), values.tensor_split(bounds), strict=True)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    for d in range(5):
        own = values[index == d].numpy()
        assert int(merged.count[d]) == len(own)
        if len(own) == 0:
            assert float(merged.mean[d]) == 0 and float(merged.m2[d]) == 0 and float(merged.second_moment[d]) == 0
            continue
        np.testing.assert_allclose(float(merged.mean[d]), own.mean(), rtol=1e-13)
        np.testing.assert_allclose(float(merged.second_moment[d]), (own**2).mean(), rtol=1e-13)
        if len(own) > 1:
            np.testing.assert_allclose(float(merged.variance[d]), own.var(ddof=1), rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(float(merged.standard_error[d]), own.std(ddof=1) / len(own) ** 0.5, rtol=1e-8)


def test_whole_samples_and_the_estimate() -> None:
    samples = torch.tensor([[1.0, 10.0], [3.0, 30.0], [8.0, 20.0]])
    moments = RunningMoments.from_samples(samples)
    assert moments.count.tolist() == [3, 3] and moments.mean.dtype == torch.float64
    estimate = moments.estimate(1)
    assert estimate.value == pytest.approx(20) and estimate.standard_error == pytest.approx(10 / math.sqrt(3))
    assert moments.estimate(0).value == pytest.approx(4)


def test_one_value_has_no_error() -> None:
    moments = RunningMoments.from_samples(torch.tensor([[5.0]]))
    assert moments.estimate(0).value == 5 and math.isnan(moments.estimate(0).standard_error)
    assert math.isnan(float(moments.variance[0])) and math.isnan(
        float(RunningMoments.from_samples(torch.zeros(0, 1)).standard_error[0])
    )
