"""Which weights may go, and what the others become: sparse weights fitted in the metric of the inputs.

minimise  L = tr( (What - W) H (What - W)^T )   over   What[o, d] that is zero where a mask says so,

and over the mask: `keep` units of the matrix, or n of every m neighbours in a row. A unit is what lives and dies
together: one weight, a block, all taps of a channel in a row, a column. With the mask given each row is a constrained
least-squares problem, What_S = (W H)_S H_SS^-1 (`solve`); the masks:

* `scores`: magnitude |w|, optimal brain damage w^2 H_jj (LeCun et al. 1990), summed over a unit;
* `remove`: optimal brain surgeon, one weight at a time, p = argmin w_p^2 / [H^-1]_pp, the rest repaired after each
  (Hassibi and Stork 1993; Frantar and Alistarh 2022, arXiv:2208.11580, rows apart and their traces merged);
* `sweep`: the same in a fixed order of columns, block by block (SparseGPT, arXiv:2301.00774): one factorisation;
* `alternate`: operator splitting. The quadratic's proximal point and the projection on the pattern in turn, until the
  mask rests (ALPS, Meng et al. 2024, arXiv:2406.07831); in coordinates where H has a unit diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ccompile.numerics import levels
from ccompile.numerics.shrinkage import standardised

Array = npt.NDArray[Any]

DIRECT = 1200  # columns up to which rows are solved by factoring; wider ones by conjugate gradients
STEPS = 300  # most steps of conjugate gradients
ROUNDS = 200  # most rounds of operator splitting
REST = 3  # rounds between looks at how much the mask still changes
BLOCK = 128  # columns that a sweep decides at once
FACTOR = 0.85  # share of a row's weights left at which the elimination goes on in a smaller matrix


@dataclass(frozen=True, eq=False)
class Pattern:
    """What lives and dies together: unit[o, d] numbers from 0; `several`: keep n of every m columns of a row."""

    unit: Array
    several: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """Return the number of units."""
        return int(self.unit.max()) + 1

    @property
    def is_single(self) -> bool:
        """Return whether every weight is a unit."""
        return self.count == self.unit.size

    def mask(self, score: Array, keep: int) -> Array:
        """Return where the best units are; score[o, d] >= 0, summed over a unit; of equals the first are kept.

        keep: units kept; with n:m it is not asked.
        """
        if self.several is not None:
            return _of_each(score, *self.several)
        if self.is_single:
            flat = np.zeros(score.size, bool)
            flat[np.argsort(-score.ravel(), kind="stable")[:keep]] = True
            return flat.reshape(score.shape)
        total = np.bincount(self.unit.ravel(), score.ravel(), self.count)
        alive = np.zeros(self.count, bool)
        alive[np.argsort(-total, kind="stable")[:keep]] = True
        found: Array = alive[self.unit]
        return found


def single(shape: tuple[int, int], several: tuple[int, int] | None = None) -> Pattern:
    """Return the pattern in which every weight is a unit."""
    return Pattern(np.arange(shape[0] * shape[1]).reshape(shape), several)


def blocks(shape: tuple[int, int], size: tuple[int, int]) -> Pattern:
    """Return the pattern of blocks of `size` rows and columns; those at the end may be smaller."""
    rows, columns = (np.arange(length) // each for length, each in zip(shape, size, strict=True))
    return Pattern(rows[:, None] * (int(columns.max()) + 1) + columns)


def _of_each(score: Array, n: int, m: int) -> Array:
    """Return the n best of every m columns of each row; the last, shorter ones keep their share, rounded up."""
    mask = np.zeros(score.shape, bool)
    whole = score.shape[1] // m * m
    parts = score[:, :whole].reshape(len(score), -1, m)
    best = np.argsort(-parts, axis=2, kind="stable")[:, :, :n]
    np.put_along_axis(mask[:, :whole].reshape(parts.shape), best, True, 2)
    if rest := score.shape[1] - whole:
        best = np.argsort(-score[:, whole:], axis=1, kind="stable")[:, : -(-rest * n // m)]
        np.put_along_axis(mask[:, whole:], best, True, 1)
    return mask


def scores(W: Array, H: Array | None) -> Array:
    """Return w^2 H_jj, what each weight's removal costs without repair; without a metric w^2."""
    found: Array = np.square(W) if H is None else np.square(W) * H.diagonal()
    return found


