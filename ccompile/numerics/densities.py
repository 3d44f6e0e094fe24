"""Lines of a matrix of bits put into classes of like density, so that each class is coded with its own statistics.

A class of m bits, k of them set, costs m h(k / m) bits. Neighbours in the order of density are merged greedily, at each
step the two whose union costs least more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FINEST = 64  # classes to start from


def bits_cost(ones: Array, size: Array) -> Array:
    """Return size * h(ones / size), the bits that tell which of `size` bits are set.

    >>> bits_cost(np.array([0, 1, 4]), np.array([8, 2, 8])).tolist()
    [0.0, 2.0, 8.0]
    """
    share = ones / np.maximum(size, 1)
    least = np.finfo(np.float64).tiny  # 0 log 0 = 0
    set_bits = ones * np.log2(np.maximum(share, least))
    return np.asarray(-set_bits - (size - ones) * np.log2(np.maximum(1 - share, least)))


def partitions(ones: Array, length: int, most: int) -> list[Array]:
    """Return the classes of all lines, numbered by density, in partitions into 1, 2, ... classes, `most` at most.

    ones[lines]: the bits set in each line of `length`. Lines of one density are never told apart.
    """
    order = np.argsort(ones, kind="stable")
    ranked = ones[order]
    steps = 1 + np.flatnonzero(np.diff(ranked))
    kept = np.unique(np.linspace(0, steps.size - 1, min(_FINEST - 1, steps.size)).astype(np.int64))
    edges = np.concatenate([[0], steps[kept], [ones.size]])
    total = np.append(0, np.cumsum(ranked))
    found: list[Array] = []
    while True:
        if edges.size - 1 <= most:
            labels = np.empty(ones.size, np.int64)
            labels[order] = np.repeat(np.arange(edges.size - 1), np.diff(edges))
            found.insert(0, labels)
        if edges.size == 2:
            return found
        counts, sizes = np.diff(total[edges]), np.diff(edges) * length
        apart = bits_cost(counts, sizes)
        together = bits_cost(counts[:-1] + counts[1:], sizes[:-1] + sizes[1:])
        edges = np.delete(edges, 1 + int((together - apart[:-1] - apart[1:]).argmin()))
