"""What a fit needs to know of a linear layer: its form, and the moments of its inputs and target outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics.ranges import Histogram

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A linear node with a constant, plain weight; `out` and `columns` are per group."""

    name: str
    op: str
    input: str
    output: str
    weight: int  # index of the node's weight input
    groups: int
    out: int
    columns: int
    taps: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    wide: bool = False  # Gemm with transB

    @property
    def channels(self) -> int:
        """Return the input channels per group."""
        return self.columns // self.taps


@dataclass
class ChannelMoments:
    """Raw moments per channel (axis 1) of a value x against a target y, in float64: of a normalisation, say."""

    count: int = 0  # per channel
    sums: Array = field(default_factory=lambda: np.zeros((5, 0)))  # of x, y, x^2, y^2, x y

    def add(self, x: Array, y: Array) -> None:
        """Add a batch x[n, c, ...], y[n, c, ...]."""
        flat = (np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).astype(np.float64) for value in (x, y))
        a, b = flat
        found = np.stack([a.sum(1), b.sum(1), np.square(a).sum(1), np.square(b).sum(1), (a * b).sum(1)])
        self.sums = self.sums + found if self.count else found
        self.count += a.shape[1]

    @property
    def means(self) -> tuple[Array, Array]:
        """Return the means of x and y."""
        return self.sums[0] / self.count, self.sums[1] / self.count

    @property
    def spread(self) -> tuple[Array, Array, Array]:
        """Return the variances of x and y and their covariance."""
        (x, y), (xx, yy, xy) = self.means, self.sums[2:] / self.count
        return np.maximum(xx - np.square(x), 0.0), np.maximum(yy - np.square(y), 0.0), xy - x * y


