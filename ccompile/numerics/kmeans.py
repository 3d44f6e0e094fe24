"""One-dimensional k-means: exact by dynamic programming, Lloyd's steps, and soft sharing by a Gaussian mixture.

minimise  sum_i h_i (w_i - c_{a(i)})^2  over k centroids c and assignments a; h_i >= 0.

In one dimension clusters are intervals of the sorted values, so the optimum over the first j values is

    D[k][j] = min_i D[k-1][i] + cost(i, j),    cost from prefix sums of h, h w and h w^2,

whose leftmost minimiser rises with j: divide and conquer finds a row in O(n log n).
Source: Wang and Song 2011 (Ckmeans.1d.dp); Gong et al. 2014, arXiv:1412.6115 (weights of networks); Choi et al. 2017,
arXiv:1612.01543 (Hessian weights); Ullrich et al. 2017, arXiv:1702.04008 and Nowlan and Hinton 1992 (soft sharing).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CELLS = 4096  # more distinct values than this are merged into as many cells before the dynamic program
ROW_CELLS, ROW_COSTS, ROW_STEPS = 64, 1 << 21, 12  # of many rows: cells, costs of intervals at once, steps of Lloyd
EVEN = 0.2  # the share of cells that go by count, not by density
STEPS = 50  # most steps of Lloyd and of the mixture


def centroids(values: Array, weights: Array | None, k: int, cells: int = CELLS) -> Array:
    """Return at most k centroids, ascending, that are optimal for values[n] with weights[n] >= 0.

    Exact up to `cells` distinct values; more are merged into cells (see _edges), and Lloyd's steps on the values
    themselves follow. Values of no weight move nothing.

    >>> centroids(np.array([0.0, 1.0, 10.0, 12.0]), None, 2).tolist()
    [0.5, 11.0]
    """
    values, weights = _checked(values, weights, k)
    distinct, where = np.unique(values, return_inverse=True)
    mass = np.bincount(where, weights, len(distinct))
    distinct, mass = distinct[mass > 0], mass[mass > 0]
    if len(distinct) <= k:
        return distinct
    if len(distinct) <= cells:
        return _dynamic(distinct, mass, k)
    means, masses = _merged(distinct, mass, cells)
    return lloyd(distinct, mass, _dynamic(means, masses, k))


def _merged(distinct: Array, mass: Array, cells: int) -> tuple[Array, Array]:
    """Return the means and masses of at most so many neighbourhoods of ascending values."""
    edges = np.unique(_edges(distinct[None], mass[None], min(cells, len(distinct)))[0])
    masses = np.add.reduceat(mass, edges[:-1])
    return np.add.reduceat(mass * distinct, edges[:-1]) / masses, masses


def many(values: Array, weights: Array, k: int, cells: int = ROW_CELLS) -> Array:
    """Return the centroids[r, k] of each row of values[r, n] with weights[r, n] >= 0, ascending, padded with +inf.

    All rows at once: optimal over neighbourhoods (`cells` of them, or twice k; beyond 2 `cells` levels each is one),
    then Lloyd's steps. Exact where a row has at most k distinct values, and where n <= cells and Lloyd has no say.

    >>> many(np.array([[0.0, 1.0, 10.0, 12.0], [1.0, 1.0, 1.0, 1.0]]), np.ones((2, 4)), 2).tolist()
    [[0.5, 11.0], [1.0, inf]]
    """
    order = np.argsort(values, axis=1, kind="stable")
    ranked, mass = np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1)
    r, n = ranked.shape
    mass = np.where(mass.sum(1, keepdims=True) > 0, mass, 1.0)
    step = np.diff(ranked, axis=1) > 0
    place = np.concatenate([np.zeros((r, 1), np.int64), np.cumsum(step, axis=1)], axis=1)  # among distinct values
    few = place[:, -1] < k
    found = np.full((r, k), np.inf)
    rows = np.flatnonzero(few)
    found[np.repeat(rows, n), place[few].ravel()] = ranked[few].ravel()
    if not few.all():
        found[~few] = _settled(ranked[~few], mass[~few], k, cells)
    return found


def _settled(ranked: Array, mass: Array, k: int, cells: int) -> Array:
    """Return the centroids[r, k] of sorted rows[r, n] of more than k distinct values."""
    r, n = ranked.shape
    middle = (mass * ranked).sum(1, keepdims=True) / mass.sum(1, keepdims=True)
    ranked = ranked - middle  # so that sums of squares keep their digits
    sums = np.concatenate([np.zeros((3, r, 1)), np.cumsum([mass, mass * ranked, mass * ranked**2], axis=2)], axis=2)
    wanted = k if k > 2 * cells else max(cells, 2 * k)
    edges = _edges(ranked, mass, min(wanted, n))
    found = _means_of(sums, ranked, edges if edges.shape[1] == k + 1 else _dynamic_rows(sums, k, edges))
    for _ in range(ROW_STEPS):
        middles = (found[:, 1:] + found[:, :-1]) / 2
        below = [(ranked <= between[:, None]).sum(1) for between in middles.T]
        moved = _means_of(sums, ranked, np.stack([np.zeros(r, np.int64), *below, np.full(r, n)], axis=1))
        if np.array_equal(moved, found):
            break
        found = moved
    centroids: Array = found + middle
    return centroids


def _edges(ranked: Array, mass: Array, count: int) -> Array:
    """Return the edges[r, count + 1] of cells of sorted rows, as dense as the best levels of a smooth density are.

    Those go by (h f)^(1/3) for values of density f: an entry's share is h^(1/3) gap^(2/3), its gap 1 / f n.
    Source: Panter and Dite 1951.
    """
    r, n = ranked.shape
    if count == n:
        return np.broadcast_to(np.arange(n + 1), (r, n + 1))
    share = np.cbrt(mass * np.square(np.gradient(ranked, axis=1)))
    share = (1 - EVEN) * share / np.maximum(share.sum(1, keepdims=True), 1e-300) + EVEN / n
    below = (np.cumsum(share, axis=1) - share / 2) * (1 - 1e-12)
    cell = np.clip((below * count).astype(np.int64), 0, count - 1) + count * np.arange(r)[:, None]
    held = np.bincount(cell.ravel(), minlength=r * count).reshape(r, count)
    return np.concatenate([np.zeros((r, 1), np.int64), np.cumsum(held, axis=1)], axis=1)


def _means_of(sums: Array, ranked: Array, cuts: Array) -> Array:
    """Return the means [r, k] of sorted rows between cuts[r, k + 1]; of an empty or weightless part a near value."""
    parts = np.diff(np.take_along_axis(sums, np.broadcast_to(cuts, (3, *cuts.shape)), 2), axis=2)
    near = np.take_along_axis(ranked, np.minimum(cuts[:, :-1], ranked.shape[1] - 1), 1)
    means = np.where(parts[0] > 0, parts[1] / np.where(parts[0] > 0, parts[0], 1.0), near)
    return np.maximum.accumulate(means, axis=1)


def _dynamic_rows(sums: Array, k: int, edges: Array) -> Array:
    """Return the cuts[r, k + 1] that are best among edges[r, c + 1], from prefix sums[3, r, n + 1]."""
    r, c = edges.shape[0], edges.shape[1] - 1
    chosen, chunk = np.empty((r, k + 1), np.int64), max(1, ROW_COSTS // c**2)
    for begin in range(0, r, chunk):
        at_edges = np.broadcast_to(edges[begin : begin + chunk], (3, *edges[begin : begin + chunk].shape))
        part = np.take_along_axis(sums[:, begin : begin + chunk], at_edges, 2)
        mass, first, second = (row[:, None, :] - row[:, :, None] for row in part)  # [r, from, to]
        cost = np.maximum(second - first**2 / np.where(mass > 0, mass, 1.0), 0.0)
        cost = np.where(np.arange(c + 1)[:, None] <= np.arange(c + 1), cost, np.inf)
        best, starts = cost[:, 0], []
        for _ in range(1, k):
            total = best[:, :, None] + cost
            starts.append(total.argmin(1))
            best = np.take_along_axis(total, starts[-1][:, None], 1)[:, 0]
        at = np.full(len(best), c)
        chosen[begin : begin + len(best), k] = at
        for cluster in range(k - 1, 0, -1):
            at = np.take_along_axis(starts[cluster - 1], at[:, None], 1)[:, 0]
            chosen[begin : begin + len(best), cluster] = at
        chosen[begin : begin + len(best), 0] = 0
    return np.take_along_axis(edges, chosen, 1)


def lloyd(values: Array, weights: Array | None, start: Array) -> Array:
    """Return centroids[k], ascending, to which Lloyd's steps lead from `start`; the cost never rises.

    >>> lloyd(np.array([0.0, 1.0, 10.0, 12.0]), None, np.array([0.0, 1.0])).tolist()
    [0.5, 11.0]
    """
    values, weights = _checked(values, weights, len(start))
    order = np.argsort(values, kind="stable")
    sums = _prefix(values[order], weights[order])
    ranked, found = values[order], np.sort(start.astype(np.float64))
    for _ in range(STEPS):
        edges = np.concatenate([[0], np.searchsorted(ranked, (found[1:] + found[:-1]) / 2), [len(ranked)]])
        mass, first = np.diff(sums[0][edges]), np.diff(sums[1][edges])
        moved = np.where(mass > 0, first / np.where(mass > 0, mass, 1.0), found)
        moved = np.sort(moved)
        if np.array_equal(moved, found):
            break
        found = moved
    return found


def mixture(values: Array, weights: Array | None, k: int, zero: float | None = None) -> Array:
    """Return the means, ascending, of a mixture of k Gaussians fitted by expectation maximisation from k-means.

    zero: the share of the component whose mean stays 0, or None for no such component. Components that lose all their
    values are left out.

    >>> mixture(np.array([-1.01, -0.99, 0.99, 1.01]), None, 2).round(6).tolist()
    [-1.0, 1.0]
    """
    values, weights = _checked(values, weights, k)
    distinct, where = np.unique(values, return_inverse=True)
    mass = np.bincount(where, weights, len(distinct))
    values, weights = _merged(distinct[mass > 0], mass[mass > 0], CELLS)
    means = centroids(values, weights, k)
    fixed = int(np.abs(means).argmin()) if zero is not None else -1
    if fixed >= 0:
        means[fixed] = 0.0
    total = weights.sum()
    spread = np.full(len(means), max(float(np.sqrt((weights * values**2).sum() / total)) / len(means), 1e-12))
    least = 1e-3 * float(spread[0])
    shares = np.full(len(means), 1.0 / len(means))
    for _ in range(STEPS):
        if fixed >= 0 and zero is not None:
            shares = _with_share(shares, fixed, zero)
        log = np.log(np.maximum(shares, 1e-300)) - np.log(spread) - np.square((values[:, None] - means) / spread) / 2
        member = np.exp(log - log.max(1, keepdims=True))
        member *= (weights / member.sum(1))[:, None]
        mass = member.sum(0)
        alive = mass > 1e-9 * total
        moved = np.where(alive, (member * values[:, None]).sum(0) / np.where(alive, mass, 1.0), means)
        if fixed >= 0:
            moved[fixed] = 0.0
        variance = (member * np.square(values[:, None] - moved)).sum(0) / np.where(alive, mass, 1.0)
        spread, shares = np.maximum(np.sqrt(variance), least), mass / total
        done, means = np.allclose(moved, means, rtol=1e-9, atol=0), moved
        if done:
            break
    keep = (mass > 1e-9 * total) | (np.arange(len(means)) == fixed)
    return np.sort(means[keep])


def _with_share(shares: Array, fixed: int, zero: float) -> Array:
    """Return shares that sum to 1 with a given one at `fixed`."""
    others = np.delete(shares, fixed)
    scaled = others * (1 - zero) / max(float(others.sum()), 1e-300)
    return np.insert(scaled, fixed, zero)


def cost(values: Array, weights: Array | None, found: Array) -> float:
    """Return sum h (w - c)^2, each value at its nearest centroid.

    >>> cost(np.array([0.0, 1.0, 10.0]), None, np.array([0.5, 10.0]))
    0.5
    """
    values, weights = _checked(values, weights, len(found))
    return float((weights * np.square(values - nearest(values, found))).sum())


def nearest(values: Array, found: Array) -> Array:
    """Return the nearest of ascending centroids[k] for each value; of two as near the lower."""
    quantised: Array = found[index(values, found)]
    return quantised


def index(values: Array, found: Array) -> Array:
    """Return which of ascending centroids[k] is nearest to each value; of two as near the lower.

    >>> index(np.array([0.4, 0.5, 2.0]), np.array([0.0, 1.0])).tolist()
    [0, 0, 1]
    """
    return np.searchsorted((found[1:] + found[:-1]) / 2, values, side="left")


def _prefix(values: Array, weights: Array) -> Array:
    """Return prefix sums [3, n + 1] of h, h w, h w^2."""
    terms = np.stack([weights, weights * values, weights * values**2])
    return np.concatenate([np.zeros((3, 1)), np.cumsum(terms, axis=1)], axis=1)


def _dynamic(values: Array, weights: Array, k: int) -> Array:
    """Return the k optimal centroids of ascending distinct values with positive weights."""
    centre = float((weights * values).sum() / weights.sum())
    sums, n = _prefix(values - centre, weights), len(values)

    def between(start: Array, stop: Array) -> Array:
        mass, first, second = (row[stop] - row[start] for row in sums)
        spread: Array = np.maximum(second - first**2 / np.where(mass > 0, mass, 1.0), 0.0)
        return spread

    stops = np.arange(n + 1)
    best = between(np.zeros(n + 1, np.int64), stops)
    starts = np.zeros((k, n + 1), np.int64)
    for clusters in range(1, k):
        best, starts[clusters] = _row(best, between, clusters, n)
    edges = [n]
    for clusters in range(k - 1, -1, -1):
        edges.append(int(starts[clusters][edges[-1]]))
    cut = np.array(edges[::-1])
    means: Array = np.diff(sums[1][cut]) / np.diff(sums[0][cut]) + centre
    return means


def _row(before: Array, between: Any, clusters: int, n: int) -> tuple[Array, Array]:
    """Return D[j] = min_i before[i] + between(i, j) and its leftmost argmin, i >= clusters (each holds a value)."""
    best, start = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    # Intervals of j whose middles are solved level by level; [low, high] bounds the argmin by what neighbours found.
    first, last = np.array([clusters + 1]), np.array([n])
    low, high = np.array([clusters]), np.array([n - 1])
    while len(first):
        middle = (first + last) // 2
        top = np.minimum(high, middle - 1)
        lengths = top - low + 1
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        options = np.arange(int(lengths.sum())) - np.repeat(offsets - low, lengths)
        total = before[options] + between(options, np.repeat(middle, lengths))
        least = np.minimum.reduceat(total, offsets)
        hits = np.flatnonzero(total == np.repeat(least, lengths))
        chosen = options[hits[np.searchsorted(hits, offsets)]]
        best[middle], start[middle] = least, chosen
        left, right = first < middle, middle < last
        first, last, low, high = (
            np.concatenate([first[left], middle[right] + 1]),
            np.concatenate([middle[left] - 1, last[right]]),
            np.concatenate([low[left], chosen[right]]),
            np.concatenate([chosen[left], high[right]]),
        )
    return best, start


def _checked(values: Array, weights: Array | None, k: int) -> tuple[Array, Array]:
    if k < 1 or not values.size:
        raise ValueError(f"k-means needs values and at least one cluster, got {values.size} and {k}")
    flat = values.reshape(-1).astype(np.float64)
    mass = np.ones(flat.size) if weights is None else weights.reshape(-1).astype(np.float64)
    if mass.shape != flat.shape or not (np.isfinite(flat).all() and np.isfinite(mass).all()) or (mass < 0).any():
        raise ValueError("k-means needs one finite weight >= 0 for each finite value")
    if not mass.any():
        mass = np.ones(flat.size)
    return flat, mass
