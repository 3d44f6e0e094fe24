"""Few kernels shared by all channels: fixed bases, and separable ones learned for a layer.

    What[o, c, i, j] = sum_m P[o, c, m] atoms[m, i, j]        (each input channel with every atom, then 1 x 1 with P)

Fixed bases are complete and orthonormal (DCT, Haar), sorted from low to high frequency; of those the best subset
without data keeps the atoms of most energy, and by Parseval its loss is the energy of the others. Learned atoms are
outer products v[m, i] h[m, j]; given P each of v and h is a small exact solve, and P given the atoms a regression.
Parameters: m o c, and m kh kw or m (kh + kw) for the atoms.

Source: Rigamonti et al. 2013, doi:10.1109/CVPR.2013.355; Jaderberg et al. 2014, arXiv:1405.3866 (scheme 1); Qiu et al.
2018, arXiv:1802.04145 (fixed bases).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import canonical, obs, weighted
from ccompile.numerics.alternating import alternate
from ccompile.numerics.least_squares import refit
from ccompile.numerics.separable import mix, mixture

Array = npt.NDArray[Any]

SWEEPS, TOLERANCE = 25, 1e-3
TRIAL = 4  # sweeps from each start, before the best goes on alone


@dataclass(frozen=True, eq=False)
class Shared:
    """`atoms`[m, kh, kw] and `P`[o, c, m]; `v`[m, kh] and `h`[m, kw] where the atoms are learned outer products.

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    P: Array
    atoms: Array
    loss: float
    error: float
    v: Array | None = None
    h: Array | None = None

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return np.tensordot(self.P, self.atoms, 1)


def fit(W: Array, H: Array | None, atoms: Array) -> Shared:
    """Return the best P for W[o, c, kh, kw] and the given atoms[m, kh, kw], with H[d, d] or without data: exact.

    Raises ValueError where shapes do not fit or an entry is not finite.

    >>> fit(np.ones((2, 3, 2, 2)), None, dct_atoms(2, 2)[:1]).error < 1e-12
    True
    """
    _, H = weighted.checked(W, H)
    if atoms.shape[1:] != W.shape[2:] or not len(atoms):
        raise ValueError(f"shapes W{W.shape}, atoms{atoms.shape}: need [o, c, kh, kw], [m, kh, kw]")
    return _shared(W, H, mixture(_taps(W), H, _repeated(atoms, W.shape[1])), atoms.astype(np.float64))


def learn(W: Array, H: Array | None, count: int, sweeps: int = SWEEPS) -> Shared:
    """Return `count` separable atoms v[m, i] h[m, j] for W[o, c, kh, kw] and their P, with H[d, d] or without data.

    With data the loss is never above that of the atoms without. Exact at count = kh kw; raises ValueError above, or
    where shapes do not fit or an entry is not finite.

    >>> learn(np.multiply.outer(np.ones((2, 3)), np.outer([1.0, 2.0, 1.0], [1.0, 0.0, -1.0])), None, 1).error < 1e-12
    True
    """
    _, H = weighted.checked(W, H)
    weighted.check_rank(count, W.shape[2] * W.shape[3], "count")
    v, h = _principal(W)
    _, *algebraic = canonical.algebraic(W.reshape(-1, *W.shape[2:]).astype(np.float64), count)
    best = _Learner(W, None).best([(v[:count], h[:count]), (algebraic[0], algebraic[1])], sweeps)
    if H is not None:
        chosen = select(W, H, _outer(v, h), count)
        best = _Learner(W, H).best([(best.v, best.h), (v[chosen], h[chosen])], sweeps)
    return _shared(W, H, best.P, _outer(best.v, best.h), best.v, best.h)


