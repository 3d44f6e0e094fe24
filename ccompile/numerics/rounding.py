"""Weights on a symmetric integer grid, one scale per row: the scales, and which integers lose least of the output.

W[r, d] ~= s[r] Q[r, d],  |Q| <= limit;  lost: tr((W - sQ) H (W - sQ)^T), H[d, d] = E[x x^T] of the layer's inputs.

Sources: Nagel et al. 2020, arXiv:2004.10568 (rounding in the metric of the output); Frantar et al. 2022,
arXiv:2210.17323 (error feedback); Nagel et al. 2019, arXiv:1906.04721 (equalisation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_SHRINK = np.linspace(1.0, 0.5, 26)
_SWEEPS = 4
_DAMP = 0.01  # of the mean diagonal, added to H


def largest(W: Array, limit: int) -> Array:
    """Return the scales that put each row's largest weight at the limit; 1 for rows of zeros.

    >>> largest(np.array([[0.5, -1.27], [0.0, 0.0]]), 127).tolist()
    [0.01, 1.0]
    """
    reach = np.abs(W).max(1, initial=0.0)
    return np.where(reach > 0, reach / limit, 1.0)


def nearest(W: Array, scale: Array, limit: int) -> Array:
    """Return the nearest integers [r, d] within the limit, ties to even."""
    rounded: Array = np.clip(np.rint(W / scale[:, None]), -limit, limit)
    return rounded


def least_squares(W: Array, limit: int, weight: Array | None = None) -> Array:
    """Return, per row, the scale of least squared error of rounding to nearest; `weight`[d] counts columns, as E[x^2].

    The whole range is among those tried, so that it never loses to `largest`.
    """
    cost = np.ones(W.shape[1]) if weight is None else weight
    whole = largest(W, limit)
    tried = [whole * share for share in _SHRINK]
    lost = [(np.square(W - scale[:, None] * nearest(W, scale, limit)) * cost).sum(1) for scale in tried]
    best: Array = np.choose(np.argmin(lost, 0), tried)
    return best


def descend(W: Array, scale: Array, H: Array, limit: int) -> Array:
    """Return integers near W / scale of less output loss than the nearest: coordinate descent, all rows at once.

    Each weight in turn goes to the integer that is best given the others; a sweep never loses, so that the result is
    at least as good as the nearest integers.
    """
    damped = H + _DAMP * np.mean(np.diagonal(H)) * np.eye(len(H))
    Q = nearest(W, scale, limit)
    R = (scale[:, None] * Q - W) @ damped  # the gradient's half
    diagonal = np.diagonal(damped)
    for _ in range(_SWEEPS):
        moved = 0
        for column in range(W.shape[1]):
            if not diagonal[column] > 0:
                continue
            wanted = Q[:, column] - R[:, column] / (diagonal[column] * scale)
            step = np.clip(np.rint(wanted), -limit, limit) - Q[:, column]
            if not step.any():
                continue
            moved += int(np.count_nonzero(step))
            Q[:, column] += step
            R += np.outer(step * scale, damped[column])
        if not moved:
            break
    return Q


def feed_back(W: Array, scale: Array, H: Array, limit: int) -> Array:
    """Return integers [r, d] in which each column makes up for the rounding of those before it, largest E[x^2] first.

    Raises numpy.linalg.LinAlgError where H, damped, is not positive definite.
    """
    size = len(H)
    damped = H + max(_DAMP * float(np.mean(np.diagonal(H))), 1e-12) * np.eye(size)
    order = np.argsort(-np.diagonal(damped), kind="stable")
    U = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T  # upper: U^T U = H^-1
    left, Q = W[:, order].copy(), np.empty_like(W)
    for at, column in enumerate(order):
        Q[:, column] = np.clip(np.rint(left[:, at] / scale), -limit, limit)
        error = (left[:, at] - scale * Q[:, column]) / U[at, at]
        left[:, at + 1 :] -= np.outer(error, U[at, at + 1 :])
    return Q


def output_loss(W: Array, Wq: Array, H: Array) -> float:
    """Return tr((W - Wq) H (W - Wq)^T)."""
    D = W - Wq
    return float(np.einsum("rd,de,re->", D, H, D))


def balance(first: Array, second: Array) -> Array:
    """Return, per channel, what a layer's output channels are to be divided by and its reader's columns multiplied by.

    first[c]: the largest weight of output channel c; second[c]: that of the reader's column c. Both become the
    geometric mean. 1 where either is 0.

    >>> balance(np.array([4.0, 0.0]), np.array([1.0, 3.0])).tolist()
    [2.0, 1.0]
    """
    usable = (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.ones_like(first), where=usable)
    return np.where(usable, np.sqrt(ratio), 1.0)
