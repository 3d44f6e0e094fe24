"""Smooth atoms: what a kernel's values at few landmarks say about all of them.

    U = K[:, L] (K[L, L] + ridge I)^-1    (kernel ridge regression)

K[d, d] = exp(-distance^2 / (2 length^2)) says how alike two taps are. The columns of U are the atoms.

Source: Denil et al. 2013, arXiv:1306.0543 (predicting parameters).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import weighted

Array = npt.NDArray[Any]

RIDGE = 1e-6


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
