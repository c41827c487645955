"""A smooth, monotone curve through a table, and its inverse: what makes a schedule continuous in t.

Cubic Hermite pieces whose slope at a node is the harmonic mean of the two neighbouring differences: the curve passes
through the table exactly, has a continuous first derivative, and never turns back, so that it can be inverted. Where
the table is a straight line, so is the curve.

Source:
    Fritsch and Butland 1984, "A method for constructing local monotone piecewise cubic interpolants".
"""

import torch
from jaxtyping import Float64
from torch import Tensor

Table = Float64[Tensor, " T"]
_BISECTIONS = 60  # each halves an interval of length 1: below the spacing of float64


def interpolate(table: Table, t: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """The curve at t.

    Args:
        table: Values at 0 .. T-1, ascending.
        t: Places in [0, T-1], not checked.

    Returns:
        Values, in [table[0], table[-1]]; at an integer, the table's own.
    """
    index = t.floor().to(torch.int64)
    return _piece(table, index, t - index)


def invert(table: Table, values: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """Where the curve has a value; values beyond the table are taken to its ends.

    Args:
        table: Values at 0 .. T-1, ascending.
        values: Values to look for.

    Returns:
        Places in [0, T-1], to the last bits of float64.
    """
    last = len(table) - 1
    index = (torch.searchsorted(table, values.contiguous(), right=True) - 1).clamp(0, max(last - 1, 0))
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beyond = _piece(table, index, middle) > values
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (index + low).clamp(max=last)


def _piece(table: Table, index: Tensor, fraction: Tensor) -> Tensor:
    """The cubic between nodes index and index + 1."""
    slopes, following = _slopes(table), (index + 1).clamp(max=len(table) - 1)
    rise = table[following] - table[index]
    # y + u (m + u (3 d - 2 m - m' + u (m + m' - 2 d))): the Hermite cubic, exact at u = 0.
    start, end = slopes[index], slopes[following]
    curve = 3 * rise - 2 * start - end + fraction * (start + end - 2 * rise)
    return table[index] + fraction * (start + fraction * curve)


def _slopes(table: Table) -> Tensor:
    """Derivative at each node."""
    if len(table) == 1:
        return torch.zeros_like(table)
    rise = table.diff()
    before, after = rise[:-1], rise[1:]
    # The smallest normal number keeps two flat neighbours from giving 0 / 0.
    inner = 2 * before * after / (before + after).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.cat((rise[:1], inner, rise[-1:]))
