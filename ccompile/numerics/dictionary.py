"""Smooth dictionaries: predict a weight from its values at few landmarks.

    What[o, d] = sum_a V[o, a] U[d, a],    U = K[:, L] (K[L, L] + ridge I)^-1    (kernel ridge regression)

K[d, d] says how alike two inputs are: exp(-distance^2 / (2 length^2)) for inputs with positions (pixels, taps), or
their covariance. U is fixed and V is fitted, exactly, with the Gram matrix of the inputs or without data; the original
method predicts with the values at the landmarks, V = W[:, L]. Parameters: o a, and d a where U is stored.

Source: Denil et al. 2013, arXiv:1306.0543 (predicting parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import weighted
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]

RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Dictionary:
    """`V`[o, a] and the dictionary `U`[d, a] of a weight [o, ...].

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    V: Array
    U: Array
    shape: tuple[int, ...]
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What, of the shape of W."""
        return (self.V @ self.U.T).reshape(self.shape)


def fit(W: Array, H: Array | None, U: Array) -> Dictionary:
    """Return the best V[o, a] for W[o, ...] and the dictionary U[d, a], with H[d, d] or without data: exact.

    With data the loss is never above that of the V without. Raises ValueError where shapes do not fit or an entry is
    not finite.

    >>> fit(np.array([[1.0, 2.0, 3.0]]), None, np.array([[1.0], [2.0], [3.0]])).error < 1e-12
    True
    """
    flat, H = weighted.checked(W, H)
    if U.ndim != 2 or len(U) != flat.shape[1] or not np.isfinite(U).all():
        raise ValueError(f"shapes W{W.shape}, U{U.shape}: need [o, d], [d, a], finite")
    V = flat @ np.linalg.pinv(U.T)
    if H is not None:
        half = H @ U
        gram = U.T @ half
        V = refit((gram + gram.T) / 2, flat @ half, V, 0.0).W
    What = (V @ U.T).reshape(W.shape)
    return Dictionary(V, U, W.shape, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def smooth(
    W: Array, H: Array | None, positions: Array, count: int, lengths: Sequence[float] = (0.5, 1, 2, 4, 8, 16)
) -> Dictionary:
    """Return the fit of least loss among smooth dictionaries of `count` landmarks, one for each of the lengths.

    `positions`[d, p] of the inputs, in the unit of the lengths. Raises ValueError as `fit` and `landmarks` do.

    >>> ramp = np.arange(8.0)[None]
    >>> smooth(ramp, None, ramp.T, 4).error < 0.05
    True
    """
    found = []
    for length in lengths:
        K = squared_exponential(positions, length)
        found.append(fit(W, H, basis(K, landmarks(K, count))))
    return min(found, key=lambda dictionary: dictionary.loss)


def squared_exponential(positions: Array, length: float) -> Array:
    """Return K[d, d] = exp(-|x - y|^2 / (2 length^2)) of the positions[d, p].

    >>> squared_exponential(np.array([[0.0], [1.0]]), 1.0).round(3).tolist()
    [[1.0, 0.607], [0.607, 1.0]]
    """
    distances = np.square(positions[:, None] - positions[None]).sum(2, dtype=np.float64)
    kernel: Array = np.exp(-distances / (2 * length**2))
    return kernel


def landmarks(K: Array, count: int) -> Array:
    """Return `count` inputs, ascending, from which the others are known best: pivots of a Cholesky factorisation of K.

    Raises ValueError unless 1 <= count <= d.

    >>> landmarks(squared_exponential(np.arange(5.0)[:, None], 2.0), 2).tolist()
    [0, 4]
    """
    weighted.check_rank(count, len(K), "count")
    left, factor, chosen = K.diagonal().astype(np.float64), np.zeros((count, len(K))), np.zeros(count, int)
    for number in range(count):
        pivot = int(np.where(np.isin(np.arange(len(K)), chosen[:number]), -np.inf, left).argmax())
        chosen[number] = pivot
        if left[pivot] > 1e-14 * float(K.diagonal().max()):
            factor[number] = (K[pivot] - factor[:number, pivot] @ factor[:number]) / np.sqrt(left[pivot])
            left = np.maximum(left - np.square(factor[number]), 0.0)
    return np.sort(chosen)


def basis(K: Array, chosen: Array, ridge: float = RIDGE) -> Array:
    """Return U[d, a] = K[:, L] (K[L, L] + ridge mean(diag K) I)^-1: what the inputs L say about all of them.

    >>> basis(np.eye(2), np.array([0]), 0.0).tolist()
    [[1.0], [0.0]]
    """
    from scipy.linalg import eigh

    values, vectors = eigh(K[np.ix_(chosen, chosen)].astype(np.float64))
    values = values + ridge * float(K.diagonal().mean())
    used = values > len(K) * np.finfo(np.float64).eps * values.max(initial=0.0)
    U: Array = (K[:, chosen] @ (vectors[:, used] / values[used])) @ vectors[:, used].T
    return U


def smooth_atoms(kh: int, kw: int, count: int, length: float = 1.0) -> Array:
    """Return atoms[count, kh, kw], smooth bumps around landmarks of the kernel's plane, for `atoms.fit`.

    >>> smooth_atoms(3, 3, 4).shape
    (4, 3, 3)
    """
    K = squared_exponential(grid(kh, kw), length)
    return np.ascontiguousarray(basis(K, landmarks(K, count)).T).reshape(count, kh, kw)


def grid(kh: int, kw: int) -> Array:
    """Return the positions[kh kw, 2] of a plane's pixels.

    >>> grid(1, 2).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    return np.stack(np.meshgrid(np.arange(kh), np.arange(kw), indexing="ij"), 2).reshape(-1, 2).astype(np.float64)