def solve(W: Array, H: Array | None, mask: Array, start: Array | None = None) -> Array:
    """Return What with least loss among those that are zero where mask[o, d] is False.

    start: where conjugate gradients begin for wide matrices; by default W itself.
    """
    if H is None:
        return np.where(mask, W, 0.0)
    right = W @ H
    if W.shape[1] > DIRECT:
        return _gradients(right, H, mask, np.where(mask, W if start is None else start, 0.0))
    found = np.zeros(W.shape)
    for row in range(len(W)):
        at = np.flatnonzero(mask[row])
        if len(at):
            found[row, at] = _positive_solve(H[np.ix_(at, at)], right[row, at])
    return found


def _positive_solve(A: Array, b: Array) -> Array:
    """Return A^-1 b, of a singular A the shortest solution."""
    try:
        solution: Array = scipy.linalg.cho_solve(scipy.linalg.cho_factor(A, lower=True), b)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(A, b, rcond=1e-12)[0])
    return solution


def _gradients(right: Array, H: Array, mask: Array, found: Array) -> Array:
    """Solve all rows' masked normal equations at once by conjugate gradients, scaled by H's diagonal."""
    scale = np.where(H.diagonal() > 0, H.diagonal(), 1.0)
    residual = np.where(mask, right - found @ H, 0.0)
    ahead = residual / scale
    direction, energy = ahead.copy(), (residual * ahead).sum(1)
    first = (np.where(mask, right, 0.0) ** 2 / scale).sum(1)
    for _ in range(STEPS):
        live = energy > 1e-18 * first
        if not live.any():
            break
        along = np.where(mask, direction @ H, 0.0)
        curve = (direction * along).sum(1)
        step = np.where(live & (curve > 0), energy / np.where(curve > 0, curve, 1.0), 0.0)[:, None]
        found = found + step * direction
        residual = residual - step * along
        ahead = residual / scale
        energy, before = (residual * ahead).sum(1), energy
        direction = ahead + np.where(before > 0, energy / np.where(before > 0, before, 1.0), 0.0)[:, None] * direction
    return found


# ---------------------------------------------------------------------------------------------- masks


def alternate(W: Array, H: Array, pattern: Pattern, keep: int, free: Array | None = None) -> Array:
    """Return the mask of `keep` units that operator splitting rests on; free[o, d]: False must be zero.

    Not better than rounding where H is diagonal: then it is `scores`'s mask.
    """
    R, scale = standardised(H)
    values, Q = scipy.linalg.eigh(R)
    V = W * scale
    right = V @ R
    allowed = np.ones(W.shape, bool) if free is None else free
    D, U, rho = np.where(allowed, V, 0.0), np.zeros(W.shape), 0.1 * float(R.diagonal().mean())
    mask = pattern.mask(np.square(D), keep) & allowed
    total = max(int(mask.sum()), 1)
    before = mask
    for index in range(1, ROUNDS + 1):
        proximal = ((right + rho * D - U) @ Q / (values + rho)) @ Q.T
        target = np.where(allowed, proximal + U / rho, 0.0)
        mask = pattern.mask(np.square(target), keep) & allowed
        D = np.where(mask, target, 0.0)
        U = U + rho * (proximal - D)
        if index % REST == 0:
            changed = int((mask != before).sum()) // 2
            if not changed and index > 3 * REST:
                break
            rho *= 1.3 if changed >= 0.1 * total else 1.2 if changed >= 0.005 * total else 1.1
            before = mask
    return mask


