"""One thin reader for all taps: the fit that spatial and Tucker splits share.

The columns of a weight are pairs (n, t): what is read, and a tap that comes after it. The reader B maps n to r:

    What[o, n, t] = sum_r G[o, r, t] B[r, n],        and G[o, r, t] = sum_s A[o, s] core[s, r, t]  with an output rank.

A spatial split has n = (c, i) and t = j, a Tucker split n = c and t = (i, j). Without data and output rank the optimum
is the SVD of W[n, (o, t)]; with an output rank, HOOI from the HOSVD. With the Gram matrix H of the inputs: given B, the
best A and core are closed form (regression on z = B x, then weighted.py's truncation); given those, B descends by
conjugate gradients, preconditioned by (sum_t G_t^T G_t) kron (mean_t H_tt), and every sweep lowers the loss.

Source: De Lathauwer et al. 2000 (HOOI); Zhang et al. 2015, arXiv:1505.06798 (with data); Kim et al. 2015,
arXiv:1511.06530 (Tucker-2 of a convolution).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import svd, weighted
from ccompile.numerics.alternating import alternate, descend, kronecker
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]

SWEEPS, STEPS, TOLERANCE = 15, 5, 2e-3
HOOI_TOLERANCE = 1e-4
# The reader moves beyond its optimum given the other factors, towards where they let it go next: any factor below 2
# lowers the loss, this one halves the sweeps that real spectra take (successive over-relaxation).
RELAXATION = 1.5


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """What[o, n, t] = sum_s A[o, s] core[s, r, t] B[r, n]; A is None where o = s. B has orthonormal rows."""

    A: Array | None
    core: Array
    B: Array

    def compose(self) -> Array:
        """Return What[o, n, t]."""
        inner = np.tensordot(self.core, self.B, (1, 0)).transpose(0, 2, 1)
        return inner if self.A is None else np.tensordot(self.A, inner, 1)


def fit(
    W: Array,
    H: Array | None,
    rank: int,
    output_rank: int | None = None,
    sweeps: int = SWEEPS,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> Bottleneck:
    """Return the reader of W[o, n, t] at this rank, with H[n t, n t] of its inputs or without data.

    The loss is never above that of the factors without data. `sweeps`, `steps`: most alternations, and conjugate
    gradients in each; stops once a sweep lowers the loss by less than `tolerance` of it. Raises ValueError where shapes
    do not fit, an entry is not finite, or a rank is not in 1 .. its most: min(n, output_rank t), min(o, rank t).
    """
    o, n, t = W.shape
    outputs = o if output_rank is None else output_rank
    weighted.check_rank(rank, min(n, outputs * t))
    if output_rank is not None:
        weighted.check_rank(output_rank, min(o, rank * t), "output rank")
    flat, H = weighted.checked(W, H)
    W = flat.reshape(o, n, t)
    plain = _data_free(W, rank, output_rank, sweeps)
    if H is None:
        return plain
    problem = Problem(W, H, output_rank)
    states = [problem.solve(B) for B in (plain.B, problem.start(rank))]
    best = min(states, key=lambda state: state.loss)
    return alternate(best, lambda state: problem.sweep(state, steps), lambda s: s.loss, sweeps, tolerance).factors


def _data_free(W: Array, rank: int, output_rank: int | None, sweeps: int) -> Bottleneck:
    B = leading(W.transpose(1, 0, 2), rank).T
    if output_rank is None:
        return Bottleneck(None, read(W, B), B)
    start = _rotated(W, B, output_rank)
    energy = float(np.square(W).sum())

    def sweep(state: Bottleneck) -> Bottleneck:
        inner = np.tensordot(state.A, W, (0, 0)) if state.A is not None else W
        return _rotated(W, leading(inner.transpose(1, 0, 2), rank).T, output_rank)

    return alternate(start, sweep, lambda state: energy - float(np.square(state.core).sum()), sweeps, HOOI_TOLERANCE)


def _rotated(W: Array, B: Array, output_rank: int) -> Bottleneck:
    """Return the best A and core for an orthonormal B."""
    inner = read(W, B)
    A = leading(inner, output_rank)
    return Bottleneck(A, np.tensordot(A, inner, (0, 0)), B)


def read(W: Array, B: Array) -> Array:
    """Return sum_n W[o, n, t] B[r, n] as [o, r, t]."""
    return np.ascontiguousarray(np.tensordot(W, B, (1, 1)).transpose(0, 2, 1))


def leading(tensor: Array, rank: int) -> Array:
    """Return the `rank` leading left singular vectors of tensor[m, ...]."""
    flat: Array = tensor.reshape(len(tensor), -1)
    if flat.shape[1] > 2 * len(flat):
        flat = np.linalg.qr(flat.T)[1].T
    return svd.decompose(flat)[0][:, :rank]


@dataclass(frozen=True, eq=False)
class State:
    """Factors, what they lose, and what is left of the layer behind their reader: H[r t, r t] of z = B x."""

    factors: Bottleneck
    loss: float
    H: Array


class Problem:
    """The pieces of one layer that every step needs; `taps[t, n', t', n]` is H with its last tap in front."""

    def __init__(self, W: Array, H: Array, output_rank: int | None) -> None:
        (self.o, self.n, self.t), self.output_rank = W.shape, output_rank
        self.W, self.H = W, H
        tensor = H.reshape(self.n, self.t, self.n, self.t)
        self.taps = np.ascontiguousarray(tensor.transpose(3, 0, 1, 2))
        self.mean = np.ascontiguousarray(np.trace(tensor, axis1=1, axis2=3)) / self.t
        self.WH = (W.reshape(self.o, -1) @ H).reshape(W.shape)
        self.power = float(np.vdot(self.WH, W))

    def start(self, rank: int) -> Array:
        """Return the best reader if taps were uncorrelated and alike."""
        stacked = self.W.transpose(0, 2, 1).reshape(-1, self.n)
        return leading(weighted.decompose(stacked, self.mean)[2][:rank].T, rank).T

    def whole(self) -> State:
        """Return the layer as it is: the reader reads all."""
        return State(Bottleneck(None, self.W, np.eye(self.n)), 0.0, self.H)

    def solve(self, B: Array) -> State:
        """Return the best factors that share the reader B[r, n]."""
        r, t = len(B), self.t
        H = np.concatenate([(B @ self.taps[tap].reshape(self.n, -1)).reshape(-1, self.n) @ B.T for tap in range(t)], 1)
        H = H.reshape(r, t, t, r).transpose(0, 1, 3, 2).reshape(r * t, r * t)
        H, C = (H + H.T) / 2, read(self.WH, B).reshape(self.o, -1)
        G = refit(H, C, read(self.W, B).reshape(self.o, -1), 0.0).W
        if self.output_rank is None:
            return State(Bottleneck(None, G.reshape(self.o, r, t), B), self._loss(G, H, C), H)
        A, _, core = weighted.decompose(G, H)
        A, core = A[:, : self.output_rank], core[: self.output_rank]
        loss = self._loss(core, H, A.T @ C)
        return State(Bottleneck(A, core.reshape(-1, r, t), B), loss, H)

    def sweep(self, state: State, steps: int) -> State:
        """Improve the reader with the other factors fixed, then those."""
        A, core, B = state.factors.A, state.factors.core, state.factors.B
        K = np.tensordot(core, core, (0, 0))
        WH = self.WH if A is None else np.tensordot(A, self.WH, (0, 0))
        rhs = np.tensordot(core, WH, ((0, 2), (0, 2)))

        def normal(F: Array) -> Array:
            total = np.zeros_like(F)
            for tap in range(self.t):
                read = (F @ self.taps[tap].reshape(self.n, -1)).reshape(-1, self.n)
                total += K[:, tap].reshape(len(F), -1) @ read
            return total

        precondition = kronecker(np.trace(K, axis1=1, axis2=3), self.mean)
        B = B + RELAXATION * (descend(normal, rhs, B, steps, precondition=precondition) - B)
        return self.solve(np.linalg.qr(B.T)[0].T)

    def _loss(self, core: Array, H: Array, C: Array) -> float:
        """Return the loss from what the reader leaves: |W|^2 - 2 <core, C> + <core H, core>, in small matrices."""
        return max(self.power - float(np.vdot(2 * C - core @ H, core)), 0.0)
