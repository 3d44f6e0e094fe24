"""Weights that may take few values, fitted in the metric of the inputs: error feedback, descent, and the best levels.

minimise  L = tr( (What - W) H (What - W)^T ),   What[o, d] = parameters[place[o, d]] * factor[o, d].

`Coded` takes its values from tables of free levels: a code per weight names one, and the levels are the parameters.
`Scaled` takes them from one pattern (integers, {-1, 1}, powers of two) times a scale: the scales are the parameters.
A table, or a scale, is shared by the whole matrix, by a row, or by a block of columns of a row. The moves:

* feedback: column by column each weight takes its nearest value, and what that misses is made up for by the columns
  that follow, W[:, j+1:] -= e_j U[j, j+1:] / U[j, j], U upper with H^-1 = U^T U (GPTQ, Frantar et al. 2022,
  arXiv:2210.17323; one weight at a time it is optimal brain quantisation, arXiv:2208.11580);
* descend: with all others as they are L is a parabola in each weight, whose best value is the nearest one to its
  vertex; columns in turn, all rows at once. L never rises (rounding by coordinate descent on the quadratic);
* settle: with the codes as they are L is quadratic in the parameters: conjugate gradients. L never rises.

A weight may be held at zero (`mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[Any]
S = TypeVar("S", bound="Structure")

BLOCK = 128  # columns whose feedback is spread at once
SWEEPS = 6  # most sweeps of descent
ROUNDS = 8  # most steps of conjugate gradients
DAMPING = 1e-6  # of the mean diagonal, added for the factor that error feedback needs
PROGRESS = 5e-3  # the share of the loss that a sweep must still gain
EXACT = 2.0**-10  # what rounding to float16 may move a number, of the largest it stands with


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure:
    """A matrix of few values. table[o, d] or broadcastable: which table or scale; code[o, d]; mask: False is zero."""

    table: Array
    code: Array
    mask: Array | None = None

    @property
    def parameters(self) -> Array:
        """Return what `settle` may move, flat."""
        raise NotImplementedError

    def moved(self, parameters: Array) -> Self:
        """Return the structure with other parameters."""
        raise NotImplementedError

    def may_be(self, parameters: Array) -> Array:
        """Return which parameters may become these, all unless a structure knows better; the others stay."""
        return np.ones(parameters.shape, bool)

    @property
    def place(self) -> Array:
        """Return which parameter each entry is a multiple of."""
        raise NotImplementedError

    @property
    def factor(self) -> Array:
        """Return what multiple."""
        raise NotImplementedError

    def pick(self, wanted: Array, j: int) -> Array:
        """Return the best code for wanted[o] in column j."""
        raise NotImplementedError

    def level(self, code: Array, j: int) -> Array:
        """Return the values of code[o] in column j, masked."""
        raise NotImplementedError

    def coded(self, code: Array) -> Self:
        """Return the structure with other codes."""
        return replace(self, code=code)

    def held(self, values: Array, mask: Array | None) -> Array:
        """Return values, zero where the mask says so."""
        return values if mask is None else np.where(mask, values, 0.0)

    @property
    def values(self) -> Array:
        """Return What[o, d]."""
        found: Array = self.held(self.parameters[self.place] * self.factor, self.mask)
        return found

    def column(self, array: Array, j: int) -> Array:
        """Return column j of a table index or mask that may be one row or one column."""
        found: Array = array[:, j if array.shape[1] > 1 else 0]
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Coded(Structure):
    """Values from tables[t, k] of ascending levels, padded with +inf."""

    tables: Array

    @property
    def parameters(self) -> Array:
        """Return the levels."""
        return np.where(np.isfinite(self.tables), self.tables, 0.0).ravel()

    def may_be(self, parameters: Array) -> Array:
        """Return where a level is there and is not 0, which it would stay."""
        free: Array = np.isfinite(self.tables) & (self.tables != 0)
        return free.ravel()

    def moved(self, parameters: Array) -> Self:
        """Return other levels, ascending again; a level that was 0 is 0."""
        free = self.may_be(parameters).reshape(self.tables.shape)
        return self.with_tables(np.where(free, parameters.reshape(self.tables.shape), self.tables))

    def with_tables(self, tables: Array) -> Self:
        """Return the same codes into other levels, sorted."""
        order = np.argsort(tables, axis=1, kind="stable")
        rank = np.argsort(order, axis=1, kind="stable")
        code = rank[self.table, self.code].astype(np.int32)
        return replace(self, tables=np.take_along_axis(tables, order, 1), code=code)

    @property
    def place(self) -> Array:
        """Return the level of each entry."""
        found: Array = self.table.astype(np.int64) * self.tables.shape[1] + self.code
        return found

    @property
    def factor(self) -> Array:
        """Return 1."""
        return np.ones((1, 1))

    def level(self, code: Array, j: int) -> Array:
        """Return the levels of codes."""
        found = self.tables[self.column(self.table, j), code]
        return self.held(found, None if self.mask is None else self.mask[:, j])

    def pick(self, wanted: Array, j: int) -> Array:
        """Return the nearest level, of two as near the lower."""
        rows = self.column(self.table, j)
        middles = (self.tables[:, 1:] + self.tables[:, :-1]) / 2
        if len(self.tables) == 1:
            return np.searchsorted(middles[0], wanted, side="left")
        nearest: Array = (wanted[:, None] > middles[rows]).sum(1)
        return nearest


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaled(Structure):
    """Values pattern[k] * scale[t], the pattern ascending; with `fixed` the scales stay as they are."""

    pattern: Array
    scale: Array
    fixed: bool = False

    @property
    def parameters(self) -> Array:
        """Return the scales."""
        return self.scale

    def may_be(self, parameters: Array) -> Array:
        """Return where scales are positive; nowhere where they are fixed."""
        return (parameters > 0) & (not self.fixed)

    def moved(self, parameters: Array) -> Self:
        """Return other scales where they may be that."""
        return replace(self, scale=np.where(self.may_be(parameters), parameters, self.scale))

    @property
    def place(self) -> Array:
        """Return the scale of each entry."""
        return np.broadcast_to(self.table, self.code.shape)

    @property
    def factor(self) -> Array:
        """Return the pattern's entries."""
        found: Array = self.pattern[self.code]
        return found

    @property
    def is_uniform(self) -> bool:
        """Return whether the pattern's steps are equal."""
        steps = np.diff(self.pattern)
        return len(steps) > 0 and bool((steps == steps[0]).all())

    def level(self, code: Array, j: int) -> Array:
        """Return the values of codes."""
        found = self.pattern[code] * self.scale[self.column(self.table, j)]
        return self.held(found, None if self.mask is None else self.mask[:, j])

    def pick(self, wanted: Array, j: int) -> Array:
        """Return the nearest value's code, of two as near the lower."""
        scale = self.scale[self.column(self.table, j)]
        return self.nearest(wanted / np.where(scale > 0, scale, 1.0))

    def nearest(self, relative: Array) -> Array:
        """Return the codes of the pattern's entries nearest to values of any shape in units of the scale."""
        if self.is_uniform:
            steps = (relative - self.pattern[0]) / (self.pattern[1] - self.pattern[0])
            rounded: Array = np.clip(np.ceil(steps - 0.5), 0, len(self.pattern) - 1).astype(np.int32)
            return rounded
        return np.searchsorted((self.pattern[1:] + self.pattern[:-1]) / 2, relative, side="left")


