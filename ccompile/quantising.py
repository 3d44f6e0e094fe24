"""Plan a graph on integers: a grid for every value, integers for every weight, and where they are worth their passage.

A plan is made for one graph in float (see qdq.Plan) and holds for copies of it; qdq.encode writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir

from ccompile import graph, qdq
from ccompile.analysis import integers, linear
from ccompile.analysis.integers import Unit
from ccompile.analysis.shapes import UNKNOWN, Shapes
from ccompile.core import Array, Costs, Skip, Statistics
from ccompile.moments import Layer, Moments, Spread
from ccompile.numerics import ranges, regions, rounding
from ccompile.numerics.ranges import Grid, Histogram
from ccompile.qdq import Plan, Weights
from ccompile.tolerance import Tolerance

Ranges = Literal["minmax", "percentile", "mse", "entropy"]
Rounding = Literal["nearest", "feedback", "descent"]
_BIAS_LIMIT = 2.0**30  # codes of a bias
# The runtime pools codes fast where an integer convolution leaves them channels last, else at 3 ns a tap, as measured;
# it also moves a quantisation behind a float pool before it. In units of the float pool's own time:
_SLOW_POOL = 20.0
_HALVINGS = 12  # of the logarithm of what a loss is worth in seconds


@dataclass(frozen=True)
class Recipe:
    """How grids are found; see the options of quantize-activations."""

    ranges: Ranges = "minmax"
    share: float = 0.9999
    rounding: Rounding = "nearest"
    per_channel: bool = True
    limit: int = 127
    correct: bool = True

    def span(self, found: Histogram) -> tuple[float, float]:
        """Return the range of a histogram that is kept."""
        if not len(found.counts):
            return 0.0, 0.0
        if self.ranges == "percentile":
            return ranges.percentile(found, self.share)
        choose: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
            "minmax": ranges.minmax,
            "mse": ranges.least_squares,
            "entropy": ranges.entropy,
        }
        return choose[self.ranges](found)


@dataclass(frozen=True)
class Survey:
    """The units of a graph, in order, and why other nodes are none."""

    units: tuple[Unit, ...]
    skipped: tuple[Skip, ...]


def merge_biases(main: ir.Graph, types: Shapes) -> None:
    """Make x[n, d] W + b, a MatMul and the Add behind it, one Gemm in place: its integer kernel adds the bias."""
    for node in main:
        weight, add = node.inputs[1] if len(node.inputs) > 1 else None, graph.only_use(node.outputs[0])
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or add is None or add.op_type != "Add":
            continue
        x, shape = node.inputs[0], graph.static_shape(weight)
        rank = types.get(str(x.name), UNKNOWN).shape if x is not None else None
        bias = next((v for v in add.inputs if v is not node.outputs[0]), None)
        dims = graph.static_shape(bias)
        if shape is None or dims is None or rank is None or len(rank) != 2 or len(shape) != 2:
            continue
        if dims in ((shape[1],), (1, shape[1])):
            gemm = graph.add_node("Gemm", [x, weight, bias], before=node, base=f"{node.name}_gemm")
            graph.replace_node(add, gemm)
            main.remove(node, safe=True)
            gemm.name = node.name


def survey(
    main: ir.Graph, types: Shapes, excluded: Callable[[ir.Node], Skip | None], apart: frozenset[str] = frozenset()
) -> Survey:
    """Return what of a graph may compute on integers; nodes that `excluded` gives a Skip for are none."""
    units: list[Unit] = []
    skipped: list[Skip] = []
    for found in integers.units(main, types, apart):
        node = found.node if isinstance(found, Unit) else found[0]
        skip = excluded(node) if not isinstance(found, Unit) or found.kind != "move" else None
        if skip is None and not isinstance(found, Unit):
            skip = Skip(str(node.name), found[1])
        if skip is not None:
            skipped.append(skip)
        elif isinstance(found, Unit):
            units.append(found)
    return Survey(tuple(units), tuple(skipped))


def observed(units: Sequence[Unit]) -> dict[str, int | None]:
    """Return the values whose distribution a plan needs, with the channel axis where means are needed too."""
    axes: dict[str, int | None] = {}
    for unit in units:
        for value in unit.inputs:
            axes.setdefault(str(value.name), None)
        if unit.kind == "layer":
            axes[str(unit.inputs[0].name)] = 1 if unit.node.op_type == "Conv" else -1
        if unit.kind != "move":
            axes.setdefault(str(unit.node.outputs[0].name), None)
    return axes


def grids(units: Sequence[Unit], spreads: Mapping[str, Spread], recipe: Recipe) -> tuple[dict[str, Grid], set[str]]:
    """Return the grid of every value that units read or make, and the nodes that no unit can absorb after all."""
    found: dict[str, Grid] = {}
    apart: set[str] = set()
    for unit in units:
        for value in unit.inputs:
            if str(value.name) not in found:
                span = recipe.span(spreads[str(value.name)].histogram)
                found[str(value.name)] = ranges.grid(*span)
        if unit.kind == "move":
            source = found[str(unit.inputs[0].name)]
            found |= {str(output.name): source for output in unit.outputs}
            continue
        result = _result_grid(unit, spreads[str(unit.node.outputs[0].name)].histogram, recipe)
        if result is None:
            apart |= {str(node.name) for node in unit.tail if node.op_type in ("Add", "Sub")}
        else:
            found[str(unit.outputs[0].name)] = result
    return found, apart


def _result_grid(unit: Unit, raw: Histogram, recipe: Recipe) -> Grid | None:
    """Return the grid of a unit's result, or None where its shift is no whole number of steps."""
    ends = recipe.span(raw.within(unit.low, unit.high)) if len(raw.counts) else (0.0, 0.0)
    low, high = (unit.scale * min(max(end, unit.low), unit.high) + unit.shift for end in ends)
    low, high = min(low, unit.shift), max(high, unit.shift)
    shifted = ranges.shifted(low, high, unit.shift)
    if shifted is None or qdq.raw_grid(unit, shifted[0]) is None:
        return None
    return shifted[0]


