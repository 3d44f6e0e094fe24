"""A few kernels of rank one per input channel, mixed by a 1 x 1 convolution: Jaderberg's first scheme.

    What[o, c, i, j] = sum_m P[o, c, m] V[m, c, i] U[m, c, j]        (k x 1 with V, 1 x k with U, then 1 x 1 with P)

Every channel has a basis of its own, which all output channels share. Without data each channel is a canonical
decomposition of W[:, c] by alternating least squares; all products of unit vectors are exact. With the Gram matrix of
the inputs, P given the kernels is an exact regression, and V and U descend in turn by conjugate gradients on the
equations of separable.py. Parameters: m (c kh + c kw + o c).

Source: Jaderberg et al. 2014, arXiv:1405.3866, section 2 (scheme 1); Rigamonti et al. 2013 (CVPR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import weighted
from ccompile.numerics.alternating import alternate, descend
from ccompile.numerics.separable import Problem, mix, mixture

Array = npt.NDArray[Any]

SWEEPS, STEPS, TOLERANCE = 15, 5, 2e-3
FREE_SWEEPS, FREE_TOLERANCE = 200, 1e-6


@dataclass(frozen=True, eq=False)
class Basis:
    """`V`[m, c, kh] and `U`[m, c, kw] of the kernels, of unit length, and `P`[o, c, m], what mixes them.

    `loss` = tr((What - W) H (What - W)^T).
    """

    P: Array
    V: Array
    U: Array
    loss: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return mix(self.P, _kernels(self.V, self.U)).reshape(*self.P.shape[:2], self.V.shape[2], self.U.shape[2])

    def kernels(self) -> tuple[Array, Array, Array]:
        """Return the convolutions' weights: [c m, 1, kh, 1] in c groups, [c m, 1, 1, kw] in c m, and [o, c m, 1, 1]."""
        m, c, kh = self.V.shape
        first = self.V.transpose(1, 0, 2).reshape(c * m, 1, kh, 1)
        return first, self.U.transpose(1, 0, 2).reshape(c * m, 1, 1, -1), self.P.reshape(-1, c * m, 1, 1)


def fit(W: Array, H: Array | None, terms: int, sweeps: int = SWEEPS, steps: int = STEPS) -> Basis:
    """Return `terms` kernels of rank one per channel next to W[o, c, kh, kw], with H[d, d] or without data.

    With data the loss is never above that of the kernels without. Raises ValueError where shapes do not fit, an entry
    is not finite, or `terms` is not in 1 .. kh kw, at which it is exact.

    >>> found = fit(np.ones((2, 3, 3, 3)), None, 1)
    >>> found.loss < 1e-12, [kernel.shape for kernel in found.kernels()]
    (True, [(3, 1, 3, 1), (3, 1, 1, 3), (2, 3, 1, 1)])
    """
    _, H = weighted.checked(W, H)
    o, c, kh, kw = W.shape
    weighted.check_rank(terms, kh * kw, "terms")
    taps = W.reshape(o, c, -1).astype(np.float64)
    state = _State(*_free(taps.reshape(o, c, kh, kw), terms), taps, None)
    if H is not None:
        problem = Problem(taps, H)
        start = _State(state.V, state.U, taps, H)
        state = alternate(start, lambda s: _sweep(problem, s, steps), lambda s: s.loss, sweeps, TOLERANCE)
    return Basis(state.P, state.V, state.U, state.loss)


class _State:
    """Kernels, the best P for them, and what they lose."""

    def __init__(self, V: Array, U: Array, W: Array, H: Array | None) -> None:
        self.V, self.U = _unit(V), _unit(U)
        D = _kernels(self.V, self.U)
        self.W, self.H, self.P = W, H, mixture(W, H, D)
        self.loss = weighted.loss(H, W, mix(self.P, D))


