"""Simple importances of units from their producers' weights: what a data-driven choice is compared with.

rows[n, f] holds what produces each unit, a row per unit (several producers: side by side). Larger is more important.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics.obs import Trace

Array = npt.NDArray[Any]


def l1_norms(rows: Array) -> Array:
    """Return |w|_1 of each row of rows[n, f]: larger is more important (Li et al. 2017, arXiv:1608.08710).

    >>> l1_norms(np.array([[1.0, -2.0], [0.5, 0.0]])).tolist()
    [3.0, 0.5]
    """
    norms: Array = np.abs(rows.astype(np.float64)).sum(1)
    return norms


def l2_norms(rows: Array) -> Array:
    """Return |w|_2 of each row of rows[n, f]: larger is more important.

    >>> l2_norms(np.array([[3.0, -4.0], [0.5, 0.0]])).tolist()
    [5.0, 0.5]
    """
    norms: Array = np.linalg.norm(rows.astype(np.float64), axis=1)
    return norms


def median_distances(rows: Array) -> Array:
    """Return for each row of rows[n, f] the sum of its distances to all rows, least near the geometric median.

    Rows near the median are replaceable by the others, so larger is more important (FPGM, He et al. 2019,
    arXiv:1811.00250).

    >>> median_distances(np.array([[0.0], [1.0], [5.0]])).tolist()
    [6.0, 5.0, 9.0]
    """
    from scipy.spatial.distance import cdist

    rows = rows.astype(np.float64)
    distances: Array = cdist(rows, rows).sum(1)
    return distances


def ranked(scores: Array) -> Trace:
    """Return the trace that removes the least important unit first, equal ones in order.

    Its loss is the share of the summed squares of the scores that is gone.

    >>> trace = ranked(np.array([2.0, 1.0, 2.0]))
    >>> trace.order.tolist(), trace.loss.round(2).tolist()
    ([1, 0, 2], [0.11, 0.56, 1.0])
    """
    order = np.argsort(scores, kind="stable")
    loss = np.cumsum(np.square(scores[order])) / max(float(np.square(scores).sum()), 1e-30)
    return Trace(order, loss, len(scores), ())


def random_scores(units: int, rng: np.random.Generator) -> Array:
    """Return a random importance in [0, 1) for each unit: the baseline that a criterion must beat.

    >>> random_scores(3, np.random.default_rng(0)).shape
    (3,)
    """
    return rng.random(units)
