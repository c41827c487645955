"""The curve through a table: exact at the nodes, never turning back, invertible; scipy computes the inner pieces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ddpm.process.interpolation import interpolate, invert

rises = st.lists(st.floats(1e-6, 10), min_size=1, max_size=8)


def table_of(rise: list[float]) -> Tensor:
    return torch.tensor([0.0, *rise], dtype=torch.float64).cumsum(0) - 3


@given(rise=rises)
def test_through_every_node_and_never_back(rise: list[float]) -> None:
    table = table_of(rise)
    nodes = torch.arange(len(table), dtype=torch.float64)
    assert torch.equal(interpolate(table, nodes), table)
    dense = interpolate(table, torch.linspace(0, len(table) - 1, 200, dtype=torch.float64))
    assert bool((dense.diff() >= -1e-12).all())
    assert float(dense[0]) == float(table[0]) and float(dense[-1]) == float(table[-1])


@given(rise=rises, place=st.floats(0, 1))
def test_inverse(rise: list[float], place: float) -> None:
    table = table_of(rise)
    t = torch.tensor([place * len(rise)], dtype=torch.float64)
    # Where the curve is flat, many places have nearly the same value: the value is what must come back.
    value = interpolate(table, t)
    assert float(interpolate(table, invert(table, value))) == pytest.approx(float(value), rel=1e-13, abs=1e-13)
    steep = table_of([1.0 + r / 10 for r in rise])
    assert float(invert(steep, interpolate(steep, t))) == pytest.approx(float(t), abs=1e-12)


@given(rise=st.lists(st.floats(1e-3, 10), min_size=4, max_size=8), place=st.floats(0, 1))
def test_inner_pieces_are_scipy_s(rise: list[float], place: float) -> None:
    """Equal away from the ends, where scipy takes the slope from three points and we take it from two."""
    table = table_of(rise)
    t = 1 + place * (len(rise) - 2)
    expected = float(PchipInterpolator(range(len(table)), table.numpy())(t))
    assert float(interpolate(table, torch.tensor([t], dtype=torch.float64))) == pytest.approx(expected, abs=1e-11)


def test_a_straight_line_stays_one() -> None:
    table = torch.linspace(2, 7, 6, dtype=torch.float64)
    t = torch.linspace(0, 5, 37, dtype=torch.float64)
    torch.testing.assert_close(interpolate(table, t), 2 + t, rtol=0, atol=1e-14)


def test_ends() -> None:
    table = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    got = invert(table, torch.tensor([-5.0, 1.0, 2.0, 4.0, 9.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([0, 0, 1, 2, 2], abs=1e-15)
    assert float(got.min()) >= 0 and float(got.max()) <= 2


def test_one_entry_and_flat_tables() -> None:
    one = torch.tensor([3.0], dtype=torch.float64)
    assert interpolate(one, torch.zeros(2, dtype=torch.float64)).tolist() == [3, 3]
    assert invert(one, torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)).tolist() == [0, 0, 0]
    flat = torch.ones(4, dtype=torch.float64)
    assert interpolate(flat, torch.tensor([0.5, 1.5], dtype=torch.float64)).tolist() == [1, 1]
