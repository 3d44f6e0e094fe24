"""How linear layers treat channels: they contract those of their input and make new ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_flow import Flow, flat, lifted, varying
from ccompile.core import Array


def conv(flow: Flow, node: ir.Node) -> None:
    """Conv and ConvTranspose, plain, grouped and depthwise."""
    shape = graph.static_shape(node.inputs[1])
    ids, groups = flow.ids(node.inputs[0]), graph.attribute(node, "group", 1)
    if shape is None or len(shape) < 3:
        flow.refuse(node, "its weight is not constant")
        return
    if ids is not None:
        around = [0, *range(2, ids.ndim)]
        flow.bind(ids, around, node, "it slides along the channels")
        ids = flat(ids, around)
        ids = None if ids.size == 1 else ids
    transposed = node.op_type == "ConvTranspose"
    channels = shape[0] if transposed else shape[1] * groups
    if groups > 1 and groups == channels:
        _depthwise(flow, node, ids, groups, shape)
        return
    if ids is not None:
        if groups > 1:
            parts = ids.reshape(1, groups, channels // groups)
            flow.bind(parts, (1,), node, f"its {groups} groups must stay equal")
            per = parts[:, 0]
        else:
            per = ids
        flow.read(node, 1, 0 if transposed else 1, "consumer", ids if transposed else per, 1)
    _make(flow, node, shape[1] * groups if transposed else shape[0], groups, transposed, len(shape))


def _depthwise(flow: Flow, node: ir.Node, ids: Array | None, groups: int, shape: tuple[int, ...]) -> None:
    if ids is None:
        return
    transposed = node.op_type == "ConvTranspose"
    multiplier = shape[1] if transposed else shape[0] // groups
    out = ids if multiplier == 1 else np.repeat(ids, multiplier, axis=1)
    flow.read(node, 1, 0, "through", ids if transposed else out, 1)
    flow.read(node, 2, 0, "through", out, 1)
    flow.count(node, 0, (groups,), ids, 1)
    flow.give(node.outputs[0], out)


def _make(flow: Flow, node: ir.Node, outs: int, groups: int, transposed: bool, rank: int) -> None:
    if outs == 1:
        return
    new = flow.fresh(node, outs // groups)
    out = np.tile(new, groups).reshape(1, outs, *(1,) * (rank - 2))
    flow.read(node, 1, 1 if transposed else 0, "producer", new if transposed else out, 0 if transposed else 1)
    flow.read(node, 2, 0, "producer", out, 1)
    flow.give(node.outputs[0], out)


def gemm(flow: Flow, node: ir.Node) -> None:
    """Gemm with a constant second factor."""
    if not graph.is_constant(node.inputs[1]) or graph.attribute(node, "transA", 0):
        flow.refuse(node, "its weight is not constant, or it transposes its input")
        return
    rows = flow.ids(node.inputs[0])
    if rows is not None and rows.shape[0] > 1:
        flow.refuse(node, "they are its rows")
        return
    wide = bool(graph.attribute(node, "transB", 0))
    new = _contract(flow, node, (0, 1), (1, 0) if wide else (0, 1), -1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if new is None or bias is None:
        return
    if graph.is_constant(bias) and (shape := graph.static_shape(bias)):
        flow.read(node, 2, len(shape) - 1, "producer", new, 1)
    elif not graph.is_constant(bias):
        flow.refuse(node, "its bias is not constant")
        flow.pin(new, node, "its bias is not constant")


def matmul(flow: Flow, node: ir.Node) -> None:
    """MatMul with one constant factor, or with none."""
    left, right = (graph.is_constant(value) for value in node.inputs[:2])
    if left and not right:
        _contract(flow, node, (1, 0), (1, 0), -2)
    elif right and not left:
        _contract(flow, node, (0, 1), (0, 1), -1)
    elif not left:
        _attend(flow, node)


def _contract(flow: Flow, node: ir.Node, inputs: tuple[int, int], axes: tuple[int, int], along: int) -> Array | None:
    """Contract axis `along` of input inputs[0] with axis axes[0] of the weight; return the new ids, made on axes[1]."""
    x, shape = node.inputs[inputs[0]], graph.static_shape(node.inputs[inputs[1]])
    ids = flow.ids(x)
    rank = None if x is None else flow.rank(x)
    if shape is None or len(shape) != 2 or rank is None or rank < 2:
        flow.refuse(node, "its weight is not a plain matrix")
        return None
    if ids is not None and len(varying(ids)) > (ids.shape[along] > 1):
        flow.bind(ids, (along,), node, "it mixes them")  # other axes vary too: they go on, this one stays whole
        flow.give(node.outputs[0], flat(ids, (along,)))
        return None
    if ids is not None:
        flow.read(node, inputs[1], axes[0], "consumer", ids, ids.ndim + along)
    outs = shape[axes[1]]
    if outs == 1:
        return None
    new = flow.fresh(node, outs).reshape(*(1,) * (rank + along), outs, *(1,) * (-1 - along))
    flow.read(node, inputs[1], axes[1], "producer", new, rank + along)
    flow.give(node.outputs[0], new)
    return new


def embedding(flow: Flow, node: ir.Node) -> None:
    """Gather rows of a constant table."""
    shape, rank = graph.static_shape(node.inputs[0]), None if node.inputs[1] is None else flow.rank(node.inputs[1])
    if shape is None or len(shape) != 2 or rank is None or graph.attribute(node, "axis", 0) or shape[1] == 1:
        return
    new = flow.fresh(node, shape[1]).reshape(*(1,) * rank, shape[1])
    flow.read(node, 0, 1, "producer", new, rank)
    flow.give(node.outputs[0], new)


def _attend(flow: Flow, node: ir.Node) -> None:
    """Multiply two variable values, as attention does: batch axes (heads) must agree, the inner axis is contracted."""
    values = [value for value in node.inputs if value is not None]
    a, b = (flow.ids(value) for value in values)
    ranks = [flow.rank(value) for value in values]
    known = [rank for rank in ranks if rank is not None and rank >= 2]
    if a is None and b is None:
        return
    if len(known) < 2:
        flow.refuse(node, "the rank of a factor is unknown")
        return
    a = None if a is None else lifted(a, max(known))
    b = None if b is None else lifted(b, max(known))
    rows, columns = a is not None and a.shape[-2] > 1, b is not None and b.shape[-1] > 1
    if (rows and a is not None and a.shape[-1] > 1) or (columns and b is not None and b.shape[-2] > 1):
        flow.refuse(node, "it multiplies channels of both axes")
    elif rows and columns:
        flow.refuse(node, "its rows and its columns are channels")
    else:
        _pair(flow, node, a, b)


def _pair(flow: Flow, node: ir.Node, a: Array | None, b: Array | None) -> None:
    reason = "it contracts them without a weight"
    if a is not None:
        flow.bind(a, (-1,), node, reason)
        a = flat(a, (-1,))
    if b is not None:
        flow.bind(b, (-2,), node, reason)
        b = flat(b, (-2,))
    out: Array | None
    if a is not None and b is not None and a.size > 1 and b.size > 1:
        out = flow.unify(a, b)
    else:
        index = 1 if a is None or a.size == 1 else 0
        out = b if index and b is not None else a
        if out is not None:
            _other(flow, node, 1 - index, out)
    if out is not None and out.size > 1:
        flow.give(node.outputs[0], out)


def _other(flow: Flow, node: ir.Node, index: int, out: Array) -> None:
    """Bind the batch axes of `out` along which the other factor, without channels, has its own size."""
    other = node.inputs[index]
    assert other is not None
    dims = flow.dims(other) or ()
    padded = (1,) * (out.ndim - len(dims)) + dims
    axes = [axis for axis in varying(out) if axis < out.ndim - 2 and padded[axis] != 1]
    flow.bind(out, axes, node, f"it meets {flow.describe(other)}")
