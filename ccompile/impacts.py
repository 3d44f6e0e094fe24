"""From local errors to what they do to the outputs: measured at a few strengths, interpolated between them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ccompile.core import Array

LEVELS = (0.75, 0.5, 0.25)  # shares of a site kept when its impact on the outputs is measured
LEAST = 1e-12  # an impact below is rounding


def interpolated(points: Mapping[float, float], errors: Array) -> Array:
    """Return the impact at each error: log-log between the measured points, proportional outside; never falling.

    Without points the errors themselves are returned.

    >>> interpolated({0.01: 1.0, 0.04: 4.0}, np.array([0.0, 0.02, 0.08])).round(6).tolist()
    [0.0, 2.0, 8.0]
    """
    if not points:
        return errors
    x = np.array(sorted(points))
    y = np.maximum.accumulate(np.array([max(points[error], LEAST) for error in x]))
    inside = np.exp(np.interp(np.log(np.clip(errors, x[0], x[-1])), np.log(x), np.log(y)))
    below, above = np.minimum(errors / x[0], 1.0), np.maximum(errors / x[-1], 1.0)
    impacts: Array = inside * below * above
    return impacts
