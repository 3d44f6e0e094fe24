"""Measured rates by kind of kernel and size: what a target's `tables` hold, and what they say between the points."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from ccompile.numerics.interpolation import multilinear

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TableKind = Literal["conv", "plain", "depthwise", "ragged", "gemm", "pool", "ops", "fused", "transpose", "reorder"]

# What the rates of a kind go with. Where `kernel` counts, a grid is one kernel's; the nearest one stands for others.
AXES: Mapping[TableKind, tuple[str, ...]] = {
    "conv": ("inputs", "outputs", "positions"),
    "plain": ("inputs", "outputs", "positions"),
    "depthwise": ("channels", "positions"),
    "ragged": ("channels", "positions"),
    "gemm": ("rows", "inputs", "outputs"),
    "pool": ("elements",),
    "ops": ("elements",),
    "fused": ("elements",),
    "transpose": ("run", "elements"),
    "reorder": ("elements",),
}
BY_OP = ("ops", "fused")
BY_KERNEL = ("conv", "plain", "depthwise", "ragged", "pool")


class Grid(BaseModel):
    """Rates on a grid of sizes, in the order of nested loops over its axes, the last one fastest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: PositiveInt | None = Field(None, description="taps of the kernel that was measured: 9 for 3x3")
    op: str | None = Field(None, description="the op that was measured")
    axes: dict[str, tuple[Positive, ...]] = Field(description="the sizes measured, ascending, by name")
    rates: tuple[Positive, ...] = Field(description="1e9 multiply-accumulates, taps or elements a second, flat")

    @model_validator(mode="after")
    def _complete(self) -> Grid:
        for name, sizes in self.axes.items():
            if not sizes or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"axis `{name}` must be ascending numbers")
        wanted = math.prod(map(len, self.axes.values()))
        if len(self.rates) != wanted:
            shape = " x ".join(str(len(sizes)) for sizes in self.axes.values())
            raise ValueError(f"{len(self.rates)} rates where the axes make {shape} = {wanted}")
        return self

    @functools.cached_property
    def _logs(self) -> tuple[list[list[float]], list[float]]:
        return [[math.log(size) for size in sizes] for sizes in self.axes.values()], [math.log(r) for r in self.rates]

    def rate(self, sizes: Mapping[str, float]) -> float:
        """Return the rate in 1/s at the given sizes by axis: linear in the logarithms, constant beyond the ends."""
        axes, rates = self._logs
        return 1e9 * math.exp(multilinear(axes, rates, [math.log(max(sizes[name], 1e-9)) for name in self.axes]))


ByType = dict[str, tuple[Grid, ...]]


class Tables(BaseModel):
    """Rates measured on a machine, by kind of kernel and element type; where there is none, `rates` hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conv: ByType = Field({}, description="dense convolutions, per group; in blocks of channels where there are such")
    plain: ByType = Field({}, description="dense convolutions that cannot run in blocks, as those in one dimension")
    depthwise: ByType = Field({}, description="one input channel per group")
    ragged: ByType = Field({}, description="depthwise convolutions that cannot run in blocks")
    gemm: ByType = Field({}, description="matrix products, one row to many")
    pool: ByType = Field({}, description="pooling, taps a second")
    ops: ByType = Field({}, description="other ops by name, elements a second of the larger of input and output")
    fused: ByType = Field({}, description="what an op adds to the convolution that absorbs it, elements a second")
    transpose: ByType = Field({}, description="Transpose by the run of elements that stay neighbours")
    reorder: ByType = Field({}, description="into and out of the blocked layout, each")

    @model_validator(mode="after")
    def _of_their_kind(self) -> Tables:
        for kind in get_args(TableKind):
            for dtype, grids in getattr(self, kind).items():
                for index, grid in enumerate(grids):
                    if problem := _problem(kind, grid):
                        raise ValueError(f"{kind}.{dtype}[{index}]: {problem}")
        return self

    def rate(
        self, kind: TableKind, dtype: str, sizes: Mapping[str, float], *, kernel: int = 1, op: str = ""
    ) -> float | None:
        """Return the rate in 1/s, of the nearest kernel or of the op, or None where nothing was measured."""
        grids: tuple[Grid, ...] = getattr(self, kind).get(dtype, ())
        if kind in BY_OP:
            grids = tuple(grid for grid in grids if grid.op == op)
        if not grids:
            return None
        return min(grids, key=lambda grid: abs(math.log((grid.kernel or 1) / kernel))).rate(sizes)


def _problem(kind: TableKind, grid: Grid) -> str:
    """Return what a grid of a kind lacks or has too much, or nothing."""
    if tuple(grid.axes) != AXES[kind]:
        return f"its axes are {', '.join(AXES[kind])}, in this order"
    if (grid.kernel is not None) != (kind in BY_KERNEL):
        return f"`kernel` {'is missing' if kind in BY_KERNEL else 'means nothing here'}"
    if (grid.op is not None) != (kind in BY_OP):
        return f"`op` {'is missing' if kind in BY_OP else 'means nothing here'}"
    return ""
