"""Product quantisation in the metric of the inputs: blocks of a row's columns share a few vectors.

minimise  sum_p tr( (What_p - W_p) H_p (What_p - W_p)^T ),   What[o, j v : (j + 1) v] = table[code[o, j]]

over matrices p that share one table[k, v]. Vectors start as k-means of the blocks, each block's error counted in its
own v x v block of H. Codes come from error feedback, block by block: with H^-1 = U^T U, U upper, a block's error e is
made up for by W[:, later] -= e U_jj^-1 U[j, later], and the vector taken is the one of least |e U_jj^-1|. Then table
and codes are bettered in turn: the table solves its normal equations (levels.settle), and each code takes the vector
nearest to its block's optimum with all others as they are; neither step raises the loss.

Source: Jegou et al. 2011 (product quantisation); Wu et al. 2016, arXiv:1512.06473 (fitted to responses); Stock et al.
2020, arXiv:1907.05686; van Baalen et al. 2024, arXiv:2402.15319 (feedback by blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ccompile.numerics import levels
from ccompile.numerics.levels import Structure

Array = npt.NDArray[Any]

LLOYD, ROUNDS, SWEEPS = 20, 4, 3  # most steps of k-means, turns of table and codes, and sweeps over the codes in a turn
PROGRESS = 5e-3  # the share of the loss that a step must still gain
SAMPLES = 16_384  # blocks that the first vectors are drawn from


@dataclass(frozen=True, eq=False, kw_only=True)
class Vectors(Structure):
    """Blocks of v columns from vectors[k, v]; code[o, d / v]."""

    vectors: Array

    @property
    def parameters(self) -> Array:
        """Return the vectors' entries."""
        return self.vectors.ravel()

    def moved(self, parameters: Array) -> Vectors:
        """Return the same codes into other vectors."""
        return Vectors(table=self.table, code=self.code, vectors=parameters.reshape(self.vectors.shape))

    @property
    def place(self) -> Array:
        """Return the entry of the table that each entry of the matrix is."""
        v = self.vectors.shape[1]
        cells = self.code[:, :, None].astype(np.int64) * v + np.arange(v)
        found: Array = cells.reshape(len(self.code), -1)
        return found

    @property
    def factor(self) -> Array:
        """Return 1."""
        return np.ones((1, 1))


def fit(
    W: Sequence[Array], H: Sequence[Array | None], k: int, v: int, rough: bool = False, seed: int = 0
) -> list[Vectors]:
    """Return each matrix W[p][o, d] coded into at most k vectors of v columns; H[p][d, d] or None.

    rough: from the start and feedback alone, for a curve. Vectors are rounded to float16 where that is as exact as
    they should be beside the largest. Raises ValueError unless k >= 1 and v divides d.

    >>> part, = fit([np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 2.0]])], [None], 2, 2)
    >>> part.values.tolist()
    [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 2.0]]
    """
    if k < 1 or any(each.shape[1] % v for each in W):
        raise ValueError(f"{k} vectors of {v}: there must be one, and rows must fall into blocks of {v}")
    blocks = [_Blocks(each, metric, v) for each, metric in zip(W, H, strict=True)]
    table = _start(blocks, k, np.random.default_rng(seed))
    best = [_feedback(block, table) for block in blocks]
    least = lost(best, W, H)
    for _ in range(0 if rough else ROUNDS):
        trial = [_descended(block, part) for block, part in zip(blocks, levels.settle(best, W, H), strict=True)]
        now = lost(trial, W, H)
        if now >= least:
            break
        gained, best, least = least - now, trial, now
        if gained <= PROGRESS * now:
            break
    rounded = [part.moved(levels.half(part.parameters, np.abs(part.parameters).max(initial=0.0))) for part in best]
    return [_descended(block, part) for block, part in zip(blocks, rounded, strict=True)]


def lost(parts: Sequence[Vectors], W: Sequence[Array], H: Sequence[Array | None]) -> float:
    """Return the summed loss."""
    return sum(levels.loss(each, metric, part.values) for part, each, metric in zip(parts, W, H, strict=True))


class _Blocks:
    """One matrix in blocks of columns: X[b, o, v], and the metric M[b, v, v] of each block."""

    def __init__(self, W: Array, H: Array | None, v: int) -> None:
        self.W, self.H, self.v, self.count = W, H, v, W.shape[1] // v
        self.X = W.reshape(len(W), self.count, v).transpose(1, 0, 2)
        self.M = np.broadcast_to(np.eye(v), (self.count, v, v))
        if H is not None:
            at = np.arange(self.count)
            own = H.reshape(self.count, v, self.count, v)[at, :, at]
            tiny = np.maximum(levels.DAMPING * np.trace(own, axis1=1, axis2=2) / v, np.finfo(float).tiny)
            self.M = own + tiny[:, None, None] * np.eye(v)


