"""What layers cost whole and split: multiply-adds exactly, seconds as the target's model says, budgets in any measure.

What a split costs is not guessed: copies of the graph in which all layers are split are priced as any other graph is,
so that strides, fusions and channel multiples count as they will.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ccompile import graph, stages
from ccompile.analysis import linear
from ccompile.core import Array, Choice, View
from ccompile.errors import PassError
from ccompile.moments import Layer
from ccompile.numerics import allocation
from ccompile.stages import Sides, Stage

LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1, 0.05)  # shares of a layer's MACs that a curve tells


class Scheme(Protocol):
    """What is split into what (splitting.Split)."""

    def most(self, form: Layer) -> int:
        """Return the greatest rank."""
        ...

    def has(self, form: Layer, rank: int) -> bool:
        """Say whether a rank from 1 to the greatest is one; 1 is."""
        ...

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of one group's stages at a rank, in order."""
        ...

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return one group's stages from their weights, in order."""
        ...

    def like(self, rank: int, form: Layer) -> Sequence[int]:
        """Return the ranks that a layer may have instead of one that was planned before it was cut, mildest first."""
        ...

    def scales_with(self, form: Layer) -> tuple[Sides, ...]:
        """Return what each stage's cost goes with."""
        ...


@dataclass(frozen=True)
class LayerPrice:
    """What a layer costs whole, and split: output positions of each stage, and (multiply-adds, seconds) seen.

    `turned`: likewise, split in the other of two orders.
    """

    macs: int
    seconds: float
    positions: tuple[float, ...]
    points: tuple[tuple[int, float], ...] = ()
    turned: LayerPrice | None = None

    def measured(self, points: Sequence[tuple[int, float]]) -> LayerPrice:
        """Return the price with what splits were estimated to take."""
        return LayerPrice(self.macs, self.seconds, self.positions, tuple(sorted(set(points))))

    def macs_of(self, groups: int, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the multiply-adds of stages of those shapes."""
        return round(groups * sum(n * math.prod(shape) for n, shape in zip(self.positions, shapes, strict=True)))

    def seconds_of(self, macs: int) -> float:
        """Return the estimated seconds, linear in the multiply-adds between what was seen."""
        if not self.points:
            return 0.0
        x, y = np.array(self.points).T
        return float(np.interp(macs, x, y))


def cost_of(choice: Choice, what: str, itemsize: int = 4) -> float:
    """Return a choice's cost in a budget's measure; `itemsize`: bytes of a weight's entry.

    >>> cost_of(Choice(2, 0.1, params=10, macs=20), "stored_bytes", 2)
    20.0
    """
    return float(choice.params * itemsize if what == "stored_bytes" else getattr(choice, what))


def rank_of(scheme: Scheme, share: float, form: Layer, price: LayerPrice) -> int:
    """Return the greatest rank that costs at most a share of the layer's multiply-adds; 0 when none does."""
    low, high = 0, scheme.most(form)
    while low < high:
        middle = (low + high + 1) // 2
        fits = price.macs_of(form.groups, scheme.shapes(form, middle)) <= share * price.macs
        low, high = (middle, high) if fits else (low, middle - 1)
    return next((rank for rank in range(low, 0, -1) if scheme.has(form, rank)), 0)


def rank_left(scheme: Scheme, rank: int, was: Layer, form: Layer, positions: Sequence[float]) -> int:
    """Return what a rank planned for `was` comes to in `form`, cut since; 0 where whole that costs no more.

    It is the greatest whose stages, at so many output positions each, cost what the planned ones do when each reads and
    makes less (`scales_with`), or else the least.
    """
    read, made = form.channels / was.channels, (form.groups * form.out) / (was.groups * was.out)
    parts = zip(positions, scheme.shapes(was, rank), scheme.scales_with(was), strict=True)
    planned = was.groups * sum(n * math.prod(shape) * read**i * made**o for n, shape, (i, o) in parts)

    def cost(rank: int) -> float:
        shapes = scheme.shapes(form, rank)
        return form.groups * sum(n * math.prod(shape) for n, shape in zip(positions, shapes, strict=True))

    able = scheme.like(rank, form)
    # A Tucker split's second rank may grow with the ratio of outputs to inputs: then the least rank is nearest.
    fits = [r for r in able if cost(r) <= planned * (1 + 1e-9)] or list(able[-1:])
    whole = positions[-1] * form.groups * form.out * form.columns
    return fits[0] if fits and cost(fits[0]) < whole else 0


def prices(scheme: Scheme, forms: Sequence[Layer], view: View) -> dict[str, LayerPrice]:
    """Return what layers cost, by name; in units of one row where nothing is priced."""
    if view.costs is None:
        return {
            form.name: LayerPrice(form.groups * form.out * form.columns, 0.0, (1.0,) * len(scheme.shapes(form, 1)))
            for form in forms
        }
    whole, ones = view.costs.nodes(view.model), dict.fromkeys((form.name for form in forms), 1)
    per_stage, _ = _split_costs(scheme, ones, view)
    found: dict[str, LayerPrice] = {}
    for form in forms:
        macs, seconds = whole[form.name]
        sizes = [form.groups * math.prod(shape) for shape in scheme.shapes(form, 1)]
        positions = tuple(cost / size for cost, size in zip(per_stage[form.name], sizes, strict=True))
        found[form.name] = LayerPrice(macs, seconds, positions)
    points: dict[str, list[tuple[int, float]]] = {form.name: [] for form in forms}
    for level in LEVELS[1::2]:
        ranks = {form.name: max(1, rank_of(scheme, level, form, found[form.name])) for form in forms}
        macs_of, seconds_of = _split_costs(scheme, ranks, view)
        for form in forms:
            points[form.name].append((round(sum(macs_of[form.name])), seconds_of[form.name]))
    return {name: price.measured(points[name]) for name, price in found.items()}


def priced_whole(scheme: Scheme, ranks: Mapping[str, int], what: str, view: View) -> float:
    """Return what the graph costs in a budget's measure when these layers are split at these ranks."""
    assert view.costs is not None
    return float(getattr(view.costs.report(_trial(scheme, ranks, view)[0]), what))


def spend(
    scheme: Scheme,
    names: Sequence[str],
    choices: Sequence[Sequence[Choice]],
    curves: Sequence[allocation.Curve],
    budget: tuple[str, float],
    view: View,
) -> list[Choice]:
    """Return the choice of each layer that together lose least, within a limit of what the whole graph costs.

    Where a measure is no plain sum (seconds), what was planned is priced and the plan corrected. Raises PassError when
    the limit cannot be met.
    """
    what, limit = budget
    assert view.costs is not None
    fixed = float(getattr(view.costs.report(view.model), what)) - sum(float(curve.costs[0]) for curve in curves)
    left = limit - fixed

    def solve(left: float) -> list[Choice]:
        options = allocation.allocate(curves, left)
        return [options_[option] for options_, option in zip(choices, options, strict=True)]

    def price(chosen: Sequence[Choice]) -> float:
        ranks = {name: int(choice.strength) for name, choice in zip(names, chosen, strict=True) if choice.strength}
        return priced_whole(scheme, ranks, what, view)

    try:
        return allocation.within(solve, price, limit, left)
    except ValueError as error:
        raise PassError(f"the budget cannot be met: {error}", hint="Raise it, or allow more layers.") from error


def _split_costs(scheme: Scheme, ranks: Mapping[str, int], view: View) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Return the multiply-adds of each layer's stages, and their seconds, when all are split at these ranks."""
    assert view.costs is not None
    trial, made = _trial(scheme, ranks, view)
    costs = view.costs.nodes(trial)
    macs = {name: [costs[part][0] for part in parts if costs[part][0]] for name, parts in made.items()}
    return macs, {name: sum(costs[part][1] for part in parts) for name, parts in made.items()}


def _trial(scheme: Scheme, ranks: Mapping[str, int], view: View) -> tuple[ir.Model, dict[str, list[str]]]:
    """Return a copy of the graph with layers split into zeros, and the names of each one's nodes."""
    trial = graph.copy(view.model)
    made = {name: hollow(scheme, graph.node_named(trial.graph, name), rank) for name, rank in ranks.items()}
    graph.remove_dead(trial.graph)
    return trial, made


def hollow(scheme: Scheme, node: ir.Node, rank: int) -> list[str]:
    """Replace a layer by stages of zeros at a rank; return their names."""
    form = linear.layer(node)
    assert isinstance(form, Layer)
    shapes = scheme.shapes(form, rank)
    empty = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
    parts = stages.merged([scheme.stages(form, empty)] * form.groups)
    return [str(made.name) for made in stages.put(node, form, parts, None)]
