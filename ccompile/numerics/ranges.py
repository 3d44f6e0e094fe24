"""Ranges of activations: streamed histograms, what of a range is worth keeping, and the integer grid on it.

A grid maps q in 0 .. levels-1 to s (q - z); z is an integer, so that 0 is exact: zero padding adds nothing.

    s = (high - low) / (levels - 1),  z = round(-low / s),  low <= 0 <= high

Sources: Jacob et al. 2017, arXiv:1712.05877 (grid); Migacz 2017, "8-bit inference with TensorRT" (entropy); Nagel et
al. 2021, arXiv:2106.08295, section 3 (mean squared error).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BINS = 4096
_SAMPLE = 1 << 18  # elements of a batch that are counted; its extremes are exact
_SHRINK = np.linspace(1.0, 0.2, 41)  # the shares of a range that are tried


@dataclass
class Histogram:
    """Counts of values on bins [k w, (k + 1) w), w a power of two: bins merge in pairs where the range outgrows BINS.

    `low` and `high` are the exact extremes, counts those of at most _SAMPLE evenly spaced elements of each batch.
    """

    exponent: int = -1000
    start: int = 0
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: Array) -> None:
        """Count an array of any shape; what is not finite is left out."""
        flat = values.reshape(-1)
        flat = flat[:: max(1, flat.size // _SAMPLE) | 1] if flat.size > _SAMPLE else flat
        ends = [float(values.min(initial=math.inf)), float(values.max(initial=-math.inf))]
        if not all(map(math.isfinite, ends)):
            whole = values.reshape(-1)[np.isfinite(values.reshape(-1))]
            ends = [float(whole.min(initial=math.inf)), float(whole.max(initial=-math.inf))]
            flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        self.low, self.high = min(self.low, ends[0]), max(self.high, ends[1])
        while not self._fits(self.low, self.high):
            self._merge()
        index = np.floor(np.ldexp(flat.astype(np.float64), -self.exponent)).astype(np.int64)
        first, last = int(index.min()), int(index.max())
        self._cover(first, last)
        self.counts += np.bincount(index - self.start, minlength=len(self.counts))

    @property
    def width(self) -> float:
        """Return the bins' width."""
        return math.ldexp(1.0, self.exponent)

    @property
    def centres(self) -> Array:
        """Return the middle of each bin."""
        middle: Array = (self.start + np.arange(len(self.counts)) + 0.5) * self.width
        return middle

    def within(self, low: float, high: float) -> Histogram:
        """Return the counts with what lies beyond limits taken to lie at them; low <= 0 <= high."""
        if low <= self.low and self.high <= high:
            return self
        ends = max(self.low, low), min(self.high, high)
        first, last = (math.floor(math.ldexp(end, -self.exponent)) for end in ends)
        first, last = (min(max(at - self.start, 0), len(self.counts) - 1) for at in (first, last))
        counts = self.counts[first : last + 1].copy()
        counts[0] += self.counts[:first].sum()
        counts[-1] += self.counts[last + 1 :].sum()
        return Histogram(self.exponent, self.start + first, counts, min(ends), max(ends))

    def quantile(self, share: float) -> float:
        """Return the value below which that share of all lies, to a bin, within the extremes.

        >>> found = Histogram()
        >>> found.add(np.arange(1000.0))
        >>> found.quantile(0.5), found.quantile(1.0)
        (499.5, 999.0)
        """
        summed = np.cumsum(self.counts)
        at = int(np.searchsorted(summed, share * summed[-1]))
        return min(max((self.start + at + 1) * self.width, self.low), self.high)

    def _fits(self, low: float, high: float) -> bool:
        if self.exponent == -1000:  # the first values: bins that hold twice their reach, if they have any
            reach = max(abs(low), abs(high))
            self.exponent = math.frexp(reach)[1] - int(math.log2(BINS)) + 1 if reach else -100
        first, last = (math.floor(math.ldexp(end, -self.exponent)) for end in (low, high))
        return last - first < BINS

    def _merge(self) -> None:
        if self.start % 2:
            self.start, self.counts = self.start - 1, np.concatenate([[0], self.counts])
        if len(self.counts) % 2:
            self.counts = np.concatenate([self.counts, [0]])
        self.start, self.counts = self.start // 2, self.counts.reshape(-1, 2).sum(1)
        self.exponent += 1

    def _cover(self, first: int, last: int) -> None:
        if not len(self.counts):
            self.start, self.counts = first, np.zeros(last - first + 1, np.int64)
            return
        before, after = max(0, self.start - first), max(0, last + 1 - self.start - len(self.counts))
        self.counts = np.concatenate([np.zeros(before, np.int64), self.counts, np.zeros(after, np.int64)])
        self.start -= before


