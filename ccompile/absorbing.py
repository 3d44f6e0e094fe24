"""Nodes that take over what the node before or behind does: pads of a window, the bias of a product.

op                    takes over
Conv                  a Pad by zeros on spatial axes
AveragePool           the same, if it counts its own pads or has none; it counts them then
MaxPool               a Pad by what is least, or by zeros of what is nowhere below zero
MatMul of matrices    an Add of a constant per column: Gemm
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_reshape import paddings
from ccompile.analysis.shapes import Dim
from ccompile.core import Site, Skip, View
from ccompile.tidying import types_of

_POSITIVE = frozenset("Relu Sigmoid HardSigmoid Softplus Exp Abs Sqrt Softmax".split())
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_OPSET = 7  # count_include_pad; Gemm broadcasts its bias by itself


@dataclass(frozen=True)
class _Padding:
    """Pads before and after by axis, and what they are filled with."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    value: float


def absorbed(view: View, skipped: dict[str, Skip]) -> list[Site]:
    """Let nodes take over what the table above says."""
    opset = graph.opset(view.model)
    if opset < _OPSET:
        return []
    found = []
    for node in view.graph:
        if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
            continue
        rule = _RULES.get(node.op_type)
        made = rule(node, view, skipped) if rule is not None else None
        if made is not None:
            found.append(made)
    return found


def _excluded(nodes: tuple[ir.Node, ...], view: View, skipped: dict[str, Skip]) -> bool:
    for node in nodes:
        if (skip := view.excluded(node)) is not None:
            skipped[skip.node] = skip
            return True
    return False


# ---------------------------------------------------------------------------------------------- pads


def _pads(node: ir.Node, view: View, skipped: dict[str, Skip]) -> Site | None:
    value = node.inputs[0]
    pad = value.producer() if value is not None and graph.only_use(value) is node else None
    if pad is None or pad.op_type != "Pad" or pad.domain not in ("", "ai.onnx") or pad.inputs[0] is None:
        return None
    taps = _taps(node)
    if taps is None:
        return None
    padding = _padding(pad, len(taps) + 2)
    if padding is None or not _fits(node, pad, padding, taps) or _excluded((pad, node), view, skipped):
        return None
    own, more = _own(node, len(taps)) or [], [*padding.begins[2:], *padding.ends[2:]]
    node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, more, strict=True)])
    node.attributes.pop("auto_pad", None)
    if node.op_type == "AveragePool":
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    names = (str(pad.name), str(node.name))
    node.replace_input_with(0, pad.inputs[0])
    view.graph.remove(pad, safe=True)
    return Site(names, f"Pad done by the {node.op_type}", output=str(node.outputs[0].name))


def _padding(pad: ir.Node, rank: int) -> _Padding | None:
    """Return constant pads, of which none is negative, or None."""
    if graph.attribute(pad, "mode", "constant") != "constant":
        return None
    if len(pad.inputs) == 1:
        value = graph.attribute(pad, "value", 0.0)
    else:
        value = _number(pad.inputs[2] if len(pad.inputs) > 2 else None)
    pads = paddings(pad, rank)
    if pads is None or value is None or any(min(ends) < 0 for ends in pads.values()):
        return None
    begins, ends = zip(*(pads.get(axis, (0, 0)) for axis in range(rank)), strict=True)
    return _Padding(begins, ends, value)


def _number(value: ir.Value | None) -> float | None:
    if value is None:
        return 0.0
    array = graph.constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def _taps(node: ir.Node) -> tuple[int, ...] | None:
    if node.op_type == "Conv":
        shape = graph.static_shape(node.inputs[1])
        return None if shape is None else shape[2:]
    return tuple(graph.attribute(node, "kernel_shape"))


def _own(node: ir.Node, axes: int) -> list[int] | None:
    """Return a node's own pads, or None where they go by its input's size or cut."""
    auto = graph.attribute(node, "auto_pad", "NOTSET")
    none = [0] * (2 * axes)
    own: list[int] = none if auto == "VALID" else list(graph.attribute(node, "pads", none))
    return own if auto in ("NOTSET", "", "VALID") and min(own, default=0) >= 0 else None


def _fits(node: ir.Node, pad: ir.Node, padding: _Padding, taps: tuple[int, ...]) -> bool:
    """Return whether a node with a window can do the padding itself."""
    if any((*padding.begins[:2], *padding.ends[:2])):
        return False
    own = _own(node, len(taps))
    if own is None:
        return False
    if node.op_type == "Conv":
        return padding.value == 0
    if len(node.outputs) > 1 or graph.attribute(node, "ceil_mode", 0):
        return False
    if set(graph.attribute(node, "dilations", [1])) != {1}:
        return False
    whole = np.reshape([*padding.begins[2:], *padding.ends[2:]], (2, -1)) + np.reshape(own, (2, -1))
    if np.any(whole >= np.array(taps)):
        return False  # runtimes refuse pads as large as the window
    if node.op_type == "AveragePool":
        return padding.value == 0 and (not any(own) or bool(graph.attribute(node, "count_include_pad", 0)))
    return padding.value == -np.inf or (padding.value == 0 and _is_positive(pad.inputs[0]))


def _is_positive(value: ir.Value | None) -> bool:
    """Return whether a value is nowhere below zero."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Clip":
        low = graph.attribute(node, "min")
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            held = graph.constant(node.inputs[1])
            low = None if held is None else float(held.reshape(-1)[0])
        return low is not None and low >= 0
    return node.op_type in _POSITIVE


# ---------------------------------------------------------------------------------------------- bias


def _bias(node: ir.Node, view: View, skipped: dict[str, Skip]) -> Site | None:
    """Let a Gemm stand in place of a MatMul of matrices and the Add behind."""
    sizes = [types_of(view, value) for value in node.inputs]
    columns = _matrix(sizes[1].shape)
    if _matrix(sizes[0].shape) is None or columns is None or sizes[0].dtype not in _FLOATS:
        return None
    add = graph.only_use(node.outputs[0])
    if (
        add is None
        or add.op_type != "Add"
        or add.domain not in ("", "ai.onnx")
        or not graph.is_constant(node.inputs[1])
    ):
        return None
    bias = next((value for value in add.inputs if value is not node.outputs[0]), None)
    held = graph.constant(bias) if bias is not None and graph.is_constant(bias) else None
    if held is None or held.shape not in ((columns,), (1, columns), (1,), ()) or _excluded((node, add), view, skipped):
        return None
    names = (str(node.name), str(add.name))
    new = graph.add_node("Gemm", [*node.inputs, bias], before=add, base=names[0])
    graph.replace_node(add, new)
    view.graph.remove(node, safe=True)
    new.name = names[0]
    return Site(names, "MatMul and Add became a Gemm", output=str(new.outputs[0].name))


def _matrix(shape: tuple[Dim, ...] | None) -> Dim:
    """Return the columns of a matrix, or None for what is none."""
    return shape[1] if shape is not None and len(shape) == 2 else None


_RULES = {"Conv": _pads, "AveragePool": _pads, "MaxPool": _pads, "MatMul": _bias}
