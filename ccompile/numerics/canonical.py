"""Sums of rank-one terms in the metric of a layer's inputs: what cp.py fits with.

A tensor W[o, n1, .., nk] meets factors (a[o, r], f1[r, n1], .., fk[r, nk]):  What[o, ...] = sum_r a[o, r] T[r, ...],
T[r] the outer product of the f[r]. With H[d, d], d = n1 .. nk (None: the identity), a given T is a regression on T x; a
short f given the others is a regression too, its normal matrix (a^T a) * (R H R^T) built from the products R of the
others; a long one descends by conjugate gradients. `shrink` does the same under a price on the terms' squared norms.

Source: Kolda and Bader 2009, doi:10.1137/07070111X; Phan et al. 2020, arXiv:2008.05441 (bounded norms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import svd, weighted
from ccompile.numerics.alternating import alternate, descend, kronecker
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]
Factors = tuple[Array, ...]

# A factor of at most so many entries is solved for exactly.
EXACT_SIZE = 1500
# Directions of the algebraic start weaker than this are left to the sweeps: its terms would be huge and cancel.
ILL_CONDITIONED = 1e-3
# How far beyond each sweep the next point is tried, as a multiple of the sweep's move.
JUMP = 3.0
# What keeps a regression near the factor it starts from, relative: similar terms make it nearly singular.
NEAR = 1e-9


@dataclass(frozen=True, eq=False)
class State:
    """Factors, all but the first of unit norm, and their loss."""

    factors: Factors
    loss: float


def rows(factors: Sequence[Array]) -> Array:
    """Return T[r, n1 .. nk], the flattened outer products of factors f[r, n].

    >>> rows([np.array([[1.0, 2.0]]), np.array([[3.0, 5.0]])]).tolist()
    [[3.0, 5.0, 6.0, 10.0]]
    """
    T = factors[0]
    for factor in factors[1:]:
        T = (T[:, :, None] * factor[:, None]).reshape(len(T), -1)
    return T


def balanced(factors: Factors) -> Factors:
    """Return the same terms with |a_r| = |f1_r| and the others of norm 1, largest entry positive.

    >>> [factor.tolist() for factor in balanced((np.array([[8.0]]), np.array([[2.0]]), np.array([[-1.0]])))]
    [[[-4.0]], [[4.0]], [[1.0]]]
    """
    a, *others = factors
    scale, units = np.linalg.norm(a, axis=0), []
    a = a / np.where(scale > 0, scale, 1.0)
    for factor in others:
        norms = np.linalg.norm(factor, axis=1)
        scale = scale * norms
        signs = np.sign(np.take_along_axis(factor, np.abs(factor).argmax(1)[:, None], 1))[:, 0]
        a = a * np.where(signs < 0, -1.0, 1.0)
        units.append(factor * (np.where(signs < 0, -1.0, 1.0) / np.where(norms > 0, norms, 1.0))[:, None])
    root = np.sqrt(scale)
    return a * root, units[0] * root[:, None], *units[1:]


def random(shape: Sequence[int], rank: int, seed: int) -> Factors:
    """Return Gaussian factors for a tensor of this shape.

    >>> [factor.shape for factor in random((4, 3, 2), 5, 0)]
    [(4, 5), (5, 3), (5, 2)]
    """
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((shape[0], rank) if not n else (rank, shape[n])) for n in range(len(shape)))


def fibres(W: Array) -> Factors:
    """Return the factors of W[o, n1, ..] with a term for each of its fibres along the longest mode: exact.

    >>> W = np.arange(12.0).reshape(2, 3, 2)
    >>> a, *others = fibres(W)
    >>> a.shape, bool(np.allclose((a @ rows(others)).reshape(W.shape), W))
    ((2, 4), True)
    """
    longest = int(np.argmax(W.shape))
    shape = [n for mode, n in enumerate(W.shape) if mode != longest]
    index = iter(np.unravel_index(np.arange(int(np.prod(shape))), shape))
    along = np.moveaxis(W, longest, -1).reshape(-1, W.shape[longest]).astype(np.float64)
    a, *others = (along if mode == longest else np.eye(n)[next(index)] for mode, n in enumerate(W.shape))
    return np.ascontiguousarray(a.T), *others


def algebraic(W: Array, rank: int) -> Factors:
    """Return factors of W[o, n1, ..] by diagonalising two slices at once: exact where W has this rank <= min(o, n1).

    The slices are the two principal combinations over the modes after n1. Terms beyond min(o, n1) are random.
    """
    o, c, *taps = W.shape
    cube = W.reshape(o, c, -1)
    core = min(rank, o, c)
    left = _leading(cube.reshape(o, -1), core)
    right = _leading(cube.transpose(1, 0, 2).reshape(c, -1), core)
    weights = _leading(cube.reshape(o * c, -1).T, 2)
    slices = np.einsum("op,oct,cq,tk->kpq", left, cube, right, weights, optimize=True)
    if len(slices) > 1:
        values, vectors = np.linalg.eig(slices[1] @ np.linalg.pinv(slices[0]))
        left = left @ np.where(values.imag < 0, vectors.imag, vectors.real)
    read = np.tensordot(np.linalg.pinv(left, rcond=ILL_CONDITIONED), cube, 1)
    factors = [left, *_outer_parts(read.reshape(core, c, *taps))]
    filling = random(W.shape, rank, 0)
    return tuple(
        np.concatenate([found, extra[:, core:] if not n else extra[core:]], 0 if n else 1)
        for n, (found, extra) in enumerate(zip(factors, filling, strict=True))
    )


def _outer_parts(T: Array) -> list[Array]:
    """Return f[r, n] for each mode of T[r, n1, ..]: nearly the best outer product, of unit norms."""
    parts, rest = [], T
    while rest.ndim > 2:
        U, s, V = np.linalg.svd(rest.reshape(*rest.shape[:2], -1), full_matrices=False)
        parts.append(U[:, :, 0])
        rest = (s[:, :1] * V[:, 0]).reshape(len(T), *rest.shape[2:])
    return [*parts, rest]


def _leading(matrix: Array, count: int) -> Array:
    if matrix.shape[1] > 2 * len(matrix):
        matrix = np.linalg.qr(matrix.T)[1].T
    return svd.decompose(matrix)[0][:, :count]


class Problem:
    """One tensor and its metric: improve factors, sweep by sweep."""

    def __init__(self, W: Array, H: Array | None, steps: int) -> None:
        self.shape, self.H, self.steps = W.shape, H, steps
        self.W = W.reshape(len(W), -1)
        self.WH = weighted.times(self.W, H)
        self.energy = float(np.vdot(self.WH, self.W))

    def run(self, start: State, sweeps: int, tolerance: float) -> State:
        """Return the best state on the way; see `alternating.alternate`."""
        return alternate(start, self.sweep, lambda state: state.loss, sweeps, tolerance)

    def solve(self, factors: Factors) -> State:
        """Return the factors normalised, with the best a for the others."""
        a, *others = factors
        norms = [np.linalg.norm(factor, axis=1) for factor in others]
        units = [f / np.where(norm > 0, norm, 1.0)[:, None] for f, norm in zip(others, norms, strict=True)]
        T = rows(units)
        gram, cross = self.against(T)
        a = refit(gram, cross, a * np.prod(norms, 0), NEAR).W
        return State((a, *units), weighted.loss(self.H, self.W, a @ T))

    def against(self, T: Array) -> tuple[Array, Array]:
        """Return T H T^T and W H T^T."""
        gram = weighted.times(T, self.H) @ T.T
        return (gram + gram.T) / 2, self.WH @ T.T

    def sweep(self, state: State) -> State:
        """Improve every factor once, then try to go further the same way."""
        factors = state.factors
        for mode in range(1, len(factors)):
            factors = (*factors[:mode], self.improve(factors, mode, 0.0), *factors[mode + 1 :])
        found = self.solve(factors)
        others = zip(found.factors[1:], state.factors[1:], strict=True)
        further = self.solve((found.factors[0], *(now + JUMP * (now - before) for now, before in others)))
        return min(found, further, key=lambda state: state.loss)

    def improve(self, factors: Factors, mode: int, price: float) -> Array:
        """Return a better f[r, n] of this mode for loss + price |f|^2, the others fixed."""
        a, factor = factors[0], factors[mode]
        rest = [f for n, f in enumerate(factors) if n not in (0, mode)]
        pairs = a.T @ a
        rhs = self._contract(a.T @ self.WH, factors, mode)
        others = rows(rest) if rest else np.ones((len(factor), 1))
        alike = pairs * (others @ others.T)
        if self.H is None:
            return refit(alike + price * np.eye(len(alike)), rhs.T, factor.T, NEAR).W.T
        if factor.size <= EXACT_SIZE:
            N = self._normal_matrix(others, pairs, mode) + price * np.eye(factor.size)
            return refit(N, rhs.reshape(1, -1), factor.reshape(1, -1), NEAR).W.reshape(factor.shape)

        def normal(F: Array) -> Array:
            T = rows((*factors[1:mode], F, *factors[mode + 1 :]))
            return self._contract(pairs @ (T @ self.H), factors, mode) + price * F

        precondition = kronecker(alike + price * np.eye(len(alike)), self._mean(mode))
        return descend(normal, rhs, factor, self.steps, precondition=precondition)

    def _contract(self, Y: Array, factors: Factors, mode: int) -> Array:
        """Return sum of Y[r, n1 .. nk] times the other factors, [r, n]."""
        modes = range(1, len(factors))
        operands: list[Any] = [Y.reshape(len(Y), *self.shape[1:]), [0, *modes]]
        for n in modes:
            if n != mode:
                operands += [factors[n], [0, n]]
        return np.ascontiguousarray(np.einsum(*operands, [0, mode], optimize=True))

    def _split(self, mode: int) -> Array:
        """Return a view of H as [before, n, after, before, n, after] for this mode."""
        before = int(np.prod(self.shape[1:mode]))
        sides = before, self.shape[mode], self.W.shape[1] // before // self.shape[mode]
        return np.asarray(self.H).reshape(*sides, *sides)

    def _mean(self, mode: int) -> Array:
        H = self._split(mode)
        mean: Array = np.einsum("aibajb->ij", H) / float(H.shape[0] * H.shape[2])
        return mean

    def _normal_matrix(self, others: Array, pairs: Array, mode: int) -> Array:
        """Return N[r n, r n] from the products others[r, rest] of the other factors."""
        H, r, n = self._split(mode), len(others), self.shape[mode]
        blocks = np.zeros((n, r, n, r))
        for i in range(n):
            for j in range(i + 1):
                part = others @ H[:, i, :, :, j].reshape(others.shape[1], -1) @ others.T
                blocks[i, :, j], blocks[j, :, i] = part, part.T
        blocks *= pairs[None, :, None]
        N: Array = blocks.transpose(1, 0, 3, 2).reshape(r * n, r * n)
        return N


class Correction(Problem):
    """Shrinks the terms of a fit that may lose a little more."""

    def shrink(self, factors: Factors, most: float, sweeps: int, tolerance: float) -> Factors:
        """Return factors of small sum_r |term r|^2 with a loss of at most `most`, which these factors must meet.

        The price of a squared norm in loss is that at which the least a meets `most` exactly; the other factors then
        move at that price, as far as the loss allows.
        """
        factors, size = self._normalised(factors), np.inf
        for _ in range(sweeps):
            a, price = self._least(factors, most)
            factors = (a, *factors[1:])
            now = float(np.square(a).sum())
            if now > size * (1 - tolerance):
                break
            size = now
            for mode in range(1, len(factors)):
                factors = self._moved(factors, mode, price, most)
        return (self._least(factors, most)[0], *factors[1:])

    def _normalised(self, factors: Factors) -> Factors:
        norms = np.prod([np.linalg.norm(factor, axis=1) for factor in factors[1:]], 0)
        units = (f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-300) for f in factors[1:])
        return factors[0] * norms, *units

    def _least(self, factors: Factors, most: float) -> tuple[Array, float]:
        """Return the a of least norm with a loss of at most `most`, and its Lagrange multiplier."""
        T = rows(factors[1:])
        gram, cross = self.against(T)
        values, vectors = np.linalg.eigh(gram)
        values, turned = np.maximum(values, 0.0), cross @ vectors
        size = np.square(turned).sum(0)

        def solution(price: float) -> Array:
            a: Array = (turned / (values + price)) @ vectors.T
            return a

        # loss(price) = energy - sum size (values + 2 price) / (values + price)^2 rises with the price
        low, high = 1e-14 * float(values.max()), 1e4 * float(values.max())
        if not low > 0:
            return factors[0], 0.0
        loss = weighted.loss(self.H, self.W, solution(low) @ T)
        base = loss + float((size * (values + 2 * low) / np.square(values + low)).sum())
        if loss > most:
            return factors[0], 0.0
        for _ in range(60):
            price = float(np.sqrt(low * high))
            lost = base - float((size * (values + 2 * price) / np.square(values + price)).sum())
            low, high = (price, high) if lost <= most else (low, price)
        a = solution(low)
        return (a, low) if weighted.loss(self.H, self.W, a @ T) <= most * (1 + 1e-9) else (factors[0], low)

    def _moved(self, factors: Factors, mode: int, price: float, most: float) -> Factors:
        """Return the factors with that of this mode moved towards its optimum at this price, loss <= `most` kept."""
        norms = np.linalg.norm(factors[0], axis=0)
        a = factors[0] / np.where(norms > 0, norms, 1.0)
        loaded = (a, *(f * norms[:, None] if n == mode else f for n, f in enumerate(factors) if n))
        move = self.improve(loaded, mode, price) - loaded[mode]
        for step in (1.0, 0.5, 0.25, 0.1):
            trial = (*loaded[:mode], loaded[mode] + step * move, *loaded[mode + 1 :])
            if weighted.loss(self.H, self.W, a @ rows(trial[1:])) <= most:
                return self._normalised(trial)
        return factors
