"""What every pair of ranks of a bottleneck loses, from one chain of fits.

The chain goes down the input ranks r: the reader B of a rank starts as the best truncation of the one before, descends
for a few sweeps as in bottleneck.py, and leaves a small layer G[o, (r, t)] on z = B x with the Gram matrix H_z. Since G
is the regression on z, the rest of the loss is orthogonal,

    loss(r, s) <= loss(r) + sum of the discarded s^2 of G in the metric H_z       for every output rank s at once,

which is mostly within a tenth of what a full fit loses (further where both lose little) and ranks pairs as that does;
a pair of interest is fitted from there.
For the same reason the chain of a wide layer goes on inside z once a rank is at most a quarter of what is read: what is
left is the layer G with H_z, far smaller. Without data readers are nested (HOSVD), and no sweep is needed.

Source: De Lathauwer et al. 2000 (truncated HOSVD); Vannieuwenhoven et al. 2012 (sequential truncation); Zhang et al.
2015, arXiv:1505.06798 (with data).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import bottleneck, weighted
from ccompile.numerics.alternating import alternate
from ccompile.numerics.bottleneck import Bottleneck, Problem, leading, read

Array = npt.NDArray[Any]

SWEEPS, STEPS = 1, 3  # of each rank; the one before leaves little to do
REFINED = 2  # sweeps of a pair
WIDE = 64  # above, the chain goes on inside what it reads
SMALL = 24  # up to here a grid has all ranks
RATIO = 0.86  # and above, each is this share of the one before


def grid(most: int) -> list[int]:
    """Return input ranks from `most` to 1: all small ones, above geometric.

    >>> grid(3), grid(64)[:6]
    ([3, 2, 1], [64, 55, 47, 40, 34, 29])
    """
    ranks = [most]
    while ranks[-1] > 1:
        last = ranks[-1]
        ranks.append(last - 1 if last <= SMALL else max(round(RATIO * last), SMALL))
    return ranks


@dataclass(frozen=True, eq=False)
class _Link:
    """The reader of one rank, in a layer that loses `base` less than the whole one does; tails by output rank."""

    problem: Problem
    base: float
    B: Array
    tails: Array

    def refined(self, output_rank: int | None) -> float:
        problem = copy.copy(self.problem)
        problem.output_rank = output_rank
        start = problem.solve(self.B)
        found = alternate(start, lambda s: problem.sweep(s, STEPS), lambda s: s.loss, REFINED, bottleneck.TOLERANCE)
        return self.base + found.loss


@dataclass(frozen=True, eq=False)
class Chain:
    """What the ranks of a layer W[o, n, t] lose: `losses`[len(ranks), o + 1] at each input rank and output rank 0 .. o.

    An output rank above what the input rank can use loses what the greatest of use does.
    """

    W: Array
    ranks: tuple[int, ...]
    losses: Array
    links: tuple[_Link, ...]  # one a rank; none without data

    def refined(self, rank: int, output_rank: int | None) -> float:
        """Return what a pair loses once its factors have been fitted for some sweeps; `rank` is of the chain.

        None: the output side stays as it is.
        """
        index = self.ranks.index(rank)
        bound = float(self.losses[index, -1 if output_rank is None else output_rank])
        if self.links:
            return min(bound, self.links[index].refined(output_rank))
        found = bottleneck.fit(self.W, None, rank, output_rank, REFINED)
        return min(bound, weighted.loss(None, self.W, found.compose()))


def chain(W: Array, H: Array | None, ranks: Sequence[int]) -> Chain:
    """Return the losses of W[o, n, t] at these descending input ranks, with H[n t, n t] of the inputs or without data.

    Raises ValueError where shapes do not fit, an entry is not finite, or ranks do not descend from n at most to 1.

    >>> chain(np.ones((2, 3, 1)), None, [2, 1]).losses.round(9).tolist()
    [[6.0, 0.0, 0.0], [6.0, 0.0, 0.0]]
    """
    o, n, t = W.shape
    if list(ranks) != sorted(set(ranks), reverse=True) or not ranks or ranks[0] > n or ranks[-1] < 1:
        raise ValueError(f"ranks {list(ranks)} must descend within {n} .. 1")
    flat, H = weighted.checked(W, H)
    W = flat.reshape(o, n, t)
    links = [] if H is None else _links(Problem(W, H, None), ranks)
    rows = np.stack([link.base + link.tails for link in links]) if links else _plain(W, ranks)
    lowest = np.minimum.accumulate(rows[::-1])[::-1]  # what a rank can do, a greater one can
    return Chain(W, tuple(ranks), lowest, tuple(links))


def _plain(W: Array, ranks: Sequence[int]) -> Array:
    energy = float(np.square(W).sum())
    basis = leading(W.transpose(1, 0, 2), ranks[0]).T
    cores = [read(W, basis[:rank]) for rank in ranks]
    return np.stack([energy - float(np.square(core).sum()) + _tails(core, None) for core in cores]).clip(0)


def _links(problem: Problem, ranks: Sequence[int]) -> list[_Link]:
    base, state, found = 0.0, problem.whole(), []
    for rank in ranks:
        if problem.n > WIDE and 4 * rank <= problem.n and len(state.factors.B) < problem.n:
            base += state.loss
            problem = Problem(state.factors.core, state.H, None)
            state = problem.whole()
        if rank < problem.n:
            state = problem.solve(_truncated(problem, state.factors, rank))
            for _ in range(SWEEPS):
                state = min(state, problem.sweep(state, STEPS), key=lambda s: s.loss)
        tails = state.loss + _tails(state.factors.core, state.H)
        found.append(_Link(problem, base, state.factors.B, tails))
    return found


def _truncated(problem: Problem, factors: Bottleneck, rank: int) -> Array:
    """Return the reader of a smaller rank within the one of these factors, best if taps were uncorrelated and alike."""
    core, B = factors.core, factors.B
    stacked = core.transpose(0, 2, 1).reshape(-1, len(B))
    return leading((weighted.decompose(stacked, B @ problem.mean @ B.T)[2][:rank] @ B).T, rank).T


def _tails(core: Array, H: Array | None) -> Array:
    """Return what the spectrum of core[o, r, t] has from each output rank 0 .. o on."""
    squares = np.square(weighted.spectrum(core.reshape(len(core), -1), H))
    tail = np.zeros(len(core) + 1)
    tail[: len(squares)] = np.cumsum(squares[::-1])[::-1]
    return tail
