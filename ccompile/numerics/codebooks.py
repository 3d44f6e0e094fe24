"""Weights that share a few values, fitted in the metric of the inputs: where the values start, and how they settle.

minimise  sum_p tr( (What_p - W_p) H_p (What_p - W_p)^T )   over matrices p (the groups of a convolution), whose
entries come from tables of free levels, or from a pattern times a scale: one for all, one per row, or one per block of
columns of a row.

Levels start as the exact one-dimensional k-means of the weights, each weighted by what its error costs; scales as the
best of a grid of clippings by the same cost. Codes come from error feedback; then parameters and codes are bettered in
turn (see levels).
Source: Gong et al. 2014, arXiv:1412.6115; Choi et al. 2017, arXiv:1612.01543 (Hessian weights, entropy constraint);
Kim et al. 2023, arXiv:2306.07629 (SqueezeLLM); Frantar et al. 2022, arXiv:2210.17323 (feedback); Banner et al. 2018,
arXiv:1810.05723 (clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ccompile.numerics import kmeans, levels
from ccompile.numerics.levels import Coded, Scaled, Structure

Array = npt.NDArray[Any]
Scope = Literal["tensor", "channel", "group"]
Start = Literal["optimal", "lloyd", "mixture"]
Rounding = Literal["nearest", "feedback", "stochastic"]
S = TypeVar("S", bound=Structure)

ROUNDS = 4  # most times that parameters and codes are bettered in turn
PROGRESS = 1e-2  # the share of the loss that a round must still gain
CLIPPINGS = np.linspace(1.0, 0.2, 40)  # scales tried, of the range that the largest weight needs
HALVINGS = 2.0 ** -np.arange(8)  # powers of two tried


@dataclass(frozen=True)
class Layout:
    """What has parameters of its own: a weight, each row, or blocks of `columns` of a row."""

    scope: Scope = "tensor"
    columns: int = 0

    def tables(self, W: Sequence[Array]) -> list[Array]:
        """Return which table each entry of each matrix takes, [o or 1, d or 1]."""
        if self.scope == "tensor":
            return [np.zeros((1, 1), np.int64) for _ in W]
        found, begin = [], 0
        for each in W:
            o, d = each.shape
            size = self.columns if self.scope == "group" else d
            blocks = -(-d // size)
            rows = begin + blocks * np.arange(o)[:, None]
            found.append(rows + np.arange(d)[None, :] // size if blocks > 1 else rows)
            begin += o * blocks
        return found


@dataclass(frozen=True)
class Levels:
    """How `fit` finds k free levels per table.

    weighted: by what errors cost; half: rounded to float16; rough: from the start and feedback alone, for a curve.
    """

    k: int
    layout: Layout = Layout()
    start: Start = "optimal"
    weighted: bool = True
    feedback: bool = True
    half: bool = False
    rough: bool = False


@dataclass(frozen=True)
class Grid:
    """How `quantise` finds scales of a pattern.

    search: clip where that loses less; power: scales are powers of two; rough: as in Levels. Scales are rounded to
    float16 with `half`, else to float32, so that they are what a file holds.
    """

    pattern: tuple[float, ...]
    layout: Layout = Layout()
    search: bool = True
    power: bool = False
    rounding: Rounding = "feedback"
    half: bool = False
    seed: int = 0
    rough: bool = False


def fit(
    W: Sequence[Array], H: Sequence[Array | None], plan: Levels, mask: Sequence[Array] | None = None
) -> list[Coded]:
    """Return each matrix coded. W[p][o, d], H[p][d, d] or None; mask[p]: False where an entry is held at zero.

    With a mask one of the k values is the zero. Raises ValueError for k < 1, or < 2 with a mask.
    """
    k = plan.k - (mask is not None)
    if k < 1:
        raise ValueError(f"{plan.k} values: there must be one, and one more where zeros are kept")
    masks: Sequence[Array | None] = mask if mask is not None else [None] * len(W)
    layout = plan.layout.tables(W)
    values, cost = _samples(W, H if plan.weighted else [None] * len(W), masks, layout)
    tables = (
        _many(values, cost, k) if len(values) > 1 and plan.start == "optimal" else _each(values, cost, k, plan.start)
    )
    parts = [
        Coded(table=table, code=np.zeros(each.shape, np.int32), mask=held, tables=tables)
        for table, each, held in zip(layout, W, masks, strict=True)
    ]
    return bettered(parts, W, H, plan.feedback, _half_levels if plan.half else None, 0 if plan.rough else ROUNDS)


def fit_with_outliers(
    W: Sequence[Array], H: Sequence[Array | None], plan: Levels, share: float, mask: Sequence[Array] | None = None
) -> list[Array]:
    """Return What of each matrix: codes as by `fit`, but that share of the weights have values of their own.

    Outliers are what levels alone serve worst, e^2 H_jj, over all matrices. Their values solve the normal equations
    given the codes, then the codes descend once more given them. W, H and mask as in `fit`.
    Source: Kim et al. 2023, arXiv:2306.07629 (dense and sparse).
    """
    first = fit(W, H, replace(plan, rough=True), mask)
    cost = [
        np.square(part.values - each) * (1.0 if metric is None else np.maximum(metric.diagonal(), 0))
        for part, each, metric in zip(first, W, H, strict=True)
    ]
    flat = np.concatenate([each.ravel() for each in cost])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[: round(share * flat.size)]] = True
    out = [part.reshape(W[0].shape) for part in np.split(chosen & (flat > 0), len(W))]
    rest = [each if mask is None else each & mask[p] for p, each in enumerate(~one for one in out)]
    own = [np.where(one, each, 0.0) for one, each in zip(out, W, strict=True)]
    # A mask spends a value on zeros; those of outliers need none.
    coded = fit([each - s for each, s in zip(W, own, strict=True)], H, replace(plan, k=plan.k + (mask is None)), rest)
    for p, (each, metric) in enumerate(zip(W, H, strict=True)):
        values = _regressed(each - coded[p].values, metric, out[p])
        own[p] = levels.half(values, np.abs(values).max(initial=0.0))
    again = levels.descend if plan.feedback else levels.round_to
    coded = [again(part, W[p] - own[p], H[p]) for p, part in enumerate(coded)]
    return [part.values + s for part, s in zip(coded, own, strict=True)]


def _regressed(W: Array, H: Array | None, free: Array) -> Array:
    """Return S[o, d], zero but where `free`, of least tr((S - W) H (S - W)^T), row by row."""
    found = np.where(free, W, 0.0)
    if H is None:
        return found
    pull = W @ H
    for row in np.flatnonzero(free.any(1)):
        at = np.flatnonzero(free[row])
        own = H[np.ix_(at, at)]
        own = own + 1e-9 * (float(own.diagonal().mean()) or 1.0) * np.eye(len(at))
        found[row, at] = np.linalg.solve(own, pull[row, at])
    return found


def quantise(
    W: Sequence[Array], H: Sequence[Array | None], plan: Grid, mask: Sequence[Array] | None = None
) -> list[Scaled]:
    """Return each matrix as a pattern times scales. W[p][o, d], H[p][d, d] or None; mask as in `fit`."""
    pattern = np.array(plan.pattern, np.float64)
    masks: Sequence[Array | None] = mask if mask is not None else [None] * len(W)
    layout = plan.layout.tables(W)
    scale = _clipped(*_samples(W, H, masks, layout), pattern, plan)
    fixed = plan.power or not plan.search
    rounded = _half_scale if plan.half else _single_scale
    parts = [
        rounded(Scaled(table=table, code=np.zeros(each.shape, np.int32), mask=held, pattern=pattern, scale=scale))
        for table, each, held in zip(layout, W, masks, strict=True)
    ]
    if fixed:
        parts = [replace(part, fixed=True) for part in parts]
    if plan.rounding == "stochastic":
        rng = np.random.default_rng(plan.seed)
        return [_stochastic(part, each, rng) for part, each in zip(parts, W, strict=True)]
    rounds = 0 if plan.rough else ROUNDS
    return bettered(parts, W, H, plan.rounding == "feedback", None if fixed else rounded, rounds)


def bettered(
    parts: Sequence[S],
    W: Sequence[Array],
    H: Sequence[Array | None],
    feedback: bool = True,
    rounded: Callable[[S], S] | None = None,
    rounds: int = ROUNDS,
) -> list[S]:
    """Return parts with codes, and parameters and codes bettered in turn while that pays.

    feedback: codes by error feedback and descent, not by rounding alone. rounded: makes parameters representable; the
    codes are fitted to what it makes. rounds: most turns; without any, feedback is all.
    """

    def move(parts: Sequence[S], step: Callable[[S, Array, Array | None], S]) -> list[S]:
        return [step(part, each, metric) for part, each, metric in zip(parts, W, H, strict=True)]

    again: Callable[[S, Array, Array | None], S] = levels.descend if feedback else levels.round_to
    best = move(parts, levels.feedback if feedback else levels.round_to)
    least = lost(best, W, H)
    for _ in range(rounds):
        trial = move(levels.settle(best, W, H), again)
        now = lost(trial, W, H)
        if now >= least:
            break
        gained, best, least = least - now, trial, now
        if gained <= PROGRESS * now:
            break
    return best if rounded is None or not rounds else move([rounded(part) for part in best], again)


def lost(parts: Sequence[Structure], W: Sequence[Array], H: Sequence[Array | None]) -> float:
    """Return the summed loss."""
    return sum(levels.loss(each, metric, part.values) for part, each, metric in zip(parts, W, H, strict=True))


def integers(bits: int) -> tuple[float, ...]:
    """Return the signed integers of so many bits.

    >>> integers(2)
    (-2.0, -1.0, 0.0, 1.0)
    """
    return tuple(float(number) for number in range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def powers(bits: int) -> tuple[float, ...]:
    """Return 0 and signed powers of two from 1 down, in 2^bits - 1 values.

    >>> powers(3)
    (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    """
    positive = [2.0**-exponent for exponent in range(2 ** (bits - 1) - 1)]
    return tuple([-power for power in positive] + [0.0] + positive[::-1])


def _samples(
    W: Sequence[Array], H: Sequence[Array | None], masks: Sequence[Array | None], layout: Sequence[Array]
) -> tuple[Array, Array]:
    """Return the weights [t, n] of each table and what their squared errors cost: nothing where held at zero.

    Where a row's last block is short, others are repeated at no cost.
    """
    values, costs = [], []
    for each, metric, held, table in zip(W, H, masks, layout, strict=True):
        cost = np.ones(each.shape) if metric is None else np.broadcast_to(np.maximum(metric.diagonal(), 0), each.shape)
        cost = cost if held is None else np.where(held, cost, 0.0)
        blocks = len(np.unique(table[0]))
        size = -(-each.shape[1] // blocks)
        short = blocks * size - each.shape[1]
        values.append(np.pad(each, ((0, 0), (0, short)), mode="wrap").reshape(-1, size))
        costs.append(np.pad(cost, ((0, 0), (0, short))).reshape(-1, size))
    flat, cost = np.concatenate(values), np.concatenate(costs)
    if max(int(table.max()) for table in layout) == 0:
        return flat.reshape(1, -1), cost.reshape(1, -1)
    return flat, cost


def _many(values: Array, cost: Array, k: int) -> Array:
    """Return the k-means of each table, by their free weights."""
    alive = cost.any(1)
    # Where an entry costs nothing it takes the place of one that does, so that it makes no level.
    best = np.take_along_axis(values, cost.argmax(1)[:, None], 1)
    found = kmeans.many(np.where(cost > 0, values, best), cost, k)
    found[~alive] = np.where(np.arange(k) == 0, 0.0, np.inf)
    return found


def _each(values: Array, cost: Array, k: int, start: Start) -> Array:
    """Return the levels of each table, one after the other."""
    tables = np.full((len(values), k), np.inf)
    tables[:, 0] = 0.0
    for table, (row, price) in enumerate(zip(values, cost, strict=True)):
        if price.any():
            found = _means(row[price > 0], price[price > 0], k, start)
            tables[table, : len(found)] = found
    return tables


def _means(values: Array, cost: Array, k: int, start: Start) -> Array:
    if start == "mixture":
        return kmeans.mixture(values, cost, k)
    if start == "lloyd":
        return np.unique(kmeans.lloyd(values, cost, np.linspace(values.min(), values.max(), k)))
    return kmeans.centroids(values, cost, k)


def _clipped(values: Array, cost: Array, pattern: Array, plan: Grid) -> Array:
    """Return the scale [t] of a pattern that costs least on each row of values.

    Signs, and signs with zero, have a best scale in closed form; of other patterns clippings of what holds them all
    are tried.
    """
    values = np.where(cost > 0, values, 0.0)
    whole = np.maximum(values.max(1) / pattern[-1], values.min(1) / pattern[0])
    whole = np.where(whole > 0, whole, 1.0)
    if not plan.search:
        return 2.0 ** np.ceil(np.log2(whole)) if plan.power else whole
    if not plan.power and tuple(pattern) in ((-1.0, 1.0), (-1.0, 0.0, 1.0)):
        found = _sign_scale(np.abs(values), cost, len(pattern) == 3)
        return np.where(found > 0, found, 1.0)
    whole = 2.0 ** np.ceil(np.log2(whole)) if plan.power else whole
    none = np.zeros((1, 1), np.int32)
    unit = Scaled(table=none, code=none, pattern=pattern, scale=np.ones(1))
    best, least = whole, np.full(len(values), np.inf)
    for ratio in HALVINGS if plan.power else CLIPPINGS:
        scale = (whole * ratio)[:, None]
        now = (cost * np.square(pattern[unit.nearest(values / scale)] * scale - values)).sum(1)
        best, least = np.where(now < least, whole * ratio, best), np.minimum(now, least)
    return best


def _sign_scale(sizes: Array, cost: Array, zero: bool) -> Array:
    """Return the scale [t] that costs least for values of sizes[t, n] >= 0 as {-1, 1}, or {-1, 0, 1} with `zero`.

    Of the k that stay it is their mean size, and these k are the largest: those of the greatest (sum)^2 / k, all
    counted by cost. Source: Rastegari et al. 2016, arXiv:1603.05279; Li et al. 2016, arXiv:1605.04711, section 2.
    """
    order = np.argsort(-sizes, axis=1, kind="stable")
    ranked, mass = np.take_along_axis(sizes, order, 1), np.take_along_axis(cost, order, 1)
    counts, sums = np.cumsum(mass, axis=1), np.cumsum(mass * ranked, axis=1)
    counts = np.where(counts > 0, counts, 1.0)
    kept = (sums**2 / counts).argmax(1) if zero else np.full(len(sizes), sizes.shape[1] - 1)
    rows = np.arange(len(sizes))
    scale: Array = sums[rows, kept] / counts[rows, kept]
    return scale


def _stochastic(part: Scaled, W: Array, rng: np.random.Generator) -> Scaled:
    """Return codes of the value below or above, at random, so that each weight's expectation is its value.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
    """
    relative = W / np.broadcast_to(part.scale[part.table], W.shape)
    above = np.clip(np.searchsorted(part.pattern, relative, side="right"), 1, len(part.pattern) - 1)
    low, high = part.pattern[above - 1], part.pattern[above]
    share = np.clip((relative - low) / (high - low), 0.0, 1.0)
    return part.coded((above - 1 + (rng.random(W.shape) < share)).astype(np.int32))


def _half_levels(part: Coded) -> Coded:
    largest = np.abs(np.where(np.isfinite(part.tables), part.tables, 0.0)).max(1, keepdims=True)
    return part.with_tables(levels.half(part.tables, largest))


def _half_scale(part: Scaled) -> Scaled:
    return replace(part, scale=levels.half(part.scale, part.scale))


def _single_scale(part: Scaled) -> Scaled:
    return replace(part, scale=part.scale.astype(np.float32).astype(np.float64))
