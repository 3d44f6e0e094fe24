"""Merge similar neurons without data: a neuron that another one can imitate hands its outgoing weights over.

With rows w_i = [weights, bias] of the producer and an activation f, w_j ~ s w_i makes f(w_j x) ~ s f(w_i x), for s > 0
if f is positively homogeneous (identity, Relu, LeakyRelu, PRelu with one slope) and for s = 1 whatever f is. Neuron j
then goes and every consumer column of i gains s times that of j. Linear dependence among three neurons is out of scope
(see obs.py).

Source: Srinivas and Babu 2015, arXiv:1507.06149; Kim et al. 2020, arXiv:2010.13160 (the scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which neurons stay, ascending, and M[n, kept] that moves consumer columns: consumer' = consumer M, per tap.

    `order[k]` went k-th, with `saliency[k]` = |a_j|^2 |w_j - s w_i|^2: the squared output change is at most about
    saliency |x|^2 for an activation of slope at most 1.
    """

    keep: Array
    M: Array
    order: Array
    saliency: Array


def merge_plan(
    rows: Array,
    bias: Array,
    columns: Array,
    amount: int | None = None,
    cos_min: float = 0.0,
    scaled: bool = False,
    kind: Array | None = None,
) -> MergePlan:
    """Plan up to `amount` merges (all that qualify), each time the pair of least saliency.

    `rows[n, f]`, `bias[n]` produce the neurons; `columns[n, c]` is all that consumers read from each. `scaled` allows
    w_j ~ s w_i; only positively homogeneous activations may have it. A pair qualifies when its similarity is at least
    `cos_min` >= 0: the cosine of [w, b] if scaled, else 2 <w_i, w_j> / (|w_i|^2 + |w_j|^2), which is 1 for equal
    rows only. If scaled, a neuron with w = 0 gives 0 and goes at no cost. At least one neuron stays. Only neurons of
    equal `kind[n]` merge, where it is given.

    >>> plan = merge_plan(np.array([[1.0], [2.0], [-1.0]]), np.zeros(3), np.ones((3, 1)), cos_min=1.0, scaled=True)
    >>> plan.keep.tolist(), plan.M.tolist()
    ([1, 2], [[0.5, 0.0], [1.0, 0.0], [0.0, 1.0]])
    """
    if rows.ndim != 2 or bias.shape != rows.shape[:1] or columns.ndim != 2 or len(columns) != len(rows):
        raise ValueError(f"shapes rows{rows.shape}, bias{bias.shape}, columns{columns.shape}: need [n, f], [n], [n, c]")
    if not 0 <= cos_min <= 1:
        raise ValueError(f"cos_min {cos_min} must lie in [0, 1]: opposite neurons cannot be merged")
    full = np.column_stack([rows, bias]).astype(np.float64)
    columns, n = columns.astype(np.float64), len(rows)
    error, scale = _pairs(full, cos_min, scaled)
    if kind is not None:
        error[kind[:, None] != kind[None]] = np.inf
    power = np.square(columns).sum(1)
    M, alive, partner = np.eye(n), np.ones(n, bool), error.argmin(1)
    order: list[int] = []
    saliencies: list[float] = []
    while alive.sum() > 1 and len(order) < (n if amount is None else amount):
        cost = np.where(alive, _saliency(power, error[np.arange(n), partner]), np.inf)
        j = int(cost.argmin())
        if not np.isfinite(cost[j]):
            break
        i, s = int(partner[j]), float(scale[j, partner[j]])
        order.append(j)
        saliencies.append(float(cost[j]))
        columns[i] += s * columns[j]
        power[i] = np.square(columns[i]).sum()
        M[:, i] += s * M[:, j]
        alive[j], error[:, j] = False, np.inf
        stale = partner == j
        partner[stale] = error[stale].argmin(1)
    keep = np.flatnonzero(alive)
    return MergePlan(keep, M[:, keep], np.array(order, np.int64), np.array(saliencies))


def merge_columns(W: Array, M: Array) -> Array:
    """Return W'[o, kept taps] from W[o, n taps], columns neuron by neuron: W' = W M for every tap alike.

    >>> merge_columns(np.array([[1.0, 2.0, 10.0, 20.0]]), np.array([[1.0], [0.5]])).tolist()
    [[6.0, 12.0]]
    """
    o, n = len(W), len(M)
    if W.ndim != 2 or W.shape[1] % n:
        raise ValueError(f"W{W.shape} does not split into {n} neurons")
    merged: Array = np.einsum("ont,nk->okt", W.reshape(o, n, -1), M, optimize=True)
    return merged.reshape(o, -1)


def _saliency(power: Array, error: Array) -> Array:
    """Return power[j] error[j], power = |a_j|^2; infinite where the error is, also for a neuron that nobody reads."""
    finite = np.isfinite(error)
    return np.where(finite, power * np.where(finite, error, 0.0), np.inf)


def _pairs(rows: Array, cos_min: float, scaled: bool) -> tuple[Array, Array]:
    """Return error[j, i] = |w_j - s w_i|^2, infinite where the pair does not qualify, and the scales s[j, i]."""
    dots = rows @ rows.T
    squares = np.square(rows).sum(1)
    both = squares[:, None] * squares[None]
    if scaled:
        scale = np.maximum(dots, 0.0) / np.where(squares > 0, squares, 1.0)
        similarity = np.where(both > 0, dots / np.sqrt(np.where(both > 0, both, 1.0)), 0.0)
        # f(0) = 0 here, so a zero neuron needs no partner in particular.
        similarity[squares == 0] = 1.0
    else:
        scale = np.ones_like(dots)
        total = squares[:, None] + squares[None]
        similarity = np.where(total > 0, 2 * dots / np.where(total > 0, total, 1.0), 1.0)
    # |a|^2 - 2 s <a, b> + s^2 |b|^2 from the products alone: rounding leaves about 1e-16 |a|^2, and never less than 0.
    error = np.maximum(squares[:, None] - 2 * scale * dots + np.square(scale) * squares[None], 0.0)
    error[similarity < cos_min - 1e-9] = np.inf
    np.fill_diagonal(error, np.inf)
    return error, scale
