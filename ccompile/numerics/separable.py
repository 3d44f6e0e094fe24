"""Network decoupling: a convolution as a sum of depthwise-separable ones.

    depthwise first:   What[o, c, t] = sum_m P[o, c, m] D[m, c, t]        (m kernels per input channel, then 1 x 1)

t = (i, j) are the taps. Without data each channel is on its own: D and P are the SVD of W[:, c, :], exact at
m = min(o, kh kw). With the Gram matrix of the inputs, P given D is an exact regression on z[c, m] = sum_t D[m, c, t]
x[c, t], and D given P descends by conjugate gradients, preconditioned channel by channel.
Parameters: m (c kh kw + o c).

Source: Guo et al. 2018, arXiv:1808.05517 (network decoupling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import weighted
from ccompile.numerics.alternating import RIDGE, Operator, alternate, descend
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]

SWEEPS, STEPS, TOLERANCE = 15, 5, 2e-3
RELAXATION = 1.5  # as in bottleneck.py


@dataclass(frozen=True, eq=False)
class Separable:
    """`D`[m, c, kh, kw], the depthwise kernels (orthonormal for each channel), and `P`[o, c, m], what mixes them.

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    P: Array
    D: Array
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return mix(self.P, self.D.reshape(*self.D.shape[:2], -1)).reshape(len(self.P), *self.D.shape[1:])

    def kernels(self) -> tuple[Array, Array]:
        """Return the convolutions' weights: [c m, 1, kh, kw] in c groups, and [o, c m, 1, 1]."""
        m, c, kh, kw = self.D.shape
        return self.D.transpose(1, 0, 2, 3).reshape(c * m, 1, kh, kw), self.P.reshape(-1, c * m, 1, 1)


