"""What leaves a graph shorter and the same: arithmetic with neutral constants, and views and moves in a row.

op                                         what is shorter
x * 1, x / 1, x + 0, x - 0, x ^ 1          x, where the constant does not enlarge it
Transpose of a Transpose                   one Transpose
Reshape of a Reshape, Flatten, Squeeze ... one Reshape, where its shape copies no dimension
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.shapes import UNKNOWN, Dim, ValueType, shapes
from ccompile.core import Site, Skip, View

_NEUTRAL = {"Mul": 1, "Div": 1, "Pow": 1, "Add": 0, "Sub": 0}
_EITHER = ("Mul", "Add")  # the constant may stand first
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def types_of(view: View, value: ir.Value | None) -> ValueType:
    """Return what is known of a value."""
    return UNKNOWN if value is None else view.ask(shapes).get(str(value.name), UNKNOWN)


def reader(value: ir.Value) -> str:
    """Return the name of a value that `value` leads to and that the rewrite keeps, for the search for a culprit."""
    for use in value.uses():
        if use.node.outputs and use.node.graph is value.graph:
            return str(use.node.outputs[0].name)
    return str(value.name) if value.is_graph_output() else ""


def neutral(node: ir.Node, dims: dict[ir.Value, tuple[Dim, ...] | None]) -> ir.Value | None:
    """Return the operand that arithmetic with a neutral constant gives back; `dims`: the operands' shapes."""
    if node.op_type not in _NEUTRAL or node.domain not in ("", "ai.onnx") or len(node.inputs) != 2:
        return None
    for at in (1, 0) if node.op_type in _EITHER else (1,):
        x, constant = node.inputs[1 - at], node.inputs[at]
        array = graph.constant(constant) if constant is not None and graph.is_constant(constant) else None
        if x is None or array is None or array.dtype.kind not in "fiu" or np.any(array != _NEUTRAL[node.op_type]):
            continue
        known = dims.get(x)
        if known is None or array.ndim > len(known) or not array.size:
            continue
        behind = known[len(known) - array.ndim :]
        if all(size in (1, dim) for size, dim in zip(array.shape, behind, strict=True)):
            return x
    return None


def joined(view: View, skipped: dict[str, Skip]) -> list[Site]:
    """Join each Transpose or Reshape with the one that it alone reads."""
    found = []
    for node in view.graph:
        value = node.inputs[0] if node.inputs and node.domain in ("", "ai.onnx") else None
        first = value.producer() if value is not None and graph.only_use(value) is node else None
        if first is None or first.domain not in ("", "ai.onnx") or not _joins(first, node):
            continue
        excluded = [skip for other in (first, node) if (skip := view.excluded(other)) is not None]
        if excluded:
            skipped[excluded[0].node] = excluded[0]
            continue
        if node.op_type == "Transpose":
            inner, outer = graph.attribute(first, "perm"), graph.attribute(node, "perm")
            node.attributes["perm"] = ir.AttrInt64s("perm", [inner[axis] for axis in outer])
        node.replace_input_with(0, first.inputs[0])
        names = (str(first.name), str(node.name))
        view.graph.remove(first, safe=True)
        found.append(Site(names, f"{first.op_type} joined with the {node.op_type} behind", output=_end(node)))
    return found


def _end(node: ir.Node) -> str:
    return str(node.outputs[0].name)


def _joins(first: ir.Node, node: ir.Node) -> bool:
    """Return whether one node can do what two in a row do."""
    if node.op_type == "Transpose":
        perms = [graph.attribute(other, "perm") for other in (first, node)]
        return first.op_type == "Transpose" and None not in perms
    if node.op_type != "Reshape" or first.op_type not in _VIEWS or len(node.inputs) < 2:
        return False
    wanted = graph.constant(node.inputs[1])
    return wanted is not None and bool((wanted != 0).all())
