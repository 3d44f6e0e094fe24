"""The fit of a split in its place: to the outputs of the graph before, on the inputs that the graph so far makes.

The ridge is tried with a low-rank weight of as many parameters where rows are few; behind an activation the split is
fitted again to what that shows (see fitting.seen).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ccompile import fitting, split_prices
from ccompile.analysis import linear
from ccompile.core import Array, Chain
from ccompile.fitting import Goal, Was
from ccompile.moments import Layer
from ccompile.numerics import weighted
from ccompile.stages import Stage


@dataclass(frozen=True, eq=False)
class Factors:
    """The split of one group: its stages, their composed weight What[o, d], and tr((What - W) H (What - W)^T)."""

    stages: tuple[Stage, ...]
    composed: Array
    loss: float
    note: str = ""


class Scheme(split_prices.Scheme, Protocol):
    """What is split into what, and how it is fitted (splitting.Split)."""

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d] with H[d, d], or without data."""
        ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """A layer's split, group by group, the bias that goes with it (None: the layer's own), and what it loses."""

    groups: tuple[Factors, ...]
    bias: Array | None = None
    lost: float = 0.0


def to_weight(scheme: Scheme, node: ir.Node, form: Layer, rank: int) -> Fitted:
    """Return the split nearest to a layer's weight."""
    return Fitted(tuple(scheme.fit(group, None, form, rank) for group in linear.matrix(node, form)))


def to_outputs(
    scheme: Scheme, node: ir.Node, form: Layer, rank: int, data: tuple[Was, Chain], ridge: float | None
) -> Fitted:
    """Return the split that loses least of a layer's output, and the share of its power that is lost.

    data: what the layer was in the graph before, and the walk through the data, which has come to it.
    """
    was, chain = data
    first = fitting.goal(node, was, chain, ridge, lambda goal: _stand_in(scheme, goal, form, rank))
    factors, goal = fitting.fitted(first, lambda goal: _to(scheme, goal, form, rank), _composed, was, chain)
    What = _composed(factors)
    lost = fitting.lost(first.moments, What, goal.bias(What))
    return Fitted(factors, None if form.op == "MatMul" else goal.bias(What).reshape(-1), lost)


def _to(scheme: Scheme, goal: Goal, form: Layer, rank: int) -> tuple[Factors, ...]:
    return tuple(scheme.fit(metric.W, metric.H, form, rank) for metric in goal.metrics)


def _composed(factors: tuple[Factors, ...]) -> Array:
    return np.stack([group.composed for group in factors])


def _stand_in(scheme: Scheme, goal: Goal, form: Layer, rank: int) -> Array:
    """Return the low-rank weight [g, o, d] of as many parameters, in closed form: what ridges are tried with."""
    params = sum(math.prod(shape) for shape in scheme.shapes(form, rank))
    near = max(1, min(params // (form.out + form.columns), form.out, form.columns))
    pairs = [weighted.truncate(metric.W, metric.H, near) for metric in goal.metrics]
    return np.stack([A @ B for A, B in pairs])
