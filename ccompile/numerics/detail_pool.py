"""Detail-preserving pooling of windows, and its parameters from samples.

y = sum_q w[q] x[q] / sum_q w[q],   w[q] = alpha + (max(x[q] - mean(x), 0) / scale)^lambda

lambda = 0 is the mean, a large lambda with a small alpha nearly the maximum; equal elements give themselves.
Source: Saeedan et al. 2018, arXiv:1804.04076, eq. 4-6, asymmetric, its smoothed image the mean of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = 8.0  # lambda: powers beyond leave float32
LEAST = 1e-3  # alpha: less, and a window of equal elements is 0 / 0
_STARTS = (0.5, 2.0, 5.0)
_MEAN = 1e-2  # lambda: below, the weights are equal


@dataclass(frozen=True)
class Parameters:
    """alpha > 0, lambda >= 0, and the scale > 0 of what the windows' elements are above their means."""

    alpha: float
    power: float
    scale: float


def pooled(windows: Array, parameters: Parameters) -> Array:
    """Return y[n] of windows[n, taps].

    >>> pooled(np.array([[1.0, 3.0]]), Parameters(1.0, 0.0, 1.0)).tolist()
    [2.0]
    """
    above = np.maximum(windows - windows.mean(1, keepdims=True), 0) / parameters.scale
    weights = parameters.alpha + above**parameters.power
    found: Array = (weights * windows).sum(1) / weights.sum(1)
    return found


def fitted(windows: Array, target: Array) -> Parameters:
    """Return the parameters whose pooling of windows[n, taps] is nearest target[n] in squares; at worst the mean's."""
    from scipy import optimize

    windows, target = windows.astype(np.float64), target.astype(np.float64)
    above = np.maximum(windows - windows.mean(1, keepdims=True), 0)
    scale = float(np.sqrt(np.square(above).mean())) or 1.0
    mean = Parameters(1.0, 0.0, scale)

    def at(point: Array) -> Parameters:
        return Parameters(float(np.exp(point[0])), float(point[1]), scale)

    def loss(parameters: Parameters) -> float:
        return float(np.square(pooled(windows, parameters) - target).mean())

    bounds = [(np.log(LEAST), np.log(1 / LEAST)), (0.0, LARGEST)]
    runs = (
        optimize.minimize(
            lambda point: loss(at(point)), (-2.0, start), method="Nelder-Mead", bounds=bounds, options={"maxiter": 200}
        )
        for start in _STARTS
    )
    best = min((mean, *(at(run.x) for run in runs)), key=loss)
    return mean if best.power < _MEAN else best
