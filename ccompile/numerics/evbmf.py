"""The rank of a matrix under noise: the global analytic solution of empirical variational Bayes factorisation.

For V[L, M] = B A^T + noise of variance sigma^2, L <= M, alpha = L / M, the components that survive are those with
s_h > sqrt(M sigma^2 (1 + tau)(1 + alpha / tau)), tau = 2.5129 sqrt(alpha). Unknown, sigma^2 minimises the free energy

    sum over all h of psi(x_h),   x_h = s_h^2 / (M sigma^2),
    psi(x) = x - log x,   and for x above the threshold  + log(tau(x) + 1) + alpha log(tau(x) / alpha + 1) - tau(x),

a function of one variable with many local minima: a grid in log sigma^2, then golden sections around its best points.
A rank found so is where to start; what error a budget buys decides.

Source: Nakajima, Sugiyama, Babacan, Tomioka 2013, JMLR 14 (global analytic VBMF); Kim et al. 2015, arXiv:1511.06530.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRID = 150  # points of the first search; the spectrum has at most a few thousand kinks, most of them shallow
REFINED = 3  # of these the best are refined


def rank(W: Array, variance: float | None = None) -> int:
    """Return how many components of W[m, n] (either orientation) stand out of noise of this variance (None: unknown).

    A matrix without noise has its numerical rank; 0 is returned where nothing stands out. Raises ValueError when W is
    not a finite matrix.

    >>> rng = np.random.default_rng(0)
    >>> rank(rng.standard_normal((40, 3)) @ rng.standard_normal((3, 60)) + 0.1 * rng.standard_normal((40, 60)))
    3
    """
    if W.ndim != 2 or not W.size or not np.isfinite(W).all():
        raise ValueError(f"W{W.shape} must be a finite matrix")
    return rank_of(np.linalg.svd(W.astype(np.float64), compute_uv=False), max(W.shape), variance)


def rank_of(s: Array, M: int, variance: float | None = None) -> int:
    """Return the same from the descending singular values s[L] of a matrix with longer side M.

    >>> rank_of(np.array([9.0, 1.0, 0.9, 0.8, 0.7]), 5)
    1
    """
    s = np.asarray(s, np.float64)
    real = s > max(M, len(s)) * np.finfo(np.float64).eps * s.max(initial=0.0)
    if not real.all():
        return int(np.count_nonzero(real))
    sigma2 = noise_variance(s, M) if variance is None else variance
    return int(np.count_nonzero(np.square(s) > M * sigma2 * _threshold(len(s) / M)))


def noise_variance(s: Array, M: int) -> float:
    """Return the sigma^2 of least free energy for the singular values s[L] > 0, descending, of a matrix [L, M].

    >>> noise = np.random.default_rng(0).standard_normal((50, 80))
    >>> 0.8 < noise_variance(np.linalg.svd(noise, compute_uv=False), 80) < 1.2
    True
    """
    squares, L = np.square(np.asarray(s, np.float64)), len(s)
    alpha = L / M
    most = int(min(np.ceil(L / (1 + alpha)) - 1, L - 1))  # no more components than this can stand out
    tail = squares[max(most, 0) :]
    low = max(float(tail[0]) / (M * _threshold(alpha)), float(tail.mean()) / M)
    high = float(squares.mean()) / M
    grid = np.geomspace(min(low, high), high, GRID)
    energies = np.array([_energy(sigma2, squares, M) for sigma2 in grid])
    best = np.argsort(energies, kind="stable")[:REFINED]
    spans = [(grid[max(i - 1, 0)], grid[min(i + 1, GRID - 1)]) for i in best]
    found = [_golden(a, b, squares, M) for a, b in spans] + [float(grid[best[0]])]
    return min(found, key=lambda sigma2: _energy(sigma2, squares, M))


def _threshold(alpha: float) -> float:
    """Return what s^2 / (M sigma^2) must exceed."""
    tau = 2.5129 * np.sqrt(alpha)
    return float((1 + tau) * (1 + alpha / tau))


def _energy(sigma2: float, squares: Array, M: int) -> float:
    alpha = len(squares) / M
    x = squares / (M * sigma2)
    above = x[x > _threshold(alpha)]
    centre = above - (1 + alpha)
    tau = (centre + np.sqrt(np.square(centre) - 4 * alpha)) / 2
    return float((x - np.log(x)).sum() + (np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau).sum())


def _golden(a: float, b: float, squares: Array, M: int) -> float:
    """Return a local minimum between a and b by golden sections."""
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(30):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        if _energy(c, squares, M) < _energy(d, squares, M):
            b = d
        else:
            a = c
    return float(a + b) / 2