def remove(W: Array, H: Array, keep: int, free: Array | None = None) -> Array:
    """Return the mask of `keep` weights left by optimal brain surgery, the cheapest weight of any row first.

    o d^3 operations (see `effort`).
    """
    U = levels.factor(_damped(H))
    inverse = U.T @ U
    o, d = W.shape
    order, cost = np.zeros((o, d), np.int64), np.full((o, d), np.inf)
    for row in range(o):
        held = np.ones(d, bool) if free is None else free[row]
        order[row], cost[row] = _eliminate(W[row], inverse, held)
    # A row's weights go in its order: what goes later counts at least as much as all before it.
    price = np.maximum.accumulate(cost, axis=1)
    gone = np.argsort(price.ravel(), kind="stable")[: o * d - keep]
    mask = np.ones((o, d), bool)
    mask[gone // d, order.ravel()[gone]] = False
    return mask


def effort(shape: tuple[int, int]) -> float:
    """Return about how many operations `remove` takes."""
    return float(shape[0]) * float(shape[1]) ** 3


def _eliminate(w: Array, inverse: Array, free: Array) -> tuple[Array, Array]:
    """Return the order in which a row's weights go, and what each costs when it goes."""
    d = len(w)
    order, cost = np.zeros(d, np.int64), np.zeros(d)
    names = np.arange(d)
    A, w = np.asfortranarray(inverse), w.astype(np.float64).copy()
    alive = np.ones(d, bool)
    first = np.flatnonzero(~free)
    for step in range(d):
        diagonal = A.diagonal()
        if step < len(first):
            p = int(np.flatnonzero(names == first[step])[0])
        else:
            score = np.where(alive, np.square(w) / np.where(alive, diagonal, 1.0), np.inf)
            p = int(score.argmin())
        column = _column(A, p)
        pivot = column[p]
        order[step], cost[step] = names[p], 0.0 if step < len(first) else float(w[p] ** 2 / pivot)
        w -= w[p] / pivot * column
        A = scipy.linalg.blas.dsyr(-1.0 / pivot, column, a=A, lower=1, overwrite_a=1)
        w[p], alive[p] = 0.0, False
        left = int(alive.sum())
        if 0 < left < FACTOR * len(w):
            at = np.flatnonzero(alive)
            full = np.tril(A) + np.tril(A, -1).T
            A, w, names = np.asfortranarray(full[np.ix_(at, at)]), w[at], names[at]
            alive = np.ones(left, bool)
    return order, cost


def _column(A: Array, p: int) -> Array:
    """Return a column of a symmetric matrix whose lower triangle is kept."""
    return np.concatenate([A[p, :p], A[p:, p]])


def sweep(W: Array, H: Array, pattern: Pattern, share: float, free: Array | None = None) -> Array:
    """Return the mask that a sweep over the columns keeps: `share` of each block of them, or n of every m.

    What a removed weight misses is made up for by the columns that follow. Patterns of single weights only.
    """
    U = levels.factor(_damped(H))
    left, mask = W.astype(np.float64).copy(), np.ones(W.shape, bool)
    allowed = mask if free is None else free
    width = BLOCK if pattern.several is None else max(BLOCK // pattern.several[1], 1) * pattern.several[1]
    for begin in range(0, W.shape[1], width):
        end = min(begin + width, W.shape[1])
        pivots = U.diagonal()[begin:end]
        score = np.where(allowed[:, begin:end], np.square(left[:, begin:end] / pivots), -1.0)
        part = single(score.shape, pattern.several)
        mask[:, begin:end] = part.mask(score, round(share * score.size)) & allowed[:, begin:end]
        errors = np.zeros(score.shape)
        for j in range(begin, end):
            errors[:, j - begin] = np.where(mask[:, j], 0.0, left[:, j]) / U[j, j]
            left[:, j + 1 : end] -= np.outer(errors[:, j - begin], U[j, j + 1 : end])
        left[:, end:] -= errors @ U[begin:end, end:]
    return mask


def _damped(H: Array) -> Array:
    """Return H with a floor under its diagonal, so that dead inputs go first and for nothing."""
    mean = float(H.diagonal().mean()) or 1.0
    floored: Array = H + 1e-6 * mean * np.eye(len(H))
    return floored
