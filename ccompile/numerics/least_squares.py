"""Refit linear layers to targets from moments: asymmetric least squares, its dual for wide layers, affine repair.

Moments are sums over the samples: H[d, d] = sum x x^T of the inputs that the compressed prefix really produces,
C[o, d] = sum y x^T of the source's outputs y with them, yy = sum |y|^2. With means, fit on the centred moments
(`center`) and put the rest into the bias: b = mean_y - W mean_x; that is never worse than a fit without a bias.

Source: He et al. 2017, arXiv:1707.06168; Nagel et al. 2019, arXiv:1906.04721 (bias); Frantar et al. 2022,
arXiv:2208.11580.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted weight W[o, d], the numerical rank of its normal equations, and how many of its rows are still W0's."""

    W: Array
    rank: int
    unchanged: int


def center(H: Array, C: Array, mean_x: Array, mean_y: Array, count: int) -> tuple[Array, Array]:
    """Return H - n mean_x mean_x^T and C - n mean_y mean_x^T.

    >>> H, C = center(np.array([[10.0]]), np.array([[8.0]]), np.array([2.0]), np.array([1.0]), 2)
    >>> H.item(), C.item()
    (2.0, 4.0)
    """
    return H - count * np.outer(mean_x, mean_x), C - count * np.outer(mean_y, mean_x)


def refit(H: Array, C: Array, W0: Array, ridge: float) -> Fit:
    """Minimise |Y - W X|^2 + ridge mean(diag H) |W - W0|^2 over W[o, d].

    The solution moves from W0 as little as it can: where H is rank deficient and `ridge` is 0, W keeps W0's part
    outside the range of H. A row that rounding made worse than W0's on |Y - W X|^2 is left as it was.

    >>> refit(np.array([[4.0]]), np.array([[12.0]]), np.array([[1.0]]), 0.0).W.item()
    3.0
    """
    _check(H, C, W0, ridge)
    H, C, W0 = (array.astype(np.float64) for array in (H, C, W0))
    residual = C - W0 @ H
    step, rank = _solve(H, residual, ridge * float(H.diagonal().mean()))
    gain = 2 * (step * residual).sum(1) - ((step @ H) * step).sum(1)
    return _guarded(W0, step, gain, rank)


def refit_wide(X: Array, Y: Array, W0: Array, ridge: float) -> Fit:
    """Do what `refit` does from samples X[n, d] and targets Y[n, o], by a system of size n: for d > n.

    W = W0 + E^T (X X^T + r I)^-1 X, with E = Y - X W0^T and r as in `refit` (push-through identity). Centre X and Y
    beforehand where a bias absorbs the means.

    >>> refit_wide(np.array([[1.0, 1.0]]), np.array([[4.0]]), np.zeros((1, 2)), 0.0).W.round(9).tolist()
    [[2.0, 2.0]]
    """
    if X.ndim != 2 or Y.shape != (len(X), len(W0)) or W0.shape[1:] != X.shape[1:]:
        raise ValueError(f"shapes X{X.shape}, Y{Y.shape}, W0{W0.shape}: need [n, d], [n, o], [o, d]")
    _check_finite(X, Y, W0, ridge)
    X, Y, W0 = (array.astype(np.float64) for array in (X, Y, W0))
    residual = (Y - X @ W0.T).T
    weights, rank = _solve(X @ X.T, residual, ridge * float(np.square(X).sum()) / X.shape[1])
    step = weights @ X
    moved = step @ X.T
    return _guarded(W0, step, (moved * (2 * residual - moved)).sum(1), rank)


def quadratic_error(H: Array, C: Array, yy: float, W: Array) -> float:
    """Return |Y - W X|^2 = yy - 2 <W, C> + <W H, W>, at least 0.

    >>> quadratic_error(np.array([[2.0]]), np.array([[6.0]]), 20.0, np.array([[3.0]]))
    2.0
    """
    return max(float(yy - 2 * np.vdot(W, C) + np.vdot(W @ H, W)), 0.0)