def _nearest(x: Array, M: Array, table: Array) -> Array:
    """Return for each row of x[o, v] the vector of least (x - c) M (x - c)^T, of equals the first."""
    turned = table @ M
    found: Array = ((turned * table).sum(1) - 2 * x @ turned.T).argmin(1)
    return found


def _start(blocks: Sequence[_Blocks], k: int, rng: np.random.Generator) -> Array:
    """Return k-means of all blocks, each in its own metric."""
    table = _seeds(blocks, k, rng)
    before = np.inf
    for _ in range(LLOYD):
        now, table = _lloyd(blocks, table)
        if before - now <= PROGRESS * now:
            break
        before = now
    return table


def _seeds(blocks: Sequence[_Blocks], k: int, rng: np.random.Generator) -> Array:
    """Return vectors drawn in turn, each with a chance that goes with its error so far (k-means++)."""
    X = np.concatenate([block.X.reshape(-1, block.v) for block in blocks])
    cost = np.concatenate([np.repeat(np.trace(block.M, axis1=1, axis2=2), len(block.W)) for block in blocks])
    if len(X) > SAMPLES:
        some = np.sort(rng.choice(len(X), SAMPLES, replace=False))
        X, cost = X[some], cost[some]
    found = [X[int(np.argmax(cost * np.square(X).sum(1)))]]
    distance = np.full(len(X), np.inf)
    while len(found) < k:
        distance = np.minimum(distance, np.square(X - found[-1]).sum(1))
        chance = np.cumsum(cost * distance)
        if chance[-1] <= 0:
            break  # fewer distinct blocks than vectors
        found.append(X[int(np.searchsorted(chance, rng.random() * chance[-1], side="right"))])
    return np.array(found)


def _lloyd(blocks: Sequence[_Blocks], table: Array) -> tuple[float, Array]:
    """Return what the nearest vectors lose, and the best vectors for these cells; an empty cell's stays."""
    k, v = table.shape
    mass, pull, total = np.zeros((k, v, v)), np.zeros((k, v)), 0.0
    for block in blocks:
        for x, M in zip(block.X, block.M, strict=True):
            code = _nearest(x, M, table)
            E = x - table[code]
            total += float(((E @ M) * E).sum())
            mass += np.bincount(code, minlength=k)[:, None, None] * M
            np.add.at(pull, code, x @ M)
    used = np.flatnonzero(np.trace(mass, axis1=1, axis2=2) > 0)
    moved = table.copy()
    moved[used] = np.linalg.solve(mass[used], pull[used][:, :, None])[:, :, 0]
    return total, moved


def _feedback(block: _Blocks, table: Array) -> Vectors:
    """Return the codes that error feedback finds, or those of the nearest vectors where they lose less."""
    plain = _coded(np.stack([_nearest(x, M, table) for x, M in zip(block.X, block.M, strict=True)], 1), table)
    if block.H is None:
        return plain
    v, left = block.v, block.W.copy()
    order = np.argsort(-np.trace(block.M, axis1=1, axis2=2), kind="stable")
    columns = (order[:, None] * v + np.arange(v)).ravel()
    U = levels.factor(levels.positive(block.H)[np.ix_(columns, columns)])
    left, code = left[:, columns], np.empty(plain.code.shape, np.int32)
    for turn, at in enumerate(order):
        begin, end = turn * v, (turn + 1) * v
        inverse = scipy.linalg.solve_triangular(U[begin:end, begin:end], np.eye(v))
        x = left[:, begin:end]
        code[:, at] = _nearest(x, inverse @ inverse.T, table)
        left[:, end:] -= (x - table[code[:, at]]) @ inverse @ U[begin:end, end:]
    found = _coded(code, table)
    return min((found, plain), key=lambda part: levels.loss(block.W, block.H, part.values))


def _descended(block: _Blocks, part: Vectors) -> Vectors:
    """Return codes that no change of a single block can better, or as far as SWEEPS lead."""
    table, code = part.vectors, part.code.copy()
    if block.H is None:
        return _coded(np.stack([_nearest(x, M, table) for x, M in zip(block.X, block.M, strict=True)], 1), table)
    v, inverse, What = block.v, np.linalg.inv(block.M), part.values
    now = levels.loss(block.W, block.H, What)
    for _ in range(SWEEPS):
        gradient = (What - block.W) @ block.H
        for at in range(block.count):
            own = slice(at * v, (at + 1) * v)
            wanted = What[:, own] - gradient[:, own] @ inverse[at]
            code[:, at] = _nearest(wanted, block.M[at], table)
            step = table[code[:, at]] - What[:, own]
            if step.any():
                What[:, own] += step
                gradient += step @ block.H[own]
        before, now = now, levels.loss(block.W, block.H, What)
        if before - now <= PROGRESS * before:
            break
    return _coded(code, table)


def _coded(code: Array, table: Array) -> Vectors:
    return Vectors(table=np.zeros((1, 1), np.int64), code=code.astype(np.int32), vectors=table)
