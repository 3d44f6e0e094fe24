"""Exchange kept with removed units while the loss of the repaired layers falls (see consumers.py for the loss).

Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR, local search); Goodnight 1979 (the sweep operator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics.consumers import (
    Consumer,
    System,
    diagonal_blocks,
    flat_scores,
    invert,
    loss_of,
    prepare,
    readers_of,
    repaired_columns,
    subtract_product,
    traces,
    unit_count,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Swaps:
    """A kept set (ascending), its exact loss, and how many swaps led to it."""

    keep: Array
    loss: float
    swaps: int


def swap_search(
    consumers: Sequence[Consumer],
    keep: Array,
    max_swaps: int = 50,
    candidates: int = 16,
    ridge: float = 0.01,
    fixed: Sequence[int] = (),
) -> Swaps:
    """Exchange a kept with a removed unit while the exact loss falls; the result is never worse than `keep`.

    Kept units among `fixed` stay.

    Each swap tries the `candidates` removed units that would help most, each against every kept unit, and takes the
    best pair. Bounded: `max_swaps` swaps, each `candidates` scorings (o d b) and two d x d updates of rank b.
    Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR, local search); the sweep operator: Goodnight 1979.
    """
    systems = [prepare(consumer, ridge) for consumer in consumers]
    n = unit_count(consumers)
    kept = np.isin(np.arange(n), keep)
    start = sum(loss_of(system, np.flatnonzero(kept)) for system in systems)
    search = _Search(systems, kept.copy(), np.isin(np.arange(n), fixed))
    loss, swaps = start, 0
    while swaps < max_swaps:
        change, unit_in, unit_out = search.best_swap(candidates)
        if not change < -1e-12 * max(loss, 1e-300):
            break
        search.toggle(unit_in)
        search.toggle(unit_out)
        loss, swaps = loss + change, swaps + 1
    found = np.flatnonzero(search.kept)
    loss = float(sum(loss_of(system, found) for system in systems))
    # The updates of the search carry rounding; the exact losses decide.
    return Swaps(found, loss, swaps) if loss <= start else Swaps(np.flatnonzero(kept), float(start), 0)


class _Sweep:
    """One consumer in swept form, which can both drop and take back units.

    M = [[-K, K H_kr], [H_rk K, H_rr - H_rk K H_kr]] with K = (H_kk)^-1, over kept k and removed r;
    Yt holds the repaired weight at kept columns and the covariance of the residual with x at removed ones.
    """

    def __init__(self, system: System, kept: Array) -> None:
        self.system = system
        keep, gone = system.split(np.flatnonzero(kept))
        inverse = invert(system.H[np.ix_(keep, keep)])
        cross = inverse @ system.H[np.ix_(keep, gone)]
        schur = system.H[np.ix_(gone, gone)] - system.H[np.ix_(gone, keep)] @ cross
        full = np.zeros_like(system.H)
        full[np.ix_(keep, keep)], full[np.ix_(gone, gone)] = -inverse, schur
        full[np.ix_(keep, gone)], full[np.ix_(gone, keep)] = cross, cross.T
        Y = np.zeros_like(system.W)
        Y[:, keep], Y[:, gone] = repaired_columns(system, keep, gone, inverse), system.W[:, gone] @ schur
        size = len(system.units) * system.b
        self.M, self.Yt = full[:size, :size].copy(), np.ascontiguousarray(Y[:, :size].T)
        self.kept = kept[system.units]

    def _here(self, position: int) -> slice:
        return slice(position * self.system.b, (position + 1) * self.system.b)

    def rate(self) -> Array:
        """Return per block what dropping it costs (kept) or what taking it back gains (removed)."""
        D = diagonal_blocks(self.M, self.system.b)
        return self._rate(np.where(self.kept[:, None, None], -D, D), self.Yt)

    def rate_after(self, position: int) -> Array:
        """Return what dropping each kept block would cost once the removed block at `position` were back."""
        b, here = self.system.b, self._here(position)
        column = np.ascontiguousarray(self.M[here].T)
        move = np.linalg.solve(self.M[here, here], column.T).T
        Yt = self.Yt - move @ self.Yt[here]
        D = move.reshape(-1, b, b) @ column.reshape(-1, b, b).transpose(0, 2, 1) - diagonal_blocks(self.M, b)
        # Nobody asks about removed blocks, and the one taken back has nothing left there.
        return self._rate(np.where(self.kept[:, None, None], D, np.eye(b)), Yt)

    def _rate(self, D: Array, Yt: Array) -> Array:
        return self.system.weight * traces(D, Yt.reshape(len(D), self.system.b, -1))

    def toggle(self, position: int) -> None:
        """Take the block back if it is removed, drop it if it is kept."""
        here = self._here(position)
        sign = -1.0 if self.kept[position] else 1.0
        column, rows, pivot = self.M[here].T.copy(), self.Yt[here].copy(), self.M[here, here].copy()
        move = np.linalg.solve(pivot, column.T).T
        subtract_product(self.M, move, column)
        subtract_product(self.Yt, move, rows.T)
        self.M[:, here], self.M[here] = sign * move, sign * move.T
        self.M[here, here] = -np.linalg.inv(pivot)
        self.Yt[here] = sign * np.linalg.solve(pivot, rows)
        self.kept[position] = not self.kept[position]


class _Search:
    """All consumers of a group in swept form."""

    def __init__(self, systems: Sequence[System], kept: Array, fixed: Array) -> None:
        self.kept, self.fixed = kept, fixed
        self.scores, self.owner, self.parts = flat_scores(systems)
        self.readers = readers_of(systems, len(kept))
        self.sweeps = [_Sweep(system, kept) for system in systems]
        self._rate(range(len(systems)))

    def _rate(self, indices: Sequence[int]) -> None:
        for index in indices:
            self.parts[index][:] = self.sweeps[index].rate()

    def _totals(self) -> Array:
        totals: Array = np.bincount(self.owner, weights=self.scores, minlength=len(self.kept))
        return totals

    def best_swap(self, candidates: int) -> tuple[float, int, int]:
        """Return the change of loss, the unit to take back and the unit to drop; no change when there is no pair."""
        gains, best = self._totals(), (0.0, -1, -1)
        removed = np.flatnonzero(~self.kept)
        for unit in removed[np.argsort(-gains[removed], kind="stable")[:candidates]].tolist():
            saved = self.scores.copy()
            for index, position in self.readers[unit]:
                self.parts[index][:] = self.sweeps[index].rate_after(position)
            costs = np.where(self.kept & ~self.fixed, self._totals(), np.inf)
            self.scores[:] = saved
            out = int(np.argmin(costs))
            best = min(best, (float(costs[out] - gains[unit]), unit, out))
        return best

    def toggle(self, unit: int) -> None:
        """Move one unit to the other side."""
        for index, position in self.readers[unit]:
            self.sweeps[index].toggle(position)
        self.kept[unit] = not self.kept[unit]
        self._rate([index for index, _ in self.readers[unit]])
