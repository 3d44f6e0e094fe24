"""Put activations that are written out in simpler ops, or in one that runs slowly, into the best op there is.

x min(max(x + 3, 0), 6) / 6 -> HardSwish, or x HardSigmoid(x);  min(max(a x + b, 0), 1) -> HardSigmoid;
x (1 + erf(x / sqrt 2)) / 2, and by tanh -> Gelu;  1 / (1 + exp(-x)) -> Sigmoid;  Min(Max(x, l), h) -> Clip;
Max(x, a x), x > 0 ? x : a x -> LeakyRelu;  PRelu(x, a) -> LeakyRelu, or Max(x, a x) for 0 <= a <= 1, or Min(x, a x)
for a >= 1;  x tanh(Softplus(x)), Mish -> x tanh(log(1 + exp x)), as Softplus is slow and tanh hides what log loses.

Fires:  these in float32, scalars equal to the definition's up to 1e-5 (1e-3 inside tanh), nothing between read
        elsewhere; the op in the model's opset and on the target. Not what the runtime only takes apart again.
Error:  float rounding; Mish 1e-7 absolute.
Cost:   one node and one pass over the activation in place of up to eight; PRelu 5 to 18 times as fast as measured.
Source: Howard et al. 2019, arXiv:1905.02244, section 5.2; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.activations import Activation, recognise
from ccompile.analysis.shapes import UNKNOWN, shapes
from ccompile.core import Array, PassResult, Skip, View
from ccompile.lowering import Formulation, Lowering

_SINCE = {"HardSwish": 14, "Gelu": 20}  # opsets; the others are older than any model


class FuseActivations(Lowering):
    """Options of fuse-activations: those that every lowering takes."""

    def run(self, view: View) -> PassResult:
        """Decide and rewrite site by site; constants that nothing reads any more go."""
        result = super().run(view)
        graph.remove_dead(view.graph)
        view.changed()
        return result

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return the ops that could stand for an activation whose last node this is."""
        if node.op_type == "PRelu" and node.domain in ("", "ai.onnx"):
            return _of_prelu(node, view)
        found = recognise(node)
        x = UNKNOWN if found is None else view.ask(shapes).get(str(found.x.name), UNKNOWN)
        if found is None or x.dtype != ir.DataType.FLOAT or found.rank > max(1, len(x.shape or ())):
            return ()
        inside = {*found.nodes}
        for other in found.nodes:
            if other is node:
                continue
            if other.outputs[0].is_graph_output() or any(use.node not in inside for use in other.outputs[0].uses()):
                return Skip(str(node.name), f"{found.name}, but the output of `{other.name}` is read elsewhere")
            if excluded := view.excluded(other):
                return Skip(str(node.name), f"{found.name}, but `{other.name}` is {excluded.reason}")
        names = tuple(str(other.name) for other in found.nodes if other is not node)
        forms = [
            Formulation(label, 0.0, partial(_rebuild, label), names)
            for label, ops in _labels(found).items()
            if all(_has(op, view) for op in ops)
        ]
        return forms or Skip(str(node.name), f"{found.name}: {_lacking(found, view)}")


def _has(op: str, view: View) -> bool:
    return graph.opset(view.model) >= _SINCE.get(op, 1) and view.target.runs(op)


def _lacking(found: Activation, view: View) -> str:
    """Return why no op can stand for an activation."""
    ops = [op for ops in _labels(found).values() for op in ops]
    if not all(view.target.runs(op) for op in ops):
        return f"the target has no {' or '.join(ops)}"
    since = max(_SINCE.get(op, 1) for op in ops)
    return f"{' or '.join(ops)} is newer than the model's opset; `tidy-graph: {{opset: {since}}}` raises it"


def _labels(found: Activation) -> dict[str, tuple[str, ...]]:
    """Return how an activation can be written, and the ops that this takes."""
    if found.name == "Gelu, tanh":
        return {"Gelu": ("Gelu",)}
    if found.name == "Mish":
        return {"x Tanh": ("Exp", "Log", "Tanh")}
    if found.name != "HardSwish":
        return {found.name: (found.name,)}
    by_gate: dict[str, tuple[str, ...]] = {}
    if len(found.nodes) > 2:
        by_gate["x HardSigmoid"] = ("HardSigmoid", "Mul")
    plain = abs(found.parameters["alpha"] - 1 / 6) < 1e-5 and abs(found.parameters["beta"] - 0.5) < 1e-5
    return {"HardSwish": ("HardSwish",), **by_gate} if plain else by_gate


