"""Raise the version of the default operators where that changes nothing that the graph computes.

op                         what changed                            how it is rewritten
ReduceMax, ReduceL2, ...   `axes` became an input (18)             the attribute becomes a constant
Split                      equal parts are counted (18)            `num_outputs` is given
BatchNormalization         training has an attribute (14)          with one output; else refused
what is in WIDENED         more types, or an option that is off    not at all
Source: the operators' changelog of ONNX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph

FLOOR = 13  # older models: see older_opsets

# Ops that between FLOOR and NEWEST only took more element types, or an input or attribute without which they do what
# they did.
WIDENED = frozenset(
    "Add AveragePool Cast CastLike Constant ConstantOfShape CumSum DequantizeLinear Div Equal Flatten GRU "
    "GreaterOrEqual Identity If IsInf IsNaN LSTM LeakyRelu LessOrEqual Loop LpPool Mul PRelu Pad Pow QLinearMatMul "
    "QuantizeLinear RNN Relu Reshape Resize Scan ScatterElements ScatterND Shape Size Squeeze Sub Transpose Unsqueeze "
    "Where".split()
)
REDUCTIONS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare".split()
)
NEWEST = 21
_INPUTS = 18  # the version in which the attributes of REDUCTIONS became inputs


def raise_to(model: ir.Model, version: int) -> str:
    """Raise the model's opset to `version` <= NEWEST in place; return why it stays, or nothing."""
    now = graph.opset(model)
    if now >= version:
        return ""
    if now < FLOOR:
        return f"opset {now} is older than {FLOOR}"
    if now < _INPUTS and model.functions:
        return f"the model's own functions have opset {now}"
    nodes = [node for node in _nodes(model) if node.op_identifier() not in model.functions]
    for node in nodes:
        if reason := _refusal(node, now, version, now >= _INPUTS or node.graph is model.graph):
            return reason
    if now < _INPUTS <= version:
        for node in nodes:
            _hand_over(node)
    key = "" if "" in model.opset_imports else "ai.onnx"
    model.graph.opset_imports[key] = version
    for function in model.functions.values():
        function.opset_imports[key] = version
    model.ir_version = max(model.ir_version or 0, 10)
    return ""


def _refusal(node: ir.Node, now: int, version: int, can_rewrite: bool) -> str:
    """Return why a node cannot be one of `version`; can_rewrite: what is written otherwise there can be rewritten."""
    op = node.op_type
    if not onnx.defs.has(op, now, ""):
        return f"{op} is no operator of opset {now}"
    if not _changed(op, now, version) or op in WIDENED:
        return ""
    if op == "BatchNormalization":
        trains = any(output.name for output in node.outputs[1:])
        return f"{op} with {len(node.outputs)} outputs is not the same in opset {version}" if trains else ""
    if op not in (*REDUCTIONS, "Split"):
        return f"{op} is not the same in opset {version}"
    return "" if can_rewrite else f"{op} is in a subgraph, and written otherwise in opset {version}"


def _hand_over(node: ir.Node) -> None:
    """Write a node of opset 13 to 17 as opset 18 has it."""
    if node.op_type in REDUCTIONS and (axes := node.attributes.pop("axes", None)) is not None:
        graph.replace_constant(node, 1, np.array(axes.value, np.int64))
    elif node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    inner = (function.all_nodes() for function in model.functions.values())
    return (n for n in itertools.chain(model.graph.all_nodes(), *inner) if n.domain in ("", "ai.onnx"))


def _changed(op: str, old: int, new: int) -> bool:
    """Return whether an op's definition of one version is another's."""
    return bool(_since(op, old) != _since(op, new))


def _since(op: str, version: int) -> int:
    return int(onnx.defs.get_schema(op, version, "").since_version)
