"""Interpolation on a grid."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import product


def multilinear(axes: Sequence[Sequence[float]], values: Sequence[float], at: Sequence[float]) -> float:
    """Return the value at a point: linear in each dimension between neighbours, constant beyond the ends.

    axes: ascending, one a dimension; values: flat, the last dimension fastest. Exact on the grid.

    >>> multilinear([[0.0, 1.0], [0.0, 2.0]], [0.0, 2.0, 10.0, 12.0], [0.5, 1.0])
    6.0
    """
    places = [_place(axis, point) for axis, point in zip(axes, at, strict=True)]
    total = 0.0
    for sides in product((0, 1), repeat=len(axes)):
        weight, index = 1.0, 0
        for axis, (low, share), side in zip(axes, places, sides, strict=True):
            weight *= share if side else 1 - share
            index = index * len(axis) + low + side
        if weight:
            total += weight * values[index]
    return total


def _place(axis: Sequence[float], point: float) -> tuple[int, float]:
    """Return the lower neighbour of a point, and what share of the way to the next one it is."""
    low = max(bisect_right(axis, point) - 1, 0)
    if low == len(axis) - 1 or point <= axis[0]:
        return low, 0.0
    return low, (point - axis[low]) / (axis[low + 1] - axis[low])
