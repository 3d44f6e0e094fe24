"""Truncated singular value decomposition: spectra, ranks, balanced factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Matrices with more rows and columns than this go by the Gram matrix of their shorter side: a fraction of the work and
# of the memory. Singular values below 1e-8 of the largest are noise then, and a best weight still is the projection on
# its own columns, which loses no more than that.
LARGE = 1024


def decompose(W: Array) -> tuple[Array, Array, Array]:
    """Return U[o, k], s[k], V[k, i] with W[o, i] = U diag(s) V, s descending, k = min(o, i), in float64.

    Signs are fixed (the entry of largest magnitude in each column of U is positive), so that equal input gives equal
    factors. Raises numpy.linalg.LinAlgError when W is not finite.
    """
    from scipy.linalg import svd

    if not np.isfinite(W).all():
        raise np.linalg.LinAlgError("the matrix is not finite")
    U, s, V = svd(W.astype(np.float64), full_matrices=False, lapack_driver="gesdd")
    flips = np.where(np.take_along_axis(U, np.abs(U).argmax(0)[None], 0)[0] < 0, -1.0, 1.0)
    return U * flips, s, V * flips[:, None]


def spectrum(W: Array) -> Array:
    """Return the singular values of W[o, i], descending, in float64.

    Raises numpy.linalg.LinAlgError when W is not finite.

    >>> spectrum(np.array([[0.0, 3.0], [4.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    from scipy.linalg import eigvalsh, svdvals

    found: Array
    if min(W.shape) <= LARGE:
        if not np.isfinite(W).all():
            raise np.linalg.LinAlgError("the matrix is not finite")
        found = svdvals(W.astype(np.float64))
    else:
        found = np.sqrt(np.maximum(eigvalsh(_gram(W))[::-1], 0.0))
    return found


def best(W: Array, rank: int) -> tuple[Array, Array]:
    """Return A[o, r], B[r, i] with A B the best approximation of rank r; both carry the square root of the spectrum.

    Raises numpy.linalg.LinAlgError when W is not finite. Source: Eckart and Young 1936.
    """
    from scipy.linalg import eigh

    if min(W.shape) <= LARGE:
        U, s, V = decompose(W)
        root = np.sqrt(s[:rank])
        return U[:, :rank] * root, root[:, None] * V[:rank]
    if W.shape[0] > W.shape[1]:
        B, A = best(W.T, rank)
        return A.T, B.T
    count = len(W)
    values, vectors = eigh(_gram(W), subset_by_index=(count - rank, count - 1))
    U, root = vectors[:, ::-1], np.maximum(values[::-1], 0.0) ** 0.25
    U = U * np.where(np.take_along_axis(U, np.abs(U).argmax(0)[None], 0)[0] < 0, -1.0, 1.0)
    B = U.T @ W.astype(np.float64)
    return U * root, np.divide(B, root[:, None], out=np.zeros_like(B), where=root[:, None] > 0)


def _gram(W: Array) -> Array:
    """Return W W^T, or W^T W where that is smaller, in float64."""
    short = W.astype(np.float64) if W.shape[0] <= W.shape[1] else W.T.astype(np.float64)
    if not np.isfinite(short).all():
        raise np.linalg.LinAlgError("the matrix is not finite")
    found: Array = short @ short.T
    return found


def tail_errors(s: Array) -> Array:
    """Return e[r] = |W - W_r| / |W| (Frobenius) for r = 0 .. len(s), from the descending spectrum.

    >>> tail_errors(np.array([4.0, 3.0])).tolist()
    [1.0, 0.6, 0.0]
    """
    energy = np.concatenate([np.cumsum(np.square(s[::-1].astype(np.float64)))[::-1], [0.0]])
    return np.sqrt(energy / energy[0]) if energy[0] > 0 else np.zeros(len(s) + 1)


def rank_for_energy(s: Array, energy: float) -> int:
    """Return the least r >= 1 with sum(s[:r]**2) >= energy * sum(s**2); s is descending, energy in (0, 1].

    >>> rank_for_energy(np.array([3.0, 1.0]), 0.9)
    1
    """
    return rank_for_error(s, float(np.sqrt(max(0.0, 1.0 - energy))))


def rank_for_error(s: Array, error: float) -> int:
    """Return the least r >= 1 with |W - W_r| <= error |W| (Frobenius); s is descending, error in [0, 1).

    >>> rank_for_error(np.array([4.0, 3.0]), 0.6)
    1
    """
    fits = np.flatnonzero(tail_errors(s)[1:] <= error * (1 + 1e-12))
    return int(fits[0]) + 1 if fits.size else len(s)
