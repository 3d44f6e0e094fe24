"""Dimensions of values that shape inference does not know but the walk can tell.

ONNX's inference gives up on a computed Reshape target even when the rank is plain, and everything after is unknown.
"""

from __future__ import annotations

import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_flow import Dims, Flow
from ccompile.analysis.channel_maths import axes_of
from ccompile.analysis.channel_reshape import numbers
from ccompile.analysis.shapes import UNKNOWN, Dim

# what an op does to the dimensions of its first input
_SAME = """
    BatchNormalization CumSum GroupNormalization Hardmax InstanceNormalization LayerNormalization LogSoftmax
    LpNormalization MeanVarianceNormalization RMSNormalization Softmax
"""
_BROADCAST = "Add And Clip Div Equal Greater Less Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where"
_UNARY = """
    Abs Cast Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not Reciprocal Relu Selu Sigmoid
    Softplus Sqrt Tanh
"""
_OPENS = "AveragePool LpPool MaxPool Pad Slice"  # keep the rank, change sizes
_SHAPE_LIKE = frozenset((_SAME + _UNARY).split())
_BROADCASTING = frozenset(_BROADCAST.split())
_OPENING = frozenset(_OPENS.split())


def guess(flow: Flow, node: ir.Node) -> None:
    """Note the dimensions of a node's first output where inference has none and the op tells them, or the rank."""
    name = str(node.outputs[0].name)
    if flow.types.get(name, UNKNOWN).shape is None and (dims := _after(flow, node)) is not None:
        flow.guessed[name] = dims


def _after(flow: Flow, node: ir.Node) -> Dims | None:
    every = [flow.dims(value) for value in node.inputs if value is not None]
    first = every[0] if every else None
    if node.op_type == "Reshape":
        target = numbers(flow, node.inputs[1])
        return None if target is None else tuple(n if isinstance(n, int) and n > 0 else None for n in target)
    if first is None:
        return None
    if node.op_type in _SHAPE_LIKE:
        return first
    if node.op_type in _OPENING:
        return (None,) * len(first)
    if node.op_type in _BROADCASTING or node.op_type == "MatMul":
        known = [dims for dims in every if dims is not None]
        if len(known) < len(every):
            return None
        return _joined(known) if node.op_type != "MatMul" else (None,) * max(len(dims) for dims in known)
    return _moved(node, first)


def _moved(node: ir.Node, first: Dims) -> Dims | None:
    if node.op_type == "Transpose":
        return tuple(first[axis] for axis in graph.attribute(node, "perm", range(len(first))[::-1]))
    if node.op_type.startswith("Global"):
        return (*first[:2], *(1,) * (len(first) - 2))
    if node.op_type.startswith(("Reduce", "Arg")) and (axes := axes_of(node, len(first))) is not None:
        if graph.attribute(node, "keepdims", 1):
            return tuple(1 if axis in axes else dim for axis, dim in enumerate(first))
        return tuple(dim for axis, dim in enumerate(first) if axis not in axes)
    if node.op_type == "Squeeze" and (len(node.inputs) > 1 or "axes" in node.attributes):
        axes = axes_of(node, len(first))
        return None if axes is None else tuple(dim for axis, dim in enumerate(first) if axis not in axes)
    return None


def _joined(every: list[Dims]) -> Dims:
    """Return the broadcast of several dimensions; open where it is not certain."""
    rank = max(len(dims) for dims in every)
    columns = zip(*((1,) * (rank - len(dims)) + dims for dims in every), strict=True)
    return tuple(_widest(list(column)) for column in columns)


def _widest(column: list[Dim]) -> Dim:
    wide = [dim for dim in column if dim != 1]
    sure = [dim for dim in wide if isinstance(dim, int)]
    if sure or not wide:
        return sure[0] if sure else 1
    return wide[0] if len(set(wide)) == 1 else None