@dataclass
class Moments:
    """Raw moments of one layer over sampled rows, per group, in float64; y is the target's output.

    rows of `seen`; sx[g, d], sy[g, o], xx[g, d, d] = sum x x^T, yx[g, o, d] = sum y x^T, yy[g, o] = sum y^2. When d
    exceeds the rows, `xx` and `yx` are None and the rows themselves are kept: x[g, r, d], y[g, r, o]. `left`: what a
    fit loses behind the activation, where the targets were made for that fit (see stats.Chain.visible). `held`: the
    moments of some of the rows, those in `spans`, on which a fit to the others can be tried.
    """

    layer: Layer
    rows: int = 0
    seen: int = 0
    sx: Array = field(default_factory=lambda: np.zeros(0))
    sy: Array = field(default_factory=lambda: np.zeros(0))
    yy: Array = field(default_factory=lambda: np.zeros(0))
    xx: Array | None = None
    yx: Array | None = None
    x: Array | None = None
    y: Array | None = None
    left: float = 0.0
    held: Moments | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        parts = (self.sx, self.sy, self.yy, self.xx, self.yx, self.x, self.y)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def mean_x(self) -> Array:
        """Return the mean input [g, d]."""
        return self.sx / max(self.rows, 1)

    @property
    def square_x(self) -> Array:
        """Return the mean square of the input [g, d]."""
        if self.x is not None:
            squares: Array = np.square(self.x).sum(1)
        else:
            assert self.xx is not None
            squares = np.diagonal(self.xx, axis1=1, axis2=2)
        return squares / max(self.rows, 1)

    @property
    def mean_y(self) -> Array:
        """Return the mean target output [g, o]."""
        return self.sy / max(self.rows, 1)

    @property
    def variance_y(self) -> Array:
        """Return the variance of the target output [g, o]."""
        return np.maximum(self.yy / max(self.rows, 1) - np.square(self.mean_y), 0.0)

    def centred(self) -> tuple[Array, Array]:
        """Return the centred sums (H[g, d, d], C[g, o, d]): x and y less their means."""
        if self.x is not None and self.y is not None:
            x, y = self.x - self.mean_x[:, None], self.y - self.mean_y[:, None]
            return x.transpose(0, 2, 1) @ x, y.transpose(0, 2, 1) @ x
        assert self.xx is not None
        assert self.yx is not None
        H = self.xx - self.sx[:, :, None] * self.mean_x[:, None, :]
        return H, self.yx - self.sy[:, :, None] * self.mean_x[:, None, :]

    @property
    def power(self) -> Array:
        """Return the centred sum of squares of the target output [g, o]."""
        return self.variance_y * self.rows

    def others(self) -> Moments:
        """Return the moments of the rows that are not held."""
        held = self.held
        assert held is not None
        found = Moments(self.layer, self.rows - held.rows, self.seen - held.seen)
        found.sx, found.sy, found.yy = self.sx - held.sx, self.sy - held.sy, self.yy - held.yy
        if self.x is not None and self.y is not None:
            rest = np.ones(self.rows, bool)
            for start, stop in self.spans:
                rest[start:stop] = False
            found.x, found.y = self.x[:, rest], self.y[:, rest]
        else:
            assert self.xx is not None
            assert self.yx is not None
            assert held.xx is not None
            assert held.yx is not None
            found.xx, found.yx = self.xx - held.xx, self.yx - held.yx
        return found

    def towards(self) -> Moments:
        """Return the moments of the same inputs without targets: `retarget` adds them, batch by batch as before."""
        return Moments(self.layer, 0, self.seen, self.sx, xx=self.xx, x=self.x)

    def retarget(self, x: Array, y: Array, left: float) -> None:
        """Add the targets y[g, r, o] of rows x[g, r, d] that are in the sums already, and what is left to lose."""
        first = not self.rows
        self.rows += x.shape[1]
        sums = (y.sum(1), np.square(y).sum(1))
        self.sy, self.yy = sums if first else (self.sy + sums[0], self.yy + sums[1])
        self.left += left
        if self.x is not None:
            self.y = y if self.y is None else np.concatenate([self.y, y], 1)
            return
        yx = y.transpose(0, 2, 1) @ x
        self.yx = yx if self.yx is None else self.yx + yx

    def add(self, x: Array, y: Array, seen: int, wide: bool) -> None:
        """Add rows x[g, r, d], y[g, r, o] out of `seen`; `wide` in the first call keeps the rows of all calls."""
        first = not self.rows
        self.rows += x.shape[1]
        self.seen += seen
        sums = (x.sum(1), y.sum(1), np.square(y).sum(1))
        self.sx, self.sy, self.yy = sums if first else (self.sx + sums[0], self.sy + sums[1], self.yy + sums[2])
        if wide if first else self.x is not None:
            self.x = x if self.x is None else np.concatenate([self.x, x], 1)
            self.y = y if self.y is None else np.concatenate([self.y, y], 1)
            return
        xx, yx = x.transpose(0, 2, 1) @ x, y.transpose(0, 2, 1) @ x
        self.xx = xx if self.xx is None else self.xx + xx
        self.yx = yx if self.yx is None else self.yx + yx


@dataclass
class Spread:
    """How the elements of one value are distributed, and their means per index of `axis` (None: not wanted)."""

    axis: int | None = None
    histogram: Histogram = field(default_factory=Histogram)
    count: int = 0  # per index
    sums: Array = field(default_factory=lambda: np.zeros(0))
    rank: int = 0

    def add(self, x: Array) -> None:
        """Add a batch."""
        self.histogram.add(x)
        self.rank = x.ndim
        if self.axis is None:
            return
        others = tuple(axis for axis in range(x.ndim) if axis != self.axis % x.ndim)
        sums = x.sum(others, dtype=np.float64)
        self.sums = self.sums + sums if self.count else sums
        self.count += x.size // max(len(sums), 1)

    @property
    def mean(self) -> Array:
        """Return the means along the axis."""
        found: Array = self.sums / max(self.count, 1)
        return found
