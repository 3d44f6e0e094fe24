"""The best low-rank weight in the metric of a layer's inputs: activation-aware SVD, by one eigen-decomposition.

With H[d, d] = X X^T of the centred inputs (None: the identity) and a weight W[o, d],

    loss(V) = tr( (V - W) H (V - W)^T ) = |V X - W X|^2.

Of all V of rank r the least loss has V = A B, A[o, r] the leading eigenvectors of W H W^T and B = A^T W: with H = L L^T
the singular values s of W L are the roots of those eigenvalues, and the loss is the sum of the discarded s^2. One
decomposition serves every rank and no root of H is needed, so H may be rank deficient; directions that H does not see
come last, ordered by what they carry of W itself. A ridge on |V - W|^2 enters as H + ridge I.

Source: Eckart and Young 1936; Izenman 1975 (reduced-rank regression); Wang et al. 2024, arXiv:2403.07378 (SVD-LLM).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import svd

Array = npt.NDArray[Any]


def root(H: Array) -> tuple[Array, Array]:
    """Return L[d, q] and its pseudo-inverse P[q, d]: H = L L^T, P L = I; q is the numerical rank of H, largest first.

    Raises ValueError when H is not square and finite.

    >>> [factor.round(9).tolist() for factor in root(np.diag([4.0, 0.0]))]
    [[[2.0], [0.0]], [[0.5, 0.0]]]
    """
    from scipy.linalg import eigh

    _, H = checked(np.zeros((1, len(H))), H)
    values, vectors = eigh(H, driver="evd")
    used = np.flatnonzero(values > _noise(values))[::-1]
    vectors, scale = _signed(vectors[:, used]), np.sqrt(values[used])
    return vectors * scale, (vectors / scale).T


def times(E: Array, H: Array | None) -> Array:
    """Return E H; E itself where H is None.

    >>> times(np.ones((1, 2)), np.diag([2.0, 3.0])).tolist()
    [[2.0, 3.0]]
    """
    return E if H is None else E @ H


def loss(H: Array | None, W: Array, What: Array) -> float:
    """Return tr((What - W) H (What - W)^T), at least 0; W and What [o, ...] are unfolded to [o, d].

    >>> loss(np.diag([2.0, 3.0]), np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]]))
    5.0
    """
    E = (What - W).reshape(len(W), -1).astype(np.float64, copy=False)
    return max(float(np.vdot(times(E, H), E)), 0.0)


def relative_error(H: Array | None, W: Array, What: Array) -> float:
    """Return sqrt(loss / tr(W H W^T)): 0 is perfect, 1 is what What = 0 gives; 0 where H does not see W nor What - W.

    >>> relative_error(None, np.array([[3.0, 4.0]]), np.array([[3.0, 0.0]]))
    0.8
    """
    return relative(loss(H, W, What), loss(H, W, np.zeros_like(W)))


def relative(part: float, whole: float) -> float:
    """Return sqrt(part / whole), 0 for 0 / 0.

    >>> relative(1.0, 4.0), relative(0.0, 0.0)
    (0.5, 0.0)
    """
    return float(np.sqrt(part / whole)) if whole > 0 else (float("inf") if part > 0 else 0.0)


def decompose(W: Array, H: Array | None) -> tuple[Array, Array, Array]:
    """Return A[o, k], s[k], B[k, d] for W[o, d], k = min(o, d): A[:, :r] B[:r] is the best weight of rank r, all r.

    A has orthonormal columns, B = A^T W, and s descends: the loss at rank r is sum(s[r:]**2). A B = W. Signs are fixed
    as in `svd.decompose`. Raises ValueError when shapes do not fit or an entry is not finite.

    >>> A, s, B = decompose(np.array([[3.0, 0.0], [0.0, 1.0]]), np.diag([1.0, 25.0]))
    >>> s.tolist(), A.tolist(), B.tolist()
    ([5.0, 3.0], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]])
    """
    W, H = checked(W, H)
    if H is None:
        A, s, _ = svd.decompose(W)
        return A, s, A.T @ W
    if len(W) > len(H):
        Q, R = np.linalg.qr(W)
        A, s = _basis(R, H)
        A = Q @ A
    else:
        A, s = _basis(W, H)
    A = _signed(A)
    return A, s, A.T @ W


def spectrum(W: Array, H: Array | None) -> Array:
    """Return the descending singular values s[min(o, d)] of W L, H = L L^T: the loss at rank r is sum(s[r:]**2).

    >>> spectrum(np.array([[3.0, 0.0], [0.0, 1.0]]), np.diag([1.0, 25.0])).tolist()
    [5.0, 3.0]
    """
    return decompose(W, H)[1]


def truncate(W: Array, H: Array | None, rank: int) -> tuple[Array, Array]:
    """Return A[o, r] with orthonormal columns and B[r, d]: A B has the least loss of all weights of rank r.

    Raises ValueError when the rank is not in 1 .. min(o, d).

    >>> A, B = truncate(np.array([[3.0, 0.0], [0.0, 1.0]]), np.diag([1.0, 25.0]), 1)
    >>> (A @ B).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    check_rank(rank, min(W.shape))
    A, _, B = decompose(W, H)
    return np.ascontiguousarray(A[:, :rank]), np.ascontiguousarray(B[:rank])


def checked(W: Array, H: Array | None) -> tuple[Array, Any]:
    """Return W[o, d] unfolded and H[d, d], both in float64; raises ValueError where they do not fit or are not finite.

    >>> checked(np.ones((2, 3, 1, 1), np.float32), None)[0].shape
    (2, 3)
    """
    W = W.reshape(len(W), -1).astype(np.float64, copy=False)
    H = None if H is None else H.astype(np.float64, copy=False)
    if H is not None and H.shape != (W.shape[1],) * 2:
        raise ValueError(f"shapes W{W.shape}, H{H.shape}: need [o, d], [d, d]")
    if not (W.size and np.isfinite(W).all() and (H is None or np.isfinite(H).all())):
        raise ValueError("the weight or its Gram matrix is empty or not finite")
    return W, H


def check_rank(rank: int, most: int, name: str = "rank") -> None:
    """Raise ValueError unless 1 <= rank <= most.

    >>> check_rank(2, 3)
    """
    if not 1 <= rank <= most:
        raise ValueError(f"{name} {rank} must lie in 1 .. {most}")


def _basis(W: Array, H: Array) -> tuple[Array, Array]:
    """Return orthonormal A[o, o] and s[o] for o <= d."""
    from scipy.linalg import eigh

    values, vectors = eigh(W @ H @ W.T, driver="evd")
    values, vectors = values[::-1], vectors[:, ::-1]
    unseen = values <= _noise(values)
    if unseen.any():
        rest = vectors[:, unseen]
        vectors = np.concatenate([vectors[:, ~unseen], rest @ svd.decompose(rest.T @ W)[0]], axis=1)
    return vectors, np.sqrt(np.maximum(values, 0.0))


def _noise(values: Array) -> float:
    """Return what eigenvalues must exceed to be more than rounding."""
    return len(values) * float(np.finfo(np.float64).eps) * float(np.abs(values).max(initial=0.0))


def _signed(vectors: Array) -> Array:
    """Return the columns with their entry of largest magnitude positive."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)[0] if vectors.size else np.ones(0)
    return vectors * np.where(largest < 0, -1.0, 1.0)