def _rebuild(label: str, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Write the activation that ends at `node` as `label` says."""
    found = recognise(node)
    assert found is not None
    x, given = found.x, found.parameters
    base = f"{node.name}_{label.rsplit(maxsplit=1)[-1].lower()}"
    if label == "x HardSigmoid":
        gate = graph.add_node("HardSigmoid", [x], dict(given), before=node, base=base)
        made = [gate, graph.add_node("Mul", [x, gate.outputs[0]], before=node, base=f"{base}_product")]
    elif label == "x Tanh":
        made = _mish(main, x, node, base)
    elif label == "Clip":
        made = [_clip(main, x, given, node, base)]
    else:
        attributes: dict[str, graph.Attribute] = {} if label == "HardSwish" else dict(given)
        if found.name == "Gelu, tanh":
            attributes["approximate"] = "tanh"
        made = [graph.add_node(label, [x], attributes, before=node, base=base)]
    graph.replace_node(node, made[-1])
    _remove([other for other in found.nodes if other is not node], main)
    return made


def _mish(main: ir.Graph, x: ir.Value, node: ir.Node, base: str) -> list[ir.Node]:
    one = graph.add_constant(main, f"{base}_one", np.ones((), np.float32))
    made: list[ir.Node] = []
    for op in ("Exp", "Add", "Log", "Tanh", "Mul"):
        before = made[-1].outputs[0] if made else x
        inputs = {"Add": [before, one], "Mul": [x, before]}.get(op, [before])
        made.append(graph.add_node(op, inputs, before=node, base=f"{base}_{op.lower()}"))
    return made


def _remove(nodes: list[ir.Node], main: ir.Graph) -> None:
    """Remove nodes that nothing but each other reads."""
    while nodes:
        dead = [node for node in nodes if not list(node.outputs[0].uses())]
        main.remove(dead, safe=True)
        nodes = [node for node in nodes if node not in dead]


def _clip(main: ir.Graph, x: ir.Value, given: dict[str, float], node: ir.Node, base: str) -> ir.Node:
    bounds = {"min": given["low"], "max": given["high"]}
    finite = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    if graph.opset(main) < 11:
        return graph.add_node("Clip", [x], dict(finite), before=node, base=base)
    inputs: list[ir.Value | None] = [x]
    for name in bounds:
        held = np.array(finite[name], np.float32) if name in finite else None
        inputs.append(None if held is None else graph.add_constant(main, f"{base}_{name}", held))
    return graph.add_node("Clip", inputs, before=node, base=base)


# ---------------------------------------------------------------------------------------------- PRelu


def _of_prelu(node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
    slope = graph.constant(node.inputs[1])
    if slope is None:
        return Skip(str(node.name), "its slope is not constant")
    if not slope.size or slope.dtype != np.float32 or not graph.is_finite(slope):
        return ()
    builds: list[tuple[str, Callable[[ir.Graph, ir.Node], Sequence[ir.Node]]]] = []
    if (slope == slope.flat[0]).all():
        builds.append(("LeakyRelu", partial(_as_leaky, float(slope.flat[0]))))
    if (slope >= 0).all() and (slope <= 1).all():
        builds.append(("Max", partial(_as_extreme, "Max", slope)))
    elif (slope >= 1).all():
        builds.append(("Min", partial(_as_extreme, "Min", slope)))
    forms = [Formulation(label, 0.0, build) for label, build in builds if _has(label, view)]
    return forms or Skip(str(node.name), "its slopes are neither equal nor all in [0, 1] nor all above 1")


def _as_leaky(alpha: float, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    new = graph.add_node("LeakyRelu", [node.inputs[0]], {"alpha": alpha}, before=node, base=f"{node.name}_leakyrelu")
    graph.replace_node(node, new)
    return (new,)


def _as_extreme(op: str, slope: Array, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Write PRelu as Max(x, a x), or as Min where the slopes are above 1."""
    x = node.inputs[0]
    product = graph.add_node("Mul", [x, node.inputs[1]], before=node, base=f"{node.name}_product")
    new = graph.add_node(op, [x, product.outputs[0]], before=node, base=f"{node.name}_{op.lower()}")
    graph.replace_node(node, new)
    return product, new
