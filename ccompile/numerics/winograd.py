"""Fast convolution of short tiles: F(m, r) makes m outputs of an r-tap filter with m + r - 1 multiplications.

A product of polynomials of degrees r - 1 and m - 1 is known from its values at n = m + r - 1 points, one of them
infinity (Cook-Toom). Transposed, that is the correlation y[i] = sum_k g[k] d[i + k],

    y = A^T [ (G g) o (B^T d) ],     A^T[m, n], G[n, r], B^T[n, n],

exact over the rationals. All of B^T and A^T are dyadic where the points are, so that in floating point only the
filter's transform is rounded (it is a constant). F(m1, r1) x F(m2, r2) nest along two axes. Rounding errors grow with
the size of the intermediate values: for white data and filters, relative to the output,

    growth^2 = mean over i of  sum_p A^T[i, p]^2 |G[p]|^2 |B^T[p]|^2 / r,

which no scaling of rows changes; points are those that keep it least.

Source: Winograd 1980, Arithmetic complexity of computations; Lavin and Gray 2015, arXiv:1509.09308; points: Barabasz et
al. 2020, arXiv:1803.10986.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pair = tuple[int, int]
Matrix = tuple[tuple[Fraction, ...], ...]

LARGEST = 10  # multiplications per tile and axis: beyond, float32 keeps too little
ONE = 1  # which of the points is 1: all outputs take its product with the same weight
_HALF = Fraction(1, 2)
_POINTS = {  # beside 0, 1, -1 and infinity, by multiplications: those of least growth among dyadic ones
    5: (2,),
    6: (2, -_HALF),
    7: (2, -2, _HALF),
    8: (2, -2, _HALF, -_HALF),
    9: (2, -2, _HALF, -_HALF, 4),
    10: (2, -2, _HALF, -_HALF, 4, -Fraction(1, 4)),
}


@dataclass(frozen=True)
class Transform:
    """F(m, r) in exact numbers: `A`[m, n] = A^T, `G`[n, r], `B`[n, n] = B^T; rows scaled by powers of two."""

    m: int
    r: int
    A: Matrix
    G: Matrix
    B: Matrix

    @property
    def n(self) -> int:
        """Return the multiplications per tile."""
        return self.m + self.r - 1

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Return A^T[m, n], G[n, r] and B^T[n, n] in float64."""
        a, g, b = (np.array([[float(entry) for entry in row] for row in part]) for part in (self.A, self.G, self.B))
        return a, g, b

    @property
    def growth(self) -> float:
        """Return how many times the rounding error of a direct sum that of the transforms is, for white data."""
        A, G, B = self.arrays
        power = np.square(G).sum(1) * np.square(B).sum(1)
        return math.sqrt(float((np.square(A) @ power).mean()) / self.r)


@functools.cache
def transform(m: int, r: int) -> Transform:
    """Return F(m, r). Raises ValueError unless m >= 2, r >= 2 and m + r - 1 <= LARGEST.

    >>> [[str(entry) for entry in row] for row in transform(2, 3).A]
    [['1', '1/2', '1/2', '0'], ['0', '1/2', '-1/2', '1']]
    """
    n = m + r - 1
    if m < 2 or r < 2 or n > LARGEST:
        raise ValueError(f"F({m}, {r}) is not to be had: m and r are at least 2, m + r - 1 at most {LARGEST}")
    points = [Fraction(point) for point in (0, 1, -1, *_POINTS.get(n, ()))][: n - 1]
    rows = []
    for index, point in enumerate(points):
        others = points[:index] + points[index + 1 :]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        b = (*_expanded(others), Fraction(0))
        rows.append(([point**k / scale for k in range(r)], b, [point**i for i in range(m)]))
    rows.append(([Fraction(k == r - 1) for k in range(r)], _expanded(points), [Fraction(i == m - 1) for i in range(m)]))
    G, B, A = [], [], []
    for g, b, a in rows:  # |B| and |G| about 1, what is left over goes to A
        of_b, of_g = (Fraction(2) ** -round(math.log2(max(abs(entry) for entry in row))) for row in (b, g))
        B.append(tuple(entry * of_b for entry in b))
        G.append(tuple(entry * of_g for entry in g))
        A.append([entry / (of_b * of_g) for entry in a])
    return Transform(m, r, tuple(zip(*A, strict=True)), tuple(G), tuple(B))


def _expanded(roots: list[Fraction]) -> tuple[Fraction, ...]:
    """Return the coefficients of prod (x - root), the constant one first."""
    found = [Fraction(1)]
    for root in roots:
        found = [below - root * here for below, here in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return tuple(found)


def filters(W: Array, m: Pair) -> Array:
    """Return the transformed filters U[p, q, o, c, kh, kw] of W[o, c, rh, rw], p and q over multiplications.

    An axis with m = 1 is left alone: one p (or q), and kh = rh (or kw = rw); else kh (or kw) is 1.
    """
    down, right = (
        transform(tile, taps).arrays[1].T[:, :, None] if tile > 1 else np.eye(taps)[:, None]
        for tile, taps in zip(m, W.shape[2:], strict=True)
    )
    return np.ascontiguousarray(np.einsum("ocij,ipk,jql->pqockl", W.astype(np.float64), down, right, optimize=True))


def growth(m: Pair, kernel: Pair) -> float:
    """Return the growth of the nested transform: the product over the axes with m > 1.

    >>> growth((2, 1), (3, 3)) < growth((2, 2), (3, 3)) < growth((4, 4), (3, 3))
    True
    """
    return math.prod(transform(tile, taps).growth for tile, taps in zip(m, kernel, strict=True) if tile > 1)


def multiplications(m: Pair, kernel: Pair) -> float:
    """Return the multiplications per output and pair of channels.

    >>> multiplications((2, 2), (3, 3)), multiplications((4, 1), (3, 3))
    (4.0, 4.5)
    """
    axes = zip(m, kernel, strict=True)
    return math.prod((tile + taps - 1) / tile if tile > 1 else float(taps) for tile, taps in axes)


def error(m: Pair, kernel: Pair) -> float:
    """Return what the relative L2 error of an output in float32 stays below, for white data and filters.

    Measured: between one and four roundings of 2^-24, times the growth.

    >>> error((2, 1), (3, 3)) < 1e-6 < error((4, 4), (3, 3)) < 2e-6
    True
    """
    return 4 * 2.0**-24 * growth(m, kernel)