# ---------------------------------------------------------------------------------------------- weights


def forms(units: Iterable[Unit]) -> list[Layer]:
    """Return the linear forms of the layers among units."""
    found = [linear.layer(unit.node) for unit in units if unit.kind == "layer"]
    return [form for form in found if isinstance(form, Layer)]


def weights(
    units: Sequence[Unit],
    grids: Mapping[str, Grid],
    spreads: Mapping[str, Spread],
    moments: Mapping[str, Moments],
    recipe: Recipe,
) -> dict[str, Weights]:
    """Return the integers of each layer's weight, and its bias; rounding other than to nearest needs `moments`."""
    found = {}
    for unit in units:
        if unit.kind != "layer":
            continue
        form, (source,) = linear.layer(unit.node), unit.inputs
        assert isinstance(form, Layer)
        mean = _column_means(form, spreads[str(source.name)])
        step = grids[str(source.name)].scale
        found[unit.name] = _weights(unit.node, form, step, mean, moments.get(form.name), recipe)
    return found


def _weights(node: ir.Node, form: Layer, step: float, mean: Array, moments: Moments | None, recipe: Recipe) -> Weights:
    W, b = linear.matrix(node, form), linear.bias(node, form)
    assert b is not None
    known = coded(form, W, b, step, moments, recipe)
    if recipe.correct and form.op != "MatMul":
        b = b + np.einsum("god,gd->go", W - known.values, mean)
    return replace(known, bias=b)


