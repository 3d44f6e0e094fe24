"""Raise a model's opset to 13, which quantisation per channel needs, from 11 or 12.

op                                what changed                       how it is rewritten
Squeeze, Unsqueeze, ReduceSum     `axes` became an input (13)        the attribute becomes a constant
Split                             `split` became an input (13)       the attribute becomes a constant
Dropout                           `ratio` became an input (12)       the attribute becomes a constant
Softmax, LogSoftmax, Hardmax      one axis, not all behind (13)      kept where the axis is the last; else refused
Source: the operators' changelog of ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ccompile import graph

OLDEST, WANTED = 11, 13
_INPUTS = {"Squeeze": "axes", "Unsqueeze": "axes", "ReduceSum": "axes", "Split": "split", "Dropout": "ratio"}
_SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")


def unsure(model: ir.Model) -> list[str]:
    """Return the values whose rank `refusal` needs to know."""
    if model.opset_imports.get("", model.opset_imports.get("ai.onnx", WANTED)) >= WANTED:
        return []
    found = [node.inputs[0] for node in model.graph if node.op_type in _SOFTMAX]
    return [str(value.name) for value in found if value is not None]


def refusal(model: ir.Model, ranks: Mapping[str, int]) -> str:
    """Return why the model's opset cannot become 13, or nothing where it can, or is that new already."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", WANTED))
    if version >= WANTED:
        return ""
    if version < OLDEST:
        return f"it needs opset {WANTED}, and only models of opset {OLDEST} or newer are raised to it"
    if model.functions:
        return f"it needs opset {WANTED}, and the model's own functions have opset {version}"
    for node in model.graph.all_nodes():
        if node.op_type in _SOFTMAX and node.domain in ("", "ai.onnx") and not _is_last(node, ranks):
            return f"it needs opset {WANTED}, where {node.op_type} `{node.name}` means something else"
        if node.op_type in _INPUTS and node.graph is not model.graph:
            return f"it needs opset {WANTED}, and `{node.name}` in a subgraph is written otherwise there"
    return ""


def upgrade(model: ir.Model) -> None:
    """Raise the opset in place, where `refusal` says nothing; newer models stay as they are."""
    key = "" if "" in model.opset_imports else "ai.onnx"
    if model.opset_imports.get(key, WANTED) >= WANTED:
        return
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _SOFTMAX:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
        elif node.op_type in _INPUTS and (found := node.attributes.pop(_INPUTS[node.op_type], None)) is not None:
            kind = np.float32 if node.op_type == "Dropout" else np.int64
            graph.replace_constant(node, 1, np.array(found.value, kind))
    model.opset_imports[key] = WANTED
    model.graph.opset_imports[key] = WANTED
    model.ir_version = max(model.ir_version or 7, 7)


def _is_last(node: ir.Node, ranks: Mapping[str, int]) -> bool:
    """Return whether a softmax of opset 11 or 12 runs along the last axis."""
    value = node.inputs[0]
    axis = graph.attribute(node, "axis", 1)
    return axis == -1 or (value is not None and axis == ranks.get(str(value.name), 0) - 1)
