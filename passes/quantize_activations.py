"""Compute in 8-bit integers: uint8 activations, int8 weights, int32 biases.

y = W x + b  becomes  y = s_x s_W (Q_W (Q_x - z_x) + Q_b), with Q_x = round(x / s_x) + z_x in 0 .. 255,
Q_W = round(W / s_W) in -127 .. 127, Q_b = round(b / (s_x s_W)), written as QuantizeLinear and DequantizeLinear around
the ops, which the runtime turns into integer kernels; ops that only move values work on the codes.

Fires:  Conv, Gemm, MatMul with a constant weight; Add, Mul, MatMul, Concat, pooling, Sigmoid between them; activations,
        scalar factors and shifts behind them are in the grids. All in float32, where the target is faster on integers.
Error:  half a step per value inside its range: s_x / 2 of x, s_W / 2 of W; ranges are those of the calibration data.
Cost:   multiply-accumulates at the target's int8 rate, a quarter of the bytes; a node to and from float at each border.
Source: Jacob et al. 2017, arXiv:1712.05877; Nagel et al. 2019, arXiv:1906.04721 (equalisation, bias correction);
        Nagel et al. 2020, arXiv:2004.10568, and Frantar et al. 2022, arXiv:2210.17323 (rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ccompile import equalising, graph, older_opsets, qdq, quantising
from ccompile.analysis.shapes import Shapes, shapes
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, Statistics, View
from ccompile.errors import PassError
from ccompile.moments import Moments, Spread
from ccompile.qdq import Plan
from ccompile.quantising import Prices, Recipe, Survey

_PASSES = 4  # attempts to find what grids can absorb


class QuantizeActivations(Rewrite):
    """Options of quantize-activations."""

    kind: ClassVar[Kind] = "lossy"
    needs_calibration: ClassVar[bool] = True

    ranges: Literal["minmax", "percentile", "mse", "entropy"] = Field(
        "minmax",
        description="ranges of activations: all that occurs, all but a few, least squared error (of weights as well), "
        "or least divergence",
    )
    percentile: float = Field(
        99.99, gt=50, lt=100, description="percent of the values inside the range, with `ranges: percentile`"
    )
    weights: Literal["channel", "tensor"] = Field(
        "channel", description="one scale per output channel of a weight, or one"
    )
    rounding: Literal["nearest", "feedback", "descent"] = Field(
        "nearest",
        description="of weights: to nearest, each column making up for those before it, or by coordinate descent on "
        "the layer's output error",
    )
    reduce_range: bool = Field(
        False, description="weights in 7 bits: for x86 machines without VNNI, whose 16-bit sums of 8-bit ones saturate"
    )
    equalize: bool = Field(
        False, description="first even out the weight ranges of consecutive layers, which is exact through Relu"
    )
    correct_bias: bool = Field(True, description="move what rounded weights do to the mean output into the bias")
    where: Literal["faster", "everywhere"] = Field(
        "faster", description="integers where the target's estimate is lower, passages counted, or wherever they can be"
    )
    fallback: bool = Field(
        True,
        description="keep the most sensitive layers in float until `tolerance`, if there is one, holds on held-out "
        "calibration batches",
    )

    def run(self, view: View) -> PassResult:
        """Plan on the graph as it is, and write the plan."""
        stats = view.stats
        if stats is None:
            raise PassError(
                "quantize-activations needs calibration data for its ranges, and the spec gives none",
                hint="Give `data.calibration`.",
            )
        types = view.ask(shapes)
        unsure = stats.spreads(view.model, dict.fromkeys(older_opsets.unsure(view.model)))
        if reason := older_opsets.refusal(view.model, {name: spread.rank for name, spread in unsure.items()}):
            return PassResult((), (Skip(str(next(iter(view.graph)).name), reason),))
        older_opsets.upgrade(view.model)
        quantising.merge_biases(view.graph, types)
        even = equalising.equalise(view.graph) if self.equalize else []
        work = self._plan(view, types, stats)
        tolerable, kept = self._tolerable(view, work, stats)
        written = qdq.encode(view.model, replace(work.plan, chosen=tolerable), types)
        view.changed()
        return self._result(work, tolerable, kept, written, {name for pair in even for name in pair})

    @property
    def _recipe(self) -> Recipe:
        return Recipe(
            self.ranges,
            self.percentile / 100,
            self.rounding,
            self.weights == "channel",
            63 if self.reduce_range else 127,
            self.correct_bias,
        )

    def _plan(self, view: View, types: Shapes, stats: Statistics) -> _Work:
        recipe = self._recipe
        apart = frozenset(str(node.name) for node in view.graph if self._is_skipped(node, view))
        spreads: dict[str, Spread] = {}
        for _ in range(_PASSES):
            found = quantising.survey(view.graph, types, view.excluded, apart)
            missing = {n: axis for n, axis in quantising.observed(found.units).items() if n not in spreads}
            spreads |= stats.spreads(view.model, missing) if missing else {}
            grids, more = quantising.grids(found.units, spreads, recipe)
            if not more:
                break
            apart |= more
        moments: Mapping[str, Moments] = {}
        if self.rounding != "nearest":
            moments = stats.moments(view.model, quantising.forms(found.units))
        weights = quantising.weights(found.units, grids, spreads, moments, recipe)
        plan = Plan(frozenset(unit.name for unit in found.units), grids, weights, apart)
        if self.where == "everywhere" or view.costs is None or not found.units:
            return _Work(found, replace(plan, chosen=quantising.everywhere(found.units)), types)
        prices = quantising.prices(view.model, found.units, plan, types, view.costs)
        return _Work(found, replace(plan, chosen=quantising.worthwhile(found.units, prices)), types, prices)

    def _is_skipped(self, node: ir.Node, view: View) -> bool:
        return any(selector.matches(view.facts(node)) for selector in self.skip)

    def _tolerable(self, view: View, work: _Work, stats: Statistics) -> tuple[frozenset[str], tuple[str, ...]]:
        """Return the units to write, and those kept in float for the tolerance."""
        tolerance = self.tolerance
        if not self.fallback or tolerance is None:
            return work.plan.chosen, ()
        base = graph.copy(view.model)
        kinds = {unit.name: unit.kind for unit in work.survey.units}
        return quantising.fall_back(
            stats,
            base,
            work.plan,
            work.types,
            lambda trial: not stats.held_out(trial, base).violations(tolerance),
            work.without,
            [name for name in kinds if kinds[name] != "move" and name in work.plan.chosen],
            view.tell,
        )

    def _result(
        self, work: _Work, chosen: frozenset[str], kept: tuple[str, ...], written: Mapping[str, str], even: set[str]
    ) -> PassResult:
        applied: list[Site] = []
        skipped = list(work.survey.skipped)
        for unit in work.survey.units:
            if unit.name in chosen:
                tail = f", with {', '.join(node.op_type for node in unit.tail)}" if unit.tail else ""
                also = "; equalised" if unit.name in even else ""
                applied.append(
                    Site((unit.name,), f"{unit.node.op_type} on codes{tail}{also}", output=written[unit.name])
                )
            elif unit.kind != "move":
                reason = (
                    "in float for the tolerance" if unit.name in kept else "the target is not faster on integers here"
                )
                skipped.append(Skip(unit.name, reason))
        return PassResult(tuple(applied), tuple(skipped))


@dataclass(frozen=True)
class _Work:
    """What was found of a graph, and what to do about it."""

    survey: Survey
    plan: Plan
    types: Shapes
    prices: Prices | None = None

    def without(self, floating: frozenset[str]) -> frozenset[str]:
        """Return the units to write when some stay in float."""
        if self.prices is None:
            return self.plan.chosen - floating
        return quantising.worthwhile(self.survey.units, self.prices, floating)