def coded(form: Layer, W: Array, b: Array, step: float, moments: Moments | None, recipe: Recipe) -> Weights:
    """Return a weight [g, o, d] on integers, and the bias [g, o] as it is; `step` is the scale of the layer's input.

    moments: of the layer's inputs, where rounding is not to nearest.
    """
    flat = W.reshape(-1, form.columns)
    scale = (
        rounding.least_squares(flat, recipe.limit) if recipe.ranges == "mse" else rounding.largest(flat, recipe.limit)
    )
    if not recipe.per_channel:
        scale = np.full_like(scale, rounding.largest(flat.reshape(1, -1), recipe.limit)[0])
    least = np.abs(b).reshape(-1) / (step * _BIAS_LIMIT)
    scale = np.maximum(scale, least if recipe.per_channel else least.max(initial=0.0)).astype(np.float32)
    scale = scale.astype(np.float64).reshape(form.groups, form.out)
    codes = np.stack([_rounded(W[g], scale[g], None if moments is None else _metric(moments, g), recipe)
                      for g in range(form.groups)])  # fmt: skip
    return Weights(form, codes, scale, b, not recipe.per_channel)


def _rounded(W: Array, scale: Array, H: Array | None, recipe: Recipe) -> Array:
    if H is None or recipe.rounding == "nearest":
        return rounding.nearest(W, scale, recipe.limit)
    return (rounding.descend if recipe.rounding == "descent" else rounding.feed_back)(W, scale, H, recipe.limit)


def _metric(moments: Moments, group: int) -> Array:
    """Return E[x x^T] of one group; the bias makes up for the mean where it is corrected, so that it is centred."""
    H, _ = moments.centred()
    metric: Array = H[group] / max(moments.rows, 1)
    return metric


def _column_means(form: Layer, spread: Spread) -> Array:
    """Return the mean input [g, d]: that of a channel for each of its taps, padding left out."""
    return np.repeat(spread.mean.reshape(form.groups, form.channels), form.taps, axis=1)


# ---------------------------------------------------------------------------------------------- where it pays


@dataclass(frozen=True)
class Prices:
    """Estimated seconds: of each unit in float and on integers, and of each value's passage, by name.

    `margin`: the share of the units' time in float that a plan must gain for the estimates to be believed.
    """

    floats: Mapping[str, float]
    codes: Mapping[str, float]
    passages: Mapping[str, float]
    margin: float = 0.15


def prices(model: ir.Model, units: Sequence[Unit], plan: Plan, types: Shapes, costs: Costs) -> Prices:
    """Return what units cost in the graph as it is and in one where all of them are integers."""
    trial = written(model, plan, types)
    now, then = ({name: cost[1] for name, cost in costs.nodes(m).items()} for m in (model, trial))
    names = {unit.name: [unit.name, *(str(node.name) for node in unit.tail)] for unit in units}
    values = {str(value.name) for unit in units for value in (*unit.inputs, *unit.outputs)}
    return Prices(
        {unit: sum(now.get(name, 0.0) for name in parts) for unit, parts in names.items()},
        {unit: sum(then.get(name, 0.0) for name in parts) for unit, parts in names.items()},
        costs.coding(model, sorted(values)),
    )


def even(units: Sequence[Unit]) -> Prices:
    """Return prices by which all units are worthwhile but moves that nothing next to them makes so."""
    names = {str(value.name) for unit in units for value in (*unit.inputs, *unit.outputs)}
    floats = {unit.name: 1e-3 if unit.kind == "move" else 1.0 for unit in units}
    return Prices(floats, dict.fromkeys(floats, 0.0), dict.fromkeys(names, 1e-3), 0.0)