def fit(W: Array, H: Array | None, terms: int, sweeps: int = SWEEPS, steps: int = STEPS) -> Separable:
    """Return the sum of `terms` depthwise-separable convolutions next to W[o, c, kh, kw], with H[d, d] or without data.

    With data the loss is never above that of the sum without. Raises ValueError where shapes do not fit, an entry is
    not finite, or `terms` is not in 1 .. `terms_max`.

    >>> found = fit(np.ones((2, 3, 3, 3)), None, 1)
    >>> found.error < 1e-12, [kernel.shape for kernel in found.kernels()]
    (True, [(3, 1, 3, 3), (2, 3, 1, 1)])
    """
    _, H = weighted.checked(W, H)
    weighted.check_rank(terms, terms_max(W.shape), "terms")
    taps = W.reshape(*W.shape[:2], -1).astype(np.float64)
    D = _signed(np.linalg.svd(taps.transpose(1, 0, 2), full_matrices=False)[2][:, :terms]).transpose(1, 0, 2)
    P = mixture(taps, None, D)
    if H is not None:
        problem = Problem(taps, H)
        start = min(problem.solve(D), problem.solve(problem.start(terms)), key=lambda state: state.loss)
        state = alternate(start, lambda state: problem.sweep(state, steps), lambda s: s.loss, sweeps, TOLERANCE)
        P, D = state.P, state.D
    What = mix(P, D).reshape(W.shape)
    D = np.ascontiguousarray(D).reshape(terms, *W.shape[1:])
    return Separable(P, D, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def terms_max(shape: tuple[int, ...]) -> int:
    """Return the number of terms at which the sum for a weight [o, c, kh, kw] is exact.

    >>> terms_max((64, 32, 3, 3)), terms_max((4, 32, 3, 3))
    (9, 4)
    """
    o, _, kh, kw = shape
    return min(o, kh * kw)


def parameters(shape: tuple[int, ...], terms: int) -> tuple[int, int]:
    """Return how many weights the depthwise and the 1 x 1 convolution have.

    >>> parameters((64, 32, 3, 3), 2)
    (576, 4096)
    """
    o, c, kh, kw = shape
    return terms * c * kh * kw, terms * o * c


def mix(P: Array, D: Array) -> Array:
    """Return sum_m P[o, c, m] D[m, c, t] as [o, c, t].

    >>> mix(np.ones((1, 1, 2)), np.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[[4.0, 6.0]]]
    """
    return np.ascontiguousarray((P.transpose(1, 0, 2) @ D.transpose(1, 0, 2)).transpose(1, 0, 2))


def mixture(W: Array, H: Array | None, D: Array) -> Array:
    """Return the P[o, c, m] of least loss for W[o, c, t] and kernels D[m, c, t]; exact, never worse than without data.

    >>> mixture(np.array([[[2.0, 4.0]]]), None, np.array([[[1.0, 2.0]]])).round(9).tolist()
    [[[2.0]]]
    """
    kernels = D.transpose(1, 0, 2)
    free = np.ascontiguousarray((W.transpose(1, 0, 2) @ np.linalg.pinv(kernels)).transpose(1, 0, 2))
    if H is None:
        return free
    o, c, m = free.shape
    half = kernels @ H.reshape(c, -1, len(H))
    reduced = half.reshape(c * m, c, -1).transpose(1, 0, 2) @ kernels.transpose(0, 2, 1)
    reduced = reduced.transpose(1, 0, 2).reshape(c * m, c * m)
    cross = W.reshape(o, -1) @ half.reshape(c * m, -1).T
    return refit((reduced + reduced.T) / 2, cross, free.reshape(o, -1), 0.0).W.reshape(free.shape)


@dataclass(frozen=True, eq=False)
class State:
    """Kernels D[m, c, t], what mixes them, P[o, c, m], and the loss."""

    P: Array
    D: Array
    loss: float


class Problem:
    """The pieces of one layer that every step needs."""

    def __init__(self, W: Array, H: Array) -> None:
        self.o, self.c, self.t = W.shape
        self.W, self.H = W, H
        self.WH = (W.reshape(self.o, -1) @ H).reshape(W.shape).transpose(1, 0, 2)
        index = np.arange(self.c)
        self.blocks = H.reshape(self.c, self.t, self.c, self.t)[index, :, index]

    def start(self, terms: int) -> Array:
        """Return the best kernels if channels were uncorrelated."""
        best = [weighted.truncate(self.W[:, c], self.blocks[c], terms)[1] for c in range(self.c)]
        return np.linalg.qr(np.stack(best).transpose(0, 2, 1))[0].transpose(2, 0, 1)

    def solve(self, D: Array) -> State:
        """Return the best P for these kernels."""
        P = mixture(self.W, self.H, D)
        return State(P, D, weighted.loss(self.H, self.W, mix(P, D)))

    def sweep(self, state: State, steps: int) -> State:
        """Improve the kernels with P fixed, then P. Here kernels are [c, m, t]."""
        normal, rhs, precondition = self.equations(state.P)
        D = state.D.transpose(1, 0, 2)
        D = D + RELAXATION * (descend(normal, rhs, D, steps, precondition=precondition) - D)
        return self.solve(np.linalg.qr(D.transpose(0, 2, 1))[0].transpose(2, 0, 1))

    def equations(self, P: Array) -> tuple[Operator, Array, Operator]:
        """Return what N and b are for the kernels [c, m, t] with P fixed, as alternating.py says, and about N^-1."""
        c, m, t = self.c, P.shape[2], self.t
        flat = P.reshape(self.o, -1)
        Q = (flat.T @ flat).reshape(c, m, c * m)
        rows = self.H.reshape(c, t, -1)

        def normal(F: Array) -> Array:
            read = (F @ rows).reshape(c * m, c, t)
            moved: Array = Q @ read.transpose(1, 0, 2)
            return moved

        own = Q.reshape(c, m, c, m)[np.arange(c), :, np.arange(c)]
        return normal, P.transpose(1, 2, 0) @ self.WH, _by_channel(own, self.blocks)


def _by_channel(left: Array, right: Array) -> Operator:
    """Return what applies the inverse of left[c, m, m] kron right[c, t, t] to F[c, m, t], with a small ridge."""
    first, second = _inverses(left), _inverses(right)
    return lambda F: first @ F @ second


def _inverses(matrices: Array) -> Array:
    scale = np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1]
    scale = np.where(scale > 0, scale, 1.0)[:, None, None]
    values, vectors = np.linalg.eigh(matrices / scale)
    inverses: Array = (vectors / np.maximum(values, RIDGE)[:, None]) @ vectors.transpose(0, 2, 1) / scale
    return inverses


def _signed(V: Array) -> Array:
    """Return V[c, m, t] with the entry of largest magnitude of each row positive."""
    largest = np.take_along_axis(V, np.abs(V).argmax(2)[..., None], 2)
    return np.asarray(V * np.where(largest < 0, -1.0, 1.0))
