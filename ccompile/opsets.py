"""Raise the version of the default operators where that changes nothing that the graph computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import onnx
import onnx_ir as ir

FLOOR = 18  # below, ops took what are inputs now as attributes

# Ops that only took more element types, or an attribute whose default is what they did, between FLOOR and 21.
WIDENED = frozenset(
    "AveragePool Cast CastLike Constant ConstantOfShape DequantizeLinear Equal Flatten Identity If "
    "IsInf IsNaN Loop Pad QLinearMatMul QuantizeLinear ReduceMax ReduceMin Reshape Resize Scan Shape Size Squeeze "
    "Transpose Unsqueeze".split()
)
NEWEST = 21


def raise_to(model: ir.Model, version: int) -> str:
    """Raise the model's opset to `version` <= NEWEST in place; return why it stays, or nothing."""
    now = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    if now >= version:
        return ""
    if now < FLOOR:
        return f"opset {now} is older than {FLOOR}"
    for node in _nodes(model):
        if node.op_identifier() in model.functions:
            continue
        if not onnx.defs.has(node.op_type, now, ""):
            return f"{node.op_type} is no operator of opset {now}"
        if not _changed(node.op_type, now, version):
            continue
        if node.op_type not in WIDENED:
            return f"{node.op_type} is not the same in opset {version}"
    model.graph.opset_imports[""] = version
    for function in model.functions.values():
        function.opset_imports[""] = version
    model.ir_version = max(model.ir_version or 0, 10)
    return ""


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    inner = (function.all_nodes() for function in model.functions.values())
    return (n for n in itertools.chain(model.graph.all_nodes(), *inner) if n.domain in ("", "ai.onnx"))


def _changed(op: str, old: int, new: int) -> bool:
    """Return whether an op's definition of one version is another's."""
    return bool(_since(op, old) != _since(op, new))


def _since(op: str, version: int) -> int:
    return int(onnx.defs.get_schema(op, version, "").since_version)