def worthwhile(
    units: Sequence[Unit], known: Prices, penalties: Mapping[str, float] = MappingProxyType({})
) -> frozenset[str]:
    """Return the units that are faster on integers, passages counted.

    None where all together gain less than estimates are good for. penalties: of units, what integers cost there beyond
    their seconds.
    """
    index = {unit.name: at for at, unit in enumerate(units)}
    maker = {value: index[unit.name] for unit in units for value in unit.outputs}
    makes_float = {at for at, unit in enumerate(units) if unit.writes_float}
    pools = {at for at, unit in enumerate(units) if unit.node.op_type == "MaxPool"}
    by_node = {unit.node: index[unit.name] for unit in units}
    passages = []
    for value in dict.fromkeys(value for unit in units for value in (*unit.inputs, *unit.outputs)):
        uses = [by_node.get(use.node) if _is_data(units, by_node, use) else None for use in value.uses()]
        readers = tuple(dict.fromkeys([*uses, *([None] if value.is_graph_output() else [])]))
        price, made = known.passages[str(value.name)], maker.get(value)
        producer, pooling = value.producer(), 0.0
        if producer is not None and producer.op_type == "MaxPool":
            pooling = _SLOW_POOL * (known.floats[units[made].name] if made in pools else price)
        passages.append(regions.Passage(made, readers, price + pooling, 0.0 if made in makes_float else price))
    passages += [regions.Passage(maker.get(units[at].inputs[0]), (at,), np.inf, 0.0) for at in sorted(pools)]
    codes = [known.codes[unit.name] for unit in units]
    floats = [known.floats[unit.name] for unit in units]
    costs = [code + penalties.get(unit.name, 0.0) for code, unit in zip(codes, units, strict=True)]
    chosen = regions.cheapest(floats, costs, passages)
    if regions.cost(chosen, floats, codes, passages) > (1 - known.margin) * sum(floats):
        return frozenset()
    return frozenset(unit.name for unit, taken in zip(units, chosen, strict=True) if taken)


def _is_data(units: Sequence[Unit], by_node: Mapping[ir.Node, int], use: tuple[ir.Node, int]) -> bool:
    node, index = use
    at = by_node.get(node)
    return at is not None and index in units[at].data


# ---------------------------------------------------------------------------------------------- what stays in float


def fall_back(
    units: Sequence[Unit],
    known: Prices,
    lost: Mapping[str, float],
    holds: Callable[[frozenset[str]], bool],
) -> frozenset[str]:
    """Return the units to write when not all can be: the fastest that hold, losses adding up; none where none hold.

    lost: what each unit alone, on integers, does to the outputs. A unit of loss is worth as few seconds as it takes for
    the rest to hold: of units that lose the same, those stay on integers that save more time.
    """
    total, seen = sum(lost.values()), dict[frozenset[str], bool]()
    if not total > 0:
        return frozenset()

    def tried(power: float) -> tuple[frozenset[str], bool]:
        price = sum(known.floats.values()) / total * 10.0**power
        chosen = worthwhile(units, known, {name: price * loss for name, loss in lost.items()})
        if chosen not in seen:
            seen[chosen] = not chosen or holds(chosen)
        return chosen, seen[chosen]

    low, high = -3.0, 6.0
    best, held = tried(high)
    if not held:
        return frozenset()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chosen, held = tried(middle)
        low, high, best = (low, middle, chosen) if held else (middle, high, best)
    return best


def strict(tolerance: Tolerance, share: float) -> Tolerance:
    """Return a tolerance that allows a share of what another does.

    >>> str(strict(Tolerance(relative_l2=0.1, argmax=0.9), 0.5))
    '{relative_l2: 0.05, argmax: 0.95}'
    """
    limits = {
        name: 1 - share * (1 - value) if name in ("cosine", "argmax") else share * value
        for name, value in tolerance.limits().items()
    }
    return Tolerance.model_validate(limits)


def written(model: ir.Model, plan: Plan, types: Shapes) -> ir.Model:
    """Return a copy of a graph with a plan in it."""
    trial = graph.copy(model)
    qdq.encode(trial, plan, types)
    return trial


def distance(stats: Statistics, model: ir.Model, base: ir.Model) -> float:
    """Return how far a graph's outputs are from those of another on held-out batches: KL, else squared relative L2."""
    outputs = stats.held_out(model, base).outputs
    return float(sum(o.kl if o.kl is not None else o.relative_l2**2 for o in outputs))
