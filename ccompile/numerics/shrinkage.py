"""How far a sample covariance should shrink towards a multiple of the identity, from its own moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FAINT = 1e-4  # a column's deviation, relative to all columns': below, it counts as that


def oracle_shrinkage(H: Array, count: int) -> float:
    """Return rho in [0, 1]: (1 - rho) S + rho mean(diag S) I estimates the covariance best; S = H / count, H[d, d].

    The more columns per sample, and the flatter the spectrum, the larger. Source: Chen, Wiesel, Eldar, Hero 2010 (OAS),
    doi:10.1109/TSP.2010.2053029, equation 23.

    >>> oracle_shrinkage(np.diag([4.0, 0.0, 0.0, 0.0]), 1_000_000) < 1e-5
    True
    >>> oracle_shrinkage(np.eye(4), 10)
    1.0
    """
    d = len(H)
    trace, square = float(np.trace(H)), float(np.square(H).sum())
    spread = square - trace**2 / d
    if count < 1 or d < 2 or spread <= 1e-12 * square:
        return 1.0 if d > 1 and trace > 0 else 0.0
    rho = ((1 - 2 / d) * square + trace**2) / ((count + 1 - 2 / d) * spread)
    return float(min(rho, 1.0))


def standardised(H: Array) -> tuple[Array, Array]:
    """Return R = H / (s s^T), and s = sqrt(diag H): R has a unit diagonal, but for columns that hardly vary.

    Their s is the root mean square of all, times 1e-4: a ridge in proportion to s^2 then keeps what a fit would tell of
    their rounding noise from growing out of all proportion. Where all columns are dead, s = 1 and R = 0.

    >>> standardised(np.array([[4.0, 2.0], [2.0, 9.0]]))[0].round(3).tolist()
    [[1.0, 0.333], [0.333, 1.0]]
    >>> standardised(np.diag([2.0, 0.0]))[1].round(6).tolist()
    [1.414214, 0.0001]
    """
    power = np.maximum(H.diagonal(), 0.0)
    scale = np.sqrt(np.maximum(power, _FAINT**2 * power.mean())) if power.any() else np.ones(len(H))
    return H / np.outer(scale, scale), scale


def weighted(R: Array, scale: Array) -> Array:
    """Return what a ridge of 1 adds to the diagonal of the H that was `standardised` to (R, s): s^2, where H is not 0.

    >>> weighted(*standardised(np.diag([2.0, 0.0]))).round(6).tolist()
    [2.0, 0.0]
    """
    added: Array = np.where(R.diagonal() > 0, np.square(scale), 0.0)
    return added


def ridge_of(R: Array, count: int, least: float = 1e-5, most: float = 10.0) -> float:
    """Return the ridge that makes R + ridge diag R the shrunk estimate of a standardised covariance.

    It is rho / (1 - rho), between `least` and `most`: correlations shrink, variances stay.
    """
    rho = oracle_shrinkage(R, count)
    return most if rho >= most / (1 + most) else max(least, rho / (1 - rho))