def loss(W: Array, H: Array | None, What: Array) -> float:
    """Return tr((What - W) H (What - W)^T); H None is the identity.

    >>> loss(np.array([[1.0, 2.0]]), np.diag([1.0, 3.0]), np.array([[1.0, 1.0]]))
    3.0
    """
    E = What - W
    return float((E * E).sum() if H is None else ((E @ H) * E).sum())


def factor(H: Array) -> Array:
    """Return upper U[d, d] with H^-1 = U^T U. Raises LinAlgError unless H is positive definite."""
    lower = scipy.linalg.cholesky(H[::-1, ::-1], lower=True)
    inverse, info = scipy.linalg.lapack.dtrtri(lower, lower=1)
    if info:
        raise np.linalg.LinAlgError("the metric is singular")
    upper: Array = inverse[::-1, ::-1]
    return upper


def round_to(part: S, W: Array, _: Array | None = None) -> S:
    """Return the codes of the values that are nearest to W[o, d]."""
    return part.coded(np.stack([part.pick(W[:, j], j) for j in range(W.shape[1])], 1).astype(np.int32))


def feedback(part: S, W: Array, H: Array | None, order: Array | None = None) -> S:
    """Return the codes that error feedback finds; columns by falling H_jj unless `order`[d] says how.

    With H diagonal, or none, that is rounding. Of the results with and without feedback the better is returned.
    """
    plain = round_to(part, W)
    if H is None:
        return plain
    order = np.argsort(-H.diagonal(), kind="stable") if order is None else order
    U = factor(positive(H)[np.ix_(order, order)])
    left, code = W[:, order].copy(), np.empty(W.shape, np.int32)
    for begin in range(0, W.shape[1], BLOCK):
        end = min(begin + BLOCK, W.shape[1])
        errors = np.empty((len(W), end - begin))
        for j in range(begin, end):
            at = int(order[j])
            code[:, at] = part.pick(left[:, j], at)
            errors[:, j - begin] = (left[:, j] - part.level(code[:, at], at)) / U[j, j]
            left[:, j + 1 : end] -= np.outer(errors[:, j - begin], U[j, j + 1 : end])
        left[:, end:] -= errors @ U[begin:end, end:]
    found = part.coded(code)
    return found if loss(W, H, found.values) <= loss(W, H, plain.values) else plain


