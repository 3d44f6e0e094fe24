"""Put items into clusters so that each lies near the subspace of its cluster; sizes may be made equal.

An item is a few vectors X[k, v]; a cluster has an orthonormal Q[q, v], and an item gains |X Q^T|^2 there. Alternating,
each item goes where it gains most and Q becomes the leading right singular vectors of the members; the total gain never
falls. Signs and scales of items do not matter: with q = 1 the clusters are lines.

Source: Bradley and Mangasarian 2000 (k-plane clustering); Denton et al. 2014, arXiv:1404.0736 (filters).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SWEEPS = 50


def assign(gain: Array, balanced: bool) -> Array:
    """Return for each item of gain[n, clusters] the cluster of most gain; if balanced, sizes differ by one at most.

    The balanced assignment is the best there is (a linear assignment problem); ties go to the lower cluster.

    >>> gain = np.array([[3.0, 0.0], [2.0, 1.0]])
    >>> assign(gain, False).tolist(), assign(gain, True).tolist()
    ([0, 0], [0, 1])
    """
    from scipy.optimize import linear_sum_assignment

    n, clusters = gain.shape
    if not balanced:
        return np.asarray(gain.argmax(1))
    least, extra = divmod(n, clusters)
    slots = np.repeat(np.arange(clusters), least)
    if extra:
        slots = np.concatenate([slots, np.arange(clusters)])
    cost = np.zeros((len(slots), len(slots)))
    cost[:n] = -gain[:, slots]
    # What fills the matrix up may only take the one place that a cluster can do without.
    cost[n:, : clusters * least] = np.abs(gain).max(initial=1.0) * (2 * n + 1)
    rows, columns = linear_sum_assignment(cost)
    return np.asarray(slots[columns[np.argsort(rows)][:n]])


def subspaces(items: Array, labels: Array, clusters: int, dimension: int) -> Array:
    """Return Q[clusters, q, v], the leading directions of the items[n, k, v] of each cluster; zeros past their rank.

    >>> subspaces(np.array([[[0.0, 2.0]], [[0.0, -1.0]]]), np.array([0, 0]), 1, 1).round(9).tolist()
    [[[0.0, 1.0]]]
    """
    Q = np.zeros((clusters, dimension, items.shape[2]))
    for cluster in range(clusters):
        vectors = items[labels == cluster].reshape(-1, items.shape[2])
        if vectors.size:
            if len(vectors) > 2 * vectors.shape[1]:
                vectors = np.linalg.qr(vectors)[1]
            V = np.linalg.svd(vectors, full_matrices=False)[2][:dimension]
            signs = np.sign(np.take_along_axis(V, np.abs(V).argmax(1)[:, None], 1))
            Q[cluster, : len(V)] = V * np.where(signs < 0, -1.0, 1.0)
    return Q


def gains(items: Array, Q: Array) -> Array:
    """Return gain[n, clusters] of each of the items[n, k, v] in each cluster Q[clusters, q, v].

    >>> gains(np.array([[[3.0, 4.0]]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [[9.0, 16.0]]
    """
    return np.stack([np.square(items @ basis.T).sum((1, 2)) for basis in Q], 1)


def cluster(
    items: Array, clusters: int, dimension: int, balanced: bool = False, seed: int = 0, restarts: int = 8
) -> Array:
    """Return the label of each of the items[n, k, v], the best of `restarts` seeded starts.

    A start draws one item per cluster, each with a chance in proportion to what the clusters so far leave of it. Raises
    ValueError unless 1 <= clusters <= n.

    >>> cluster(np.array([[[1.0, 0.0]], [[-2.0, 0.0]], [[0.0, 1.0]], [[0.1, 3.0]]]), 2, 1).tolist()
    [0, 0, 1, 1]
    """
    if not 1 <= clusters <= len(items):
        raise ValueError(f"{clusters} clusters of {len(items)} items: need 1 .. {len(items)}")
    found = []
    for restart in range(restarts):
        rng = np.random.default_rng([seed, restart])
        labels = assign(gains(items, _start(items, clusters, dimension, rng)), balanced)
        labels = _settle(items, labels, clusters, dimension, balanced)
        gain = gains(items, subspaces(items, labels, clusters, dimension))
        found.append((float(gain[np.arange(len(items)), labels].sum()), labels))
    return _renamed(max(found, key=lambda pair: pair[0])[1])


def _start(items: Array, clusters: int, dimension: int, rng: np.random.Generator) -> Array:
    energy = np.square(items).sum((1, 2))
    most, left = np.zeros(len(items)), energy
    Q = np.zeros((clusters, dimension, items.shape[2]))
    for number in range(clusters):
        chance = left if left.sum() > 1e-12 * energy.sum() else np.ones(len(items))
        chosen = items[rng.choice(len(items), p=chance / chance.sum())]
        Q[number] = subspaces(chosen[None], np.zeros(1, int), 1, dimension)[0]
        most = np.maximum(most, gains(items, Q[number : number + 1])[:, 0])
        left = np.maximum(energy - most, 0.0)
    return Q


def _settle(items: Array, labels: Array, clusters: int, dimension: int, balanced: bool) -> Array:
    """Alternate until nothing moves; a cluster without items takes the item that fits its own worst."""
    energy = np.square(items).sum((1, 2))
    for _ in range(SWEEPS):
        gain = gains(items, subspaces(items, labels, clusters, dimension))
        moved = assign(gain, balanced)
        for empty in np.setdiff1d(np.arange(clusters), moved):
            lost = np.where(np.bincount(moved, minlength=clusters)[moved] > 1, energy - gain.max(1), -1.0)
            moved[lost.argmax()] = empty
        if np.array_equal(moved, labels):
            break
        labels = moved
    return labels


def _renamed(labels: Array) -> Array:
    """Return the labels numbered by where they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
