"""Structured Optimal Brain Surgeon: which units to drop so that the repaired layers lose the least output.

In the current, already repaired W and the inverse of the kept block of H, one more unit u costs

    tr( W_u ([H^-1]_uu)^-1 W_u^T ),    then    W -= W_u ([H^-1]_uu)^-1 [H^-1]_u: ,    H^-1 likewise,

summed over all consumers of the group (see consumers.py for the loss). Everything is float64 and deterministic; equal
scores go to the lower unit.

Source: LeCun et al. 1990 (OBD); Hassibi and Stork 1993 (OBS); Frantar et al. 2022, arXiv:2208.11580 (block update);
Kurtic et al. 2023, arXiv:2302.04089 (structured).
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
    readers_of,
    reduced,
    repair,
    repaired_columns,
    subset_loss,
    subtract_product,
    traces,
    unit_count,
)
from ccompile.numerics.swaps import Swaps, swap_search

__all__ = ["Consumer", "Swaps", "Trace", "remove_units", "repair", "subset_loss", "swap_search"]

Array = npt.NDArray[Any]

# Columns of pending removals before the big inverse is updated: wide enough for level-3 BLAS, narrow for the panel.
PANEL_COLUMNS = 192
# The inverse is formed anew when its largest diagonal entry fell by this factor (its rounding errors did not fall).
REFRESH_FALL = 1e-4


@dataclass(frozen=True, eq=False)
class Trace:
    """The order in which units go: `order[k]`, and `loss[k]`, the summed loss once order[: k + 1] are gone.

    `units` is the number of units in the group, `ridge` the relative ridge that each consumer really got.
    """

    order: Array
    loss: Array
    units: int
    ridge: tuple[float, ...]

    def keep(self, count: int) -> Array:
        """Return the `count` units that stay, ascending; raises ValueError when the trace does not reach that far."""
        removed = self.units - count
        if not 0 <= removed <= len(self.order):
            raise ValueError(f"the trace removes up to {len(self.order)} of {self.units} units; cannot keep {count}")
        return np.setdiff1d(np.arange(self.units), self.order[:removed])


def remove_units(consumers: Sequence[Consumer], ridge: float = 0.01, limit: int | None = None) -> Trace:
    """Remove units one by one, each time the one whose loss after the best repair is least; up to `limit` (all).

    Cost: for one consumer with n units of b columns, d = n b: about 2 d^3 multiply-adds in level-3 BLAS plus n o d b.

    >>> trace = remove_units([Consumer(np.array([[3.0, 1.0, 2.0]]), np.eye(3), np.arange(3))], ridge=0.0)
    >>> trace.order.tolist(), trace.loss.tolist()
    ([1, 2, 0], [1.0, 5.0, 14.0])
    """
    ready = [reduced(consumer, ridge) for consumer in consumers]
    systems = [system for system, _ in ready]
    n = unit_count(consumers)
    limit = n if limit is None else min(limit, n)
    scores, owner, parts = flat_scores(systems)
    states = [_Elimination(*both, part) for both, part in zip(ready, parts, strict=True)]
    del ready
    readers = readers_of(systems, n)
    order, losses, alive = np.zeros(limit, np.int64), np.zeros(limit), np.ones(n, bool)
    for step in range(limit):
        total = np.bincount(owner, weights=scores, minlength=n)
        unit = int(np.argmin(np.where(alive, total, np.inf)))
        order[step], alive[unit] = unit, False
        losses[step] = sum(states[index].remove(position) for index, position in readers[unit])
    return Trace(order, np.cumsum(losses), n, tuple(system.ridge for system in systems))


def traced(task: tuple[Sequence[Consumer], int]) -> Trace:
    """Return the trace of (consumers, limit) with the ridge that the consumers' H carry already."""
    consumers, limit = task
    return remove_units(consumers, 0.0, limit)


class _Elimination:
    """One reduced consumer while its units go: a block Cholesky factorisation of H^-1 with pivots chosen from outside.

    `inverse` lags behind by the pending columns `panel`: the current inverse is inverse - panel panel^T. Its diagonal
    blocks `D`, the repaired weight `Wt[a b, o]` and `score` are always current.
    """

    def __init__(self, system: System, inverse: Array, score: Array) -> None:
        self.system, self.score = system, score
        self.alive = np.ones(len(system.units), bool)
        self.blocks: Array
        self.D: Array
        self.Wt: Array
        self.inverse: Array
        self.panel: Array
        self.used = 0
        self.width = max(1, PANEL_COLUMNS // system.b) * system.b
        self._start(inverse, system.W)

    def remove(self, position: int) -> float:
        """Remove the block at `position`, update the others' scores and return the weighted loss."""
        from scipy.linalg import solve_triangular

        b, row = self.system.b, int(np.searchsorted(self.blocks, position))
        here = slice(row * b, (row + 1) * b)
        column = self.inverse[here].T - self.panel[:, : self.used] @ self.panel[here, : self.used].T
        factor = np.linalg.cholesky(self.D[row])
        column = solve_triangular(factor, column.T, lower=True).T
        part = solve_triangular(factor, self.Wt[here], lower=True)
        self.panel[:, self.used : self.used + b] = column
        self.used += b
        self.alive[position], self.score[position] = False, 0.0
        subtract_product(self.Wt, column, part.T)
        blocks = column.reshape(-1, b, b)
        self.D -= blocks @ blocks.transpose(0, 2, 1)
        self.D[row], self.Wt[here] = np.eye(b), 0.0
        self._tidy()
        return self.system.weight * float(np.square(part).sum())

    def _tidy(self) -> None:
        live = self.alive[self.blocks]
        if not live.any():
            return
        largest = float(self.D[live].diagonal(axis1=1, axis2=2).max())
        if largest < REFRESH_FALL * self.largest or 2 * np.count_nonzero(live) <= self.loaded:
            self._load()
            return
        if self.used == self.width:
            self._flush(live)
        self._rate()

    def _flush(self, live: Array) -> None:
        """Bring `inverse` up to date and drop the rows of removed blocks."""
        rows = np.flatnonzero(np.repeat(live, self.system.b))
        panel = self.panel[rows, : self.used]
        self.inverse = self.inverse[np.ix_(rows, rows)]
        subtract_product(self.inverse, panel, panel)
        self.blocks, self.D, self.Wt = self.blocks[live], self.D[live], self.Wt[rows]
        self.panel, self.used = np.zeros((len(rows), self.width)), 0

    def _load(self) -> None:
        """Start from H itself at the blocks that are alive: no rounding of earlier updates stays."""
        system = self.system
        kept, gone = system.split(system.units[self.alive])
        inverse = invert(system.H[np.ix_(kept, kept)])
        self._start(inverse, repaired_columns(system, kept, gone, inverse))

    def _start(self, inverse: Array, W: Array) -> None:
        """Go on from the inverse and the repaired weight over the blocks that are alive."""
        self.blocks = np.flatnonzero(self.alive)
        self.loaded = len(self.blocks)
        self.Wt, self.inverse = np.array(W.T, order="C"), inverse
        self.D = diagonal_blocks(self.inverse, self.system.b).copy()
        self.largest = float(self.D.diagonal(axis1=1, axis2=2).max(initial=0.0))
        self.panel, self.used = np.zeros((len(inverse), self.width)), 0
        self._rate()

    def _rate(self) -> None:
        if len(self.blocks):
            blocks = self.Wt.reshape(len(self.blocks), self.system.b, -1)
            self.score[self.blocks] = self.system.weight * traces(self.D, blocks)