def select(W: Array, H: Array | None, atoms: Array, count: int) -> Array:
    """Return which `count` atoms of a complete orthonormal basis[kh kw, kh, kw] to keep, ascending.

    Without data the best; with data the better of those and of removing atoms one by one (obs.py). Raises ValueError
    where the basis is not complete or the count is not in 1 .. kh kw.

    >>> select(np.ones((1, 1, 2, 2)), None, dct_atoms(2, 2), 1).tolist()
    [0]
    """
    _, H = weighted.checked(W, H)
    (o, c, kh, kw), basis = W.shape, atoms.reshape(len(atoms), -1)
    weighted.check_rank(count, kh * kw, "count")
    if basis.shape != (kh * kw,) * 2 or np.abs(basis @ basis.T - np.eye(kh * kw)).max() > 1e-8:
        raise ValueError(f"atoms{atoms.shape} are no complete orthonormal basis of {kh} x {kw} kernels")
    weights = _taps(W) @ basis.T
    energetic = np.sort(np.argsort(-np.square(weights).sum((0, 1)), kind="stable")[:count])
    if H is None or count == kh * kw:
        return energetic
    gram = (basis @ H.reshape(c, kh * kw, -1)).reshape(len(H), c, kh * kw) @ basis.T
    consumer = obs.Consumer(weights.reshape(o, -1), gram.reshape(H.shape), np.tile(np.arange(kh * kw), c))
    greedy = obs.remove_units([consumer], 0.0).keep(count)
    return min((energetic, greedy), key=lambda keep: fit(W, H, atoms[keep]).loss)


def dct_atoms(kh: int, kw: int) -> Array:
    """Return the orthonormal products of the DCT-II, atoms[kh kw, kh, kw], low frequencies first.

    >>> dct_atoms(1, 2).round(3).tolist()
    [[[0.707, 0.707]], [[0.707, -0.707]]]
    """
    return _products(_cosines(kh), _cosines(kw), np.arange(kh), np.arange(kw))


def haar_atoms(kh: int, kw: int) -> Array:
    """Return the orthonormal products of Haar wavelets, atoms[kh kw, kh, kw], coarse ones first.

    Sides that are no power of two are halved unevenly (unbalanced Haar).

    >>> haar_atoms(1, 2).round(3).tolist()
    [[[0.707, 0.707]], [[0.707, -0.707]]]
    """
    (rows, levels), (columns, depths) = _wavelets(kh), _wavelets(kw)
    return _products(rows, columns, levels, depths)


