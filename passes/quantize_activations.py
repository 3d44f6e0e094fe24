"""Compute in 8-bit integers: uint8 activations, int8 weights, int32 biases.

y = W x + b  becomes  y = s_x s_W (Q_W (Q_x - z_x) + Q_b), with Q_x = round(x / s_x) + z_x in 0 .. 255,
Q_W = round(W / s_W) in -127 .. 127, Q_b = round(b / (s_x s_W)), written as QuantizeLinear and DequantizeLinear around
the ops, which the runtime turns into integer kernels; ops that only move values work on the codes, and those that pick
channels and every n-th position become a 1x1 convolution of the same codes where that is faster.

Fires:  Conv, Gemm, MatMul with a constant weight; Add, Mul, MatMul, Concat, pooling, Sigmoid between them; activations,
        scalar factors and shifts behind them are in the grids. All in float32, where the target is faster on integers.
Error:  half a step per value inside its range: s_x / 2 of x, s_W / 2 of W; ranges are those of the calibration data.
Cost:   multiply-accumulates at the target's int8 rate, a quarter of the bytes; a node to and from float at each border.
Source: Jacob et al. 2017, arXiv:1712.05877; Nagel et al. 2019, arXiv:1906.04721 (equalisation, bias correction);
        Nagel et al. 2020, arXiv:2004.10568, and Frantar et al. 2022, arXiv:2210.17323 (rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import onnx_ir as ir
from pydantic import Field

from ccompile import code_moves, equalising, graph, integer_fits, older_opsets, qdq, quantising
from ccompile.analysis.shapes import Shapes, shapes
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, Statistics, View
from ccompile.errors import PassError
from ccompile.moments import Moments, Spread
from ccompile.qdq import Plan
from ccompile.quantising import Prices, Ranges, Recipe, Survey

_PASSES = 4  # attempts to find what grids can absorb
_SPARE = 0.75  # of a tolerance: what has to hold on the few batches that are held out, for all of it to hold on others


class QuantizeActivations(Rewrite):
    """Options of quantize-activations."""

    kind: ClassVar[Kind] = "lossy"
    needs_calibration: ClassVar[bool] = True

    ranges: Literal["best", "minmax", "percentile", "mse", "entropy"] = Field(
        "best",
        description="ranges of activations: all that occurs, all but a few, least squared error (of weights as well), "
        "or least divergence; best: those of them that change the outputs on held-out calibration batches least",
    )
    percentile: float = Field(
        99.99, gt=50, lt=100, description="percent of the values inside the range, with `ranges: percentile` or `best`"
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
    refit: Literal["none", "bias", "layers"] = Field(
        "layers",
        description="what makes up for codes: nothing; biases, for what rounded weights do to the mean output; or the "
        "layers' weights and biases, in order, each fitted to the float outputs on the codes that it will read",
    )
    where: Literal["faster", "everywhere"] = Field(
        "faster", description="integers where the target's estimate is lower, passages counted, or wherever they can be"
    )
    fallback: bool = Field(
        True,
        description="keep the layers in float that lose most for the time they save, until three quarters of "
        "`tolerance`, if there is one, hold on held-out calibration batches",
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
        base = graph.copy(view.model)
        for work in self._plans(view, types, stats, base):
            plan = self._tolerable(view, work, stats, base)
            if plan.chosen:
                break
        written = qdq.encode(view.model, plan, types)
        view.changed()
        moved = self._convolved(view, work, plan)
        return self._result(work, plan.chosen, written, {name for pair in even for name in pair}, moved)

    def _convolved(self, view: View, work: _Work, plan: Plan) -> set[str]:
        """Write moves of codes as convolutions where that is faster; return their names."""
        moves = {unit.name for unit in work.survey.units if unit.kind == "move"} & plan.chosen
        if view.costs is None or not moves:
            return set()
        chains = code_moves.convolve(view.model, moves, view.ask(shapes), view.costs.nodes)
        view.changed()
        return {name for chain in chains for name in chain}

    def _plans(self, view: View, types: Shapes, stats: Statistics, base: ir.Model) -> list[_Work]:
        """Return the plan for the ranges that are wanted, or one for each, what loses least on held-out batches first.

        base: the graph that view.model is, which no plan changes.
        """
        seen = _Seen()
        if self.ranges != "best":
            return [self._plan(view, types, stats, self._recipe(self.ranges), seen)]
        found = []
        for ranges in get_args(Ranges):
            view.tell(f"ranges: {ranges}")
            work = self._plan(view, types, stats, self._recipe(ranges), seen)
            trial = quantising.written(base, work.plan, types)
            found.append((quantising.distance(stats, trial, base) if work.plan.chosen else 0.0, work))
        return [work for _, work in sorted(found, key=lambda pair: pair[0])]

    def _recipe(self, ranges: Ranges) -> Recipe:
        return Recipe(
            ranges,
            self.percentile / 100,
            self.rounding,
            self.weights == "channel",
            63 if self.reduce_range else 127,
            self.refit != "none",
        )

    def _plan(self, view: View, types: Shapes, stats: Statistics, recipe: Recipe, seen: _Seen) -> _Work:
        """Return a plan; what it has to see of the data is added to what is known."""
        apart = frozenset(str(node.name) for node in view.graph if self._is_skipped(node, view))
        for _ in range(_PASSES):
            found = quantising.survey(view.graph, types, view.excluded, apart)
            missing = {n: axis for n, axis in quantising.observed(found.units).items() if n not in seen.spreads}
            seen.spreads |= stats.spreads(view.model, missing) if missing else {}
            grids, more = quantising.grids(found.units, seen.spreads, recipe)
            if not more:
                break
            apart |= more
        if self.rounding != "nearest" and not seen.moments:
            seen.moments = stats.moments(view.model, quantising.forms(found.units))
        weights = quantising.weights(found.units, grids, seen.spreads, seen.moments, recipe)
        plan = Plan(frozenset(unit.name for unit in found.units), grids, weights, apart)
        if self.where == "everywhere" or view.costs is None or not found.units:
            prices = quantising.even(found.units)
        else:
            prices = quantising.prices(view.model, found.units, plan, types, view.costs)
        return _Work(found, replace(plan, chosen=quantising.worthwhile(found.units, prices)), types, recipe, prices)

    def _is_skipped(self, node: ir.Node, view: View) -> bool:
        return any(selector.matches(view.facts(node)) for selector in self.skip)

    def _tolerable(self, view: View, work: _Work, stats: Statistics, base: ir.Model) -> Plan:
        """Return the plan to write: fitted, and with what the tolerance asks for in float."""
        tolerance, units = self.tolerance, work.survey.units
        plans = {work.plan.chosen: self._fitted(view, work, work.plan, stats, base)}
        if not self.fallback or tolerance is None or not work.plan.chosen:
            return plans[work.plan.chosen]
        wanted = quantising.strict(tolerance, _SPARE)

        def held(chosen: frozenset[str]) -> bool:
            if chosen not in plans:
                view.tell(f"tolerance with {len(chosen)} of {len(work.plan.chosen)} on integers")
                plans[chosen] = self._fitted(view, work, replace(work.plan, chosen=chosen), stats, base)
            trial = quantising.written(base, plans[chosen], work.types)
            return not stats.held_out(trial, base).violations(wanted)

        if held(work.plan.chosen):
            return plans[work.plan.chosen]
        lost = {}
        names = [unit.name for unit in units if unit.kind != "move" and unit.name in work.plan.chosen]
        for number, name in enumerate(names):
            view.tell(f"sensitivity {number + 1}/{len(names)}")
            alone = quantising.written(base, replace(work.plan, chosen=frozenset({name})), work.types)
            lost[name] = quantising.distance(stats, alone, base)
        chosen = quantising.fall_back(units, work.prices, lost, lambda some: held(some & work.plan.chosen))
        return plans.get(chosen & work.plan.chosen) or replace(work.plan, chosen=frozenset())

    def _fitted(self, view: View, work: _Work, plan: Plan, stats: Statistics, base: ir.Model) -> Plan:
        """Return the plan with its layers fitted, unless held-out batches are better off without."""
        if self.refit != "layers" or not plan.chosen:
            return plan
        units = work.survey.units
        fitted = integer_fits.refitted(stats, base, plan, work.types, units, work.recipe, view.tell)
        plans = (fitted, plan)
        return min(plans, key=lambda p: quantising.distance(stats, quantising.written(base, p, work.types), base))

    def _result(
        self, work: _Work, chosen: frozenset[str], written: Mapping[str, str], even: set[str], convolved: set[str]
    ) -> PassResult:
        applied: list[Site] = []
        skipped = list(work.survey.skipped)
        for unit in work.survey.units:
            if unit.name in chosen:
                tail = f", with {', '.join(node.op_type for node in unit.tail)}" if unit.tail else ""
                also = "; equalised" if unit.name in even else ""
                also += f"; {work.recipe.ranges} ranges" if self.ranges == "best" else ""
                also += "; in a 1x1 convolution" if unit.name in convolved else ""
                output = "" if unit.name in convolved else written[unit.name]
                applied.append(Site((unit.name,), f"{unit.node.op_type} on codes{tail}{also}", output=output))
            elif unit.kind != "move":
                wanted = unit.name in work.plan.chosen
                reason = "in float for the tolerance" if wanted else "the target is not faster on integers here"
                skipped.append(Skip(unit.name, reason))
        return PassResult(tuple(applied), tuple(skipped))


@dataclass
class _Seen:
    """What is known of the data: how values are distributed, and the layers' moments where rounding asks for them."""

    spreads: dict[str, Spread] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """What was found of a graph, and what to do about it."""

    survey: Survey
    plan: Plan
    types: Shapes
    recipe: Recipe
    prices: Prices