def positive(H: Array) -> Array:
    """Return H with what makes it positive: DAMPING times its mean diagonal, and that mean where an input is dead."""
    mean = float(H.diagonal().mean()) or 1.0
    positive: Array = H + np.diag(np.where(H.diagonal() > 0, DAMPING * mean, mean))
    return positive


def descend(part: S, W: Array, H: Array | None, sweeps: int = SWEEPS) -> S:
    """Return codes that no change of a single weight can better, or as far as `sweeps` over the columns lead."""
    if H is None:
        return round_to(part, W)
    code, What, diagonal = part.code.copy(), part.values, H.diagonal()
    now = loss(W, H, part.values)
    for _ in range(sweeps):
        gradient, moved = (What - W) @ H, False
        for begin in range(0, W.shape[1], BLOCK):
            end = min(begin + BLOCK, W.shape[1])
            local, steps = gradient[:, begin:end].copy(), np.zeros((len(W), end - begin))
            for j in range(begin, end):
                if diagonal[j] <= 0:
                    continue
                code[:, j] = part.pick(What[:, j] - local[:, j - begin] / diagonal[j], j)
                step = part.level(code[:, j], j) - What[:, j]
                if step.any():
                    What[:, j] += step
                    local += np.outer(step, H[j, begin:end])
                    steps[:, j - begin] = step
            if steps.any():
                gradient += steps @ H[begin:end]
                moved = True
        before, now = now, loss(W, H, part.coded(code).values)
        if not moved or before - now <= PROGRESS * before:
            break
    return part.coded(code)


def settle(parts: Sequence[S], W: Sequence[Array], H: Sequence[Array | None], rounds: int = ROUNDS) -> list[S]:
    """Return the parameters that lose least with the codes as they are.

    parts: of matrices W[p][o, d] with their metrics, that share one array of parameters; what none of them uses stays.
    """
    system = [_Equations(part, each, metric) for part, each, metric in zip(parts, W, H, strict=True)]
    start = parts[0].parameters
    free = (np.sum([one.weight() for one in system], axis=0) > 0) & parts[0].may_be(start)
    while True:  # what would have to go where it may not stays, and the others are found again without it
        found = _conjugate(system, start, free, rounds)
        held = free & ~parts[0].may_be(found)
        if not held.any():
            return [part.moved(found) for part in parts]
        free = free & ~held


def _conjugate(system: Sequence[_Equations], start: Array, free: Array, rounds: int) -> Array:
    """Return the parameters after some steps of conjugate gradients from `start`, those moved that are free."""

    def total(each: Sequence[Array]) -> Array:
        return np.where(free, np.sum(each, axis=0), 0.0)

    found, safe = start, np.where(free, np.sum([one.weight() for one in system], axis=0), 1.0)
    residual = total([one.residual(found) for one in system])
    ahead = residual / safe
    direction, energy = ahead.copy(), float(residual @ ahead)
    least = 1e-14 * energy
    for _ in range(rounds):
        along = total([one.product(direction) for one in system])
        curve = float(direction @ along)
        if energy <= least or curve <= 0:
            break
        found = found + energy / curve * direction
        residual = residual - energy / curve * along
        ahead = residual / safe
        energy, before = float(residual @ ahead), energy
        direction = ahead + energy / before * direction
    return found


class _Equations:
    """One matrix's share of the normal equations of the parameters."""

    def __init__(self, part: Structure, W: Array, H: Array | None) -> None:
        self.W, self.H, self.count = W, H, len(part.parameters)
        self.place = part.place.ravel()
        self.factor: Array = np.broadcast_to(part.held(part.factor, part.mask), W.shape)

    def _gathered(self, E: Array) -> Array:
        return np.bincount(self.place, (E * self.factor).ravel(), self.count)

    def _spread(self, parameters: Array) -> Array:
        found: Array = parameters[self.place].reshape(self.W.shape) * self.factor
        return found

    def weight(self) -> Array:
        """Return the diagonal of the equations, near enough to condition them."""
        ones = np.ones(self.W.shape) if self.H is None else np.broadcast_to(self.H.diagonal(), self.W.shape)
        return self._gathered(ones * self.factor)

    def residual(self, parameters: Array) -> Array:
        """Return the right side less the equations at these parameters."""
        return self._gathered(_times(self.W - self._spread(parameters), self.H))

    def product(self, parameters: Array) -> Array:
        """Return the equations' matrix times parameters."""
        return self._gathered(_times(self._spread(parameters), self.H))


def _times(E: Array, H: Array | None) -> Array:
    return E if H is None else E @ H


def half(array: Array, largest: Array | float) -> Array:
    """Return an array rounded to float16, where that is as exact as it should be beside `largest`."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = array.astype(np.float16).astype(np.float64)
        close = np.abs(rounded - array) <= EXACT * largest
    return np.where(close & np.isfinite(rounded), rounded, array)