def relative_error(H: Array, C: Array, yy: float, W: Array) -> float:
    """Return |Y - W X| / |Y|: 0 is perfect, 1 is what W = 0 gives; 0 when Y is 0 and W X too.

    >>> relative_error(np.array([[1.0]]), np.array([[1.0]]), 4.0, np.array([[0.0]]))
    1.0
    """
    error = quadratic_error(H, C, yy, W)
    return float(np.sqrt(error / yy)) if yy > 0 else (float("inf") if error > 0 else 0.0)


def affine_repair(
    now_mean: Array, now_var: Array, cov_now_source: Array, source_mean: Array, rho: float | Array
) -> tuple[Array, Array]:
    """Return per channel g and t so that g y + t is nearer the source's output: g = 1 + rho (g_ls - 1).

    g_ls = cov / var is the least-squares slope, t aligns the means; rho in [0, 1] shrinks the slope towards 1 where it
    is known badly (a scalar, or one per channel). E|source - (g y + t)|^2 falls monotonically in rho, and rho = 0
    corrects the bias only: never worse than y on these moments. A channel without variance keeps g = 1.

    >>> g, t = affine_repair(np.array([1.0]), np.array([2.0]), np.array([4.0]), np.array([5.0]), 1.0)
    >>> g.item(), t.item()
    (2.0, 3.0)
    """
    rho = np.asarray(rho, np.float64)
    if not ((rho >= 0) & (rho <= 1)).all():
        raise ValueError(f"rho {rho} must lie in [0, 1]")
    live = now_var > 0
    slope = np.where(live, cov_now_source, 1.0) / np.where(live, now_var, 1.0)
    g = 1.0 + rho * (slope - 1.0)
    return g, source_mean - g * now_mean


def _check(H: Array, C: Array, W0: Array, ridge: float) -> None:
    d = len(H)
    if H.shape != (d, d) or C.shape != W0.shape or W0.shape[1:] != (d,):
        raise ValueError(f"shapes H{H.shape}, C{C.shape}, W0{W0.shape}: need [d, d], [o, d], [o, d]")
    _check_finite(H, C, W0, ridge)


def _check_finite(A: Array, B: Array, W0: Array, ridge: float) -> None:
    if not ridge >= 0:
        raise ValueError(f"ridge {ridge} must be >= 0")
    if not all(np.isfinite(array).all() for array in (A, B, W0)):
        raise ValueError("the moments or the weight are not finite")


def _guarded(W0: Array, step: Array, gain: Array, rank: int) -> Fit:
    """Take the step in the rows where it lowers the error by `gain`[o] > 0."""
    better = gain > 0
    return Fit(np.where(better[:, None], W0 + step, W0), rank, int(np.count_nonzero(~better)))


def _solve(A: Array, R: Array, shift: float) -> tuple[Array, int]:
    """Return R (A + shift I)^-1 for A[d, d] positive semidefinite; where singular, use the pseudo-inverse.

    Also the rank: d, or the number of eigenvalues above d eps max.
    """
    from scipy.linalg import eigh
    from scipy.linalg.lapack import dpocon, dpotrf, dpotrs

    d = len(A)
    shifted = A.copy()
    shifted[np.diag_indices(d)] += shift
    factor, info = dpotrf(shifted, lower=1)
    if not info:
        rcond, _ = dpocon(factor, np.abs(shifted).sum(0).max(initial=0.0), uplo="L")
        if rcond > d * np.finfo(np.float64).eps:
            return dpotrs(factor, R.T, lower=1)[0].T, d
    values, vectors = eigh(shifted, driver="evd")
    used = values > d * np.finfo(np.float64).eps * max(float(np.abs(values).max(initial=0.0)), 1e-300)
    vectors = vectors[:, used]
    return ((R @ vectors) / values[used]) @ vectors.T, int(np.count_nonzero(used))