def _sweep(problem: Problem, state: _State, steps: int) -> _State:
    """Improve V, then U, then P, each with the others fixed."""
    (m, c, kh), kw = state.V.shape, state.U.shape[2]
    normal, rhs, _ = problem.equations(state.P)
    V, U, target = state.V.transpose(1, 0, 2), state.U.transpose(1, 0, 2), rhs.reshape(c, m, kh, kw)

    def through(F: Array) -> Array:
        return normal(F.reshape(c, m, kh * kw)).reshape(c, m, kh, kw)

    def of_rows(F: Array) -> Array:
        return np.asarray(np.einsum("cmij,cmj->cmi", through(F[..., None] * U[:, :, None]), U))

    def of_columns(F: Array) -> Array:
        return np.asarray(np.einsum("cmij,cmi->cmj", through(V[..., None] * F[:, :, None]), V))

    V = descend(of_rows, np.einsum("cmij,cmj->cmi", target, U), V, steps)
    U = descend(of_columns, np.einsum("cmij,cmi->cmj", target, V), U, steps)
    return _State(V.transpose(1, 0, 2), U.transpose(1, 0, 2), state.W, state.H)


def _free(W: Array, terms: int) -> tuple[Array, Array]:
    """Return V[m, c, kh] and U[m, c, kw] for W[o, c, kh, kw] without data: each channel by itself."""
    _, c, kh, kw = W.shape
    if terms == kh * kw:
        rows, columns = np.divmod(np.arange(terms), kw)
        return tuple(np.repeat(np.eye(n)[at][:, None], c, 1) for n, at in ((kh, rows), (kw, columns)))  # type: ignore[return-value]
    tensors = W.transpose(1, 0, 2, 3).astype(np.float64)
    taps = W.reshape(len(W), c, -1).astype(np.float64)

    def sweep(state: _State) -> _State:
        P = state.P.transpose(1, 0, 2)
        V, U = state.V.transpose(1, 0, 2), state.U.transpose(1, 0, 2)
        V = _solved(np.einsum("coij,com,cmj->cmi", tensors, P, U, optimize=True), P, U)
        U = _solved(np.einsum("coij,com,cmi->cmj", tensors, P, V, optimize=True), P, V)
        return _State(V.transpose(1, 0, 2), U.transpose(1, 0, 2), taps, None)

    found = [
        alternate(_State(V, U, taps, None), sweep, lambda s: s.loss, FREE_SWEEPS, FREE_TOLERANCE)
        for V, U in _starts(tensors, terms)
    ]
    best = min(found, key=lambda state: state.loss)
    return best.V, best.U


def _starts(tensors: Array, terms: int) -> list[tuple[Array, Array]]:
    """Return where alternation begins: leading kernels' best rank one, one after another, and products of vectors."""
    c, _, kh, kw = tensors.shape
    rest, greedy = tensors.copy(), []
    for _ in range(terms):
        kernel = np.linalg.svd(rest.reshape(c, -1, kh * kw), full_matrices=False)[2][:, 0].reshape(c, kh, kw)
        rows, _, columns = np.linalg.svd(kernel)
        v, u = rows[:, :, 0], columns[:, 0]
        rest = rest - np.einsum("coij,ci,cj,ck,cl->cokl", rest, v, u, v, u, optimize=True)
        greedy.append((v, u))
    height = np.linalg.svd(tensors.transpose(0, 2, 1, 3).reshape(c, kh, -1))[0]
    width = np.linalg.svd(tensors.transpose(0, 3, 1, 2).reshape(c, kw, -1))[0]
    order = sorted(((i, j) for i in range(kh) for j in range(kw)), key=lambda pair: (max(pair), sum(pair)))[:terms]
    products = [(height[:, :, i], width[:, :, j]) for i, j in order]
    return [(np.stack([v for v, _ in start]), np.stack([u for _, u in start])) for start in (greedy, products)]


def _solved(rhs: Array, left: Array, right: Array) -> Array:
    """Return the factor [c, m, k] of rhs[c, m, k] given left[c, o, m] and right[c, m, n]."""
    gram = (left.transpose(0, 2, 1) @ left) * (right @ right.transpose(0, 2, 1))
    return np.asarray(np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ rhs)


def _kernels(V: Array, U: Array) -> Array:
    return (V[..., None] * U[:, :, None]).reshape(*V.shape[:2], -1)


def _unit(rows: Array) -> Array:
    """Return rows[m, c, k] of unit length, the entry of largest magnitude positive; a zero row becomes e_0."""
    length = np.linalg.norm(rows, axis=2, keepdims=True)
    first = np.eye(rows.shape[2])[0]
    rows = np.where(length > 0, rows / np.where(length > 0, length, 1.0), first)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(2)[..., None], 2)
    return np.asarray(rows * np.where(largest < 0, -1.0, 1.0))