def parameters(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """Return how many weights P has, and separable atoms (twice `count` filters).

    >>> parameters((64, 32, 3, 3), 4)
    (8192, 24)
    """
    o, c, kh, kw = shape
    return o * c * count, count * (kh + kw)


@dataclass(frozen=True, eq=False)
class _State:
    v: Array
    h: Array
    P: Array
    loss: float


class _Learner:
    """Alternates over v and h, with the best P for them."""

    def __init__(self, W: Array, H: Array | None) -> None:
        self.taps, self.H, self.kernel = _taps(W), H, W.shape[2:]
        self.WH = weighted.times(self.taps.reshape(len(W), -1), H).reshape(self.taps.shape)
        _, c, t = self.taps.shape
        self.pairs = None if H is None else H.reshape(c, t, c, t).transpose(0, 2, 1, 3).reshape(c * c, t * t)

    def best(self, starts: list[tuple[Array, Array]], sweeps: int) -> _State:
        """Return what the most promising start leads to."""
        tried = [self.run(self.solve(*start), min(sweeps, TRIAL)) for start in starts]
        return self.run(min(tried, key=lambda state: state.loss), max(0, sweeps - TRIAL))

    def run(self, start: _State, sweeps: int) -> _State:
        return alternate(start, self.sweep, lambda state: state.loss, sweeps, TOLERANCE)

    def solve(self, v: Array, h: Array) -> _State:
        """Return these atoms with their best P."""
        atoms = _repeated(_outer(v, h), self.taps.shape[1])
        P = mixture(self.taps, self.H, atoms)
        return _State(v, h, P, weighted.loss(self.H, self.taps, mix(P, atoms)))

    def sweep(self, state: _State) -> _State:
        v, h, m = state.v, state.h, len(state.v)
        N, n = self._normal(state.P)
        N, n = N.reshape(m, *self.kernel, m, *self.kernel), n.reshape(m, *self.kernel)
        A = np.einsum("mj,mijnkl,nl->mink", h, N, h, optimize=True).reshape(v.size, v.size)
        v = _small_solve(A, np.einsum("mij,mj->mi", n, h), v)
        A = np.einsum("mi,mijnkl,nk->mjnl", v, N, v, optimize=True).reshape(h.size, h.size)
        h = _small_solve(A, np.einsum("mij,mi->mj", n, v), h)
        return self.solve(_unit(v), _unit(h))

    def _normal(self, P: Array) -> tuple[Array, Array]:
        """Return N[m t, m t] and n[m, t]: the loss is <a, N a> - 2 <a, n> + constant in the atoms a[m, t]."""
        o, c, m = P.shape
        t = self.taps.shape[2]
        n = np.tensordot(P, self.WH, ((0, 1), (0, 1)))
        flat = P.reshape(o, -1)
        Q = (flat.T @ flat).reshape(c, m, c, m)
        if self.pairs is None:
            return np.kron(np.trace(Q, axis1=0, axis2=2), np.eye(t)), n
        N = Q.transpose(1, 3, 0, 2).reshape(m * m, c * c) @ self.pairs
        return N.reshape(m, m, t, t).transpose(0, 2, 1, 3).reshape(m * t, m * t), n


def _principal(W: Array) -> tuple[Array, Array]:
    """Return v[kh kw, kh] and h[kh kw, kw]: products of the principal row and column filters, most energy first."""
    kh, kw = W.shape[2:]
    flat = W.reshape(-1, kh, kw).astype(np.float64)
    rows = np.linalg.eigh(np.tensordot(flat, flat, ((0, 2), (0, 2))))[1]
    columns = np.linalg.eigh(np.tensordot(flat, flat, ((0, 1), (0, 1))))[1]
    energy = np.square(rows.T @ flat @ columns).sum(0)
    first, second = np.unravel_index(np.argsort(-energy, axis=None, kind="stable"), energy.shape)
    return _signed(rows.T[first]), _signed(columns.T[second])


def _small_solve(A: Array, rhs: Array, start: Array) -> Array:
    return refit((A + A.T) / 2, rhs.reshape(1, -1), start.reshape(1, -1), 0.0).W.reshape(start.shape)


def _shared(
    W: Array, H: Array | None, P: Array, atoms: Array, v: Array | None = None, h: Array | None = None
) -> Shared:
    What = np.tensordot(P, atoms, 1)
    return Shared(P, atoms, weighted.loss(H, W, What), weighted.relative_error(H, W, What), v, h)


def _taps(W: Array) -> Array:
    return W.reshape(*W.shape[:2], -1).astype(np.float64, copy=False)


def _repeated(atoms: Array, channels: int) -> Array:
    """Return atoms[m, ...] for every channel, [m, c, t]."""
    return np.repeat(atoms.reshape(len(atoms), 1, -1), channels, 1)


def _outer(v: Array, h: Array) -> Array:
    return v[:, :, None] * h[:, None]


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _signed(rows: Array) -> Array:
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return rows * np.where(largest < 0, -1.0, 1.0)


def _cosines(k: int) -> Array:
    waves = np.cos(np.pi * np.outer(np.arange(k), 2 * np.arange(k) + 1) / (2 * k))
    return _unit(waves)


def _wavelets(k: int) -> tuple[Array, Array]:
    """Return the orthonormal rows[k, k] and the level of each, the constant first."""
    rows, levels, pending = [np.full(k, 1 / np.sqrt(k))], [0], [(0, k, 1)]
    for start, stop, level in pending:
        if stop - start > 1:
            middle = (start + stop + 1) // 2
            left, right = middle - start, stop - middle
            row = np.zeros(k)
            row[start:middle], row[middle:stop] = np.sqrt(right / left), -np.sqrt(left / right)
            rows.append(row / np.sqrt(stop - start))
            levels.append(level)
            pending += [(start, middle, level + 1), (middle, stop, level + 1)]
    return np.stack(rows), np.array(levels)


def _products(rows: Array, columns: Array, heights: Array, widths: Array) -> Array:
    """Return rows x columns, sorted by the sum of their frequencies."""
    atoms = np.einsum("pi,qj->pqij", rows, columns).reshape(-1, rows.shape[1], columns.shape[1])
    return np.ascontiguousarray(atoms[np.argsort(np.add.outer(heights, widths), axis=None, kind="stable")])