@dataclass(frozen=True)
class Grid:
    """The values scale (q - zero), q = 0 .. levels - 1; scale is a float32 number."""

    scale: float
    zero: int
    levels: int = 256

    @property
    def low(self) -> float:
        """Return the least value."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """Return the greatest value."""
        return (self.levels - 1 - self.zero) * self.scale

    def encode(self, values: Array) -> Array:
        """Return the nearest levels, ties to even as the runtime rounds.

        >>> Grid(0.5, 2).encode(np.array([-9.0, 0.0, 0.3, 1.0])).tolist()
        [0, 2, 3, 4]
        """
        level = np.rint(np.asarray(values, np.float64) / self.scale) + self.zero
        codes: Array = np.clip(level, 0, self.levels - 1).astype(np.uint8)
        return codes

    def decode(self, codes: Array) -> Array:
        """Return the values of levels.

        >>> Grid(0.5, 2).decode(np.array([0, 2, 4], np.uint8)).tolist()
        [-1.0, 0.0, 1.0]
        """
        values: Array = (codes.astype(np.float64) - self.zero) * self.scale
        return values

    def holds(self, value: float) -> bool:
        """Return whether a value is one of the grid's, to a thousandth of a step."""
        level = value / self.scale + self.zero
        return abs(level - round(level)) < 1e-3 and 0 <= round(level) < self.levels


def grid(low: float, high: float, levels: int = 256) -> Grid:
    """Return the grid that spans [low, high], widened to hold 0.

    >>> grid(0.0, 2.55)
    Grid(scale=0.009999999776482582, zero=0, levels=256)
    >>> grid(-1.0, 1.0).holds(0.0)
    True
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = float(np.float32((high - low) / (levels - 1)))
    if not step > float(np.finfo(np.float32).tiny):
        return Grid(1.0, 0, levels)
    return Grid(step, min(max(round(-low / step), 0), levels - 1), levels)


def minmax(found: Histogram) -> tuple[float, float]:
    """Return the whole range."""
    return found.low, found.high


def percentile(found: Histogram, share: float) -> tuple[float, float]:
    """Return the range without the share (1 - share) / 2 of values at either end."""
    return found.quantile((1 - share) / 2), found.quantile((1 + share) / 2)


def squared_error(found: Histogram, low: float, high: float, levels: int = 256) -> float:
    """Return the mean squared error of rounding to the grid on [low, high]."""
    at, x = grid(low, high, levels), found.centres
    return float((np.square(at.decode(at.encode(x)) - x) * found.counts).sum() / found.counts.sum())


def least_squares(found: Histogram, levels: int = 256) -> tuple[float, float]:
    """Return the range of least mean squared error: both ends shrunk together, then one after the other."""
    low, high = found.low, found.high
    best = (squared_error(found, low, high, levels), low, high)
    best = min([best, *((squared_error(found, low * a, high * a, levels), low * a, high * a) for a in _SHRINK)])
    for _ in range(2):
        _, low, high = best
        best = min([best, *((squared_error(found, low * a, high, levels), low * a, high) for a in _SHRINK)])
        _, low, high = best
        best = min([best, *((squared_error(found, low, high * a, levels), low, high * a) for a in _SHRINK)])
    return best[1], best[2]


def divergence(found: Histogram, low: float, high: float, levels: int = 256) -> float:
    """Return KL(p | q): p the counts with what is outside at the ends, q those spread evenly over each grid step."""
    at, x = grid(low, high, levels), found.centres
    code = at.encode(x).astype(np.int64)
    inside = (x >= at.low - at.scale / 2) & (x <= at.high + at.scale / 2)
    seen = found.counts * inside
    p = seen.astype(np.float64)
    where = np.flatnonzero(inside)
    if not len(where) or not seen.any():
        return math.inf
    p[where[0]] += found.counts[: where[0]].sum()
    p[where[-1]] += found.counts[where[-1] + 1 :].sum()
    held = (found.counts > 0) & inside
    mass = np.bincount(code, seen, levels)
    bins = np.bincount(code, held, levels)
    q = np.where(held, mass[code] / np.maximum(bins[code], 1), 0.0)
    p, q = p / p.sum(), q / q.sum()
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())


def entropy(found: Histogram, levels: int = 256) -> tuple[float, float]:
    """Return the range of least divergence among those with both ends shrunk together."""
    best = min(_SHRINK, key=lambda share: divergence(found, found.low * share, found.high * share, levels))
    return found.low * float(best), found.high * float(best)


def shifted(low: float, high: float, shift: float, levels: int = 256) -> tuple[Grid, int] | None:
    """Return a grid on [low, high] in which `shift` is a whole number of steps, and that number; None where none is.

    y = x + shift is then the same codes with another zero. The step grows where that is needed, at most to double.

    >>> shifted(-1.0, 2.0, 0.0)[1]
    0
    >>> found, steps = shifted(-1.0, 2.0, 0.5)
    >>> round(found.scale * steps, 6), found.high >= 1.99
    (0.5, True)
    """
    plain = grid(low, high, levels)
    if not shift:
        return plain, 0
    exact = abs(shift) / plain.scale
    steps = math.floor(exact) if round(exact) > 1.03 * exact else round(exact)
    if not 1 <= steps < levels:
        return None
    scale = float(np.float32(abs(shift) / steps))
    zero = min(max(round(-min(low, 0.0) / scale), 0), levels - 1)
    return Grid(scale, zero, levels), steps if shift > 0 else -steps
