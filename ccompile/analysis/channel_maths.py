"""How element-wise, normalising, reducing and pooling ops treat channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_flow import Flow, flat, lifted, varying
from ccompile.core import Array


def elementwise(flow: Flow, node: ir.Node) -> None:
    """Ops that compute each element from the same element of every operand, with broadcasting."""
    joint = join(flow, node)
    if joint is not None:
        flow.give(node.outputs[0], joint)


def join(flow: Flow, node: ir.Node) -> Array | None:
    """Return the common ids of a node's operands: same position, same fate; operands without ids hold theirs fast."""
    operands = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
    ranks = [flow.rank(value) for _, value in operands]
    carried = [ids for _, value in operands if (ids := flow.ids(value)) is not None]
    known = [rank for rank in ranks if rank is not None]
    if not carried:
        return None
    if len(known) < len(ranks):
        flow.refuse(node, "the rank of an operand is unknown")
        return None
    rank = max(known)
    joint = lifted(carried[0], rank)
    for other in carried[1:]:
        joint = flow.unify(joint, lifted(other, rank))
    for index, value in operands:
        if flow.ids(value) is None:
            _meet(flow, node, index, joint)
    return joint


def _meet(flow: Flow, node: ir.Node, index: int, joint: Array) -> None:
    """Let a constant follow the channels it broadcasts over; bind those that another operand without ids holds."""
    value = node.inputs[index]
    assert value is not None
    if graph.is_constant(value):
        ahead = joint.ndim - len(graph.static_shape(value) or ())
        for axis in varying(joint):
            if axis >= ahead:
                flow.read(node, index, axis - ahead, "through", joint, axis)
        return
    dims = flow.dims(value) or ()
    padded = (1,) * (joint.ndim - len(dims)) + dims
    held = [axis for axis in varying(joint) if padded[axis] != 1]
    flow.bind(joint, held, node, f"it meets {flow.describe(value)}")


def quantize(flow: Flow, node: ir.Node) -> None:
    """QuantizeLinear and DequantizeLinear of an activation, one scale for the whole tensor."""
    shape = graph.static_shape(node.inputs[1])
    if shape is None or any(dim != 1 for dim in shape):
        flow.refuse(node, "its scale is not one constant number")
    else:
        elementwise(flow, node)


def batchnorm(flow: Flow, node: ir.Node) -> None:
    """BatchNormalization in inference."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    if graph.attribute(node, "training_mode", 0) or not graph.attribute(node, "spatial", 1):
        flow.refuse(node, "it does not normalise channel by channel")
        return
    for index in range(1, 5):
        flow.read(node, index, 0, "through", ids, 1)
    flow.give(node.outputs[0], ids)


def instancenorm(flow: Flow, node: ir.Node) -> None:
    """InstanceNormalization: each channel by its own positions."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    flow.bind(ids, range(2, ids.ndim), node, "it normalises over them")
    for index in (1, 2):
        flow.read(node, index, 0, "through", ids, 1)
    flow.give(node.outputs[0], ids)


def groupnorm(flow: Flow, node: ir.Node) -> None:
    """GroupNormalization: a group of channels stands or falls."""
    ids, groups = flow.ids(node.inputs[0]), graph.attribute(node, "num_groups")
    if ids is None:
        return
    flow.bind(ids, [0, *range(2, ids.ndim)], node, "it normalises over them")
    ids = flat(ids, [0, *range(2, ids.ndim)])
    if ids.shape[1] == 1 or ids.shape[1] % groups:
        flow.refuse(node, "it normalises over them")
        return
    parts = ids.reshape(1, groups, -1)
    flow.bind(parts, (2,), node, "it normalises over them")
    heads = flat(parts, (2,))
    for index in (1, 2):
        scale = graph.static_shape(node.inputs[index])
        flow.read(node, index, 0, "through", heads if scale == (groups,) else ids, 1)
    flow.count(node, 0, (groups,), heads, 1)
    flow.give(node.outputs[0], ids)


def along_axis(flow: Flow, node: ir.Node) -> None:
    """Ops that mix all positions of one axis (before opset 13, Softmax of all later axes too) and keep the shape."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    opset = graph.opset(flow.graph)
    later = node.op_type == "LayerNormalization" or ("max" in node.op_type.lower() and opset < 13)
    axis = graph.attribute(node, "axis", 1 if "max" in node.op_type.lower() and opset < 13 else -1)
    axis %= ids.ndim
    flow.bind(ids, range(axis, ids.ndim) if later else (axis,), node, "it normalises over them")
    flow.give(node.outputs[0], ids)


def cumsum(flow: Flow, node: ir.Node) -> None:
    """CumSum along a constant axis."""
    ids, axis = flow.ids(node.inputs[0]), graph.constant(node.inputs[1])
    if ids is None:
        return
    if axis is None:
        flow.refuse(node, "its axis is not constant")
        return
    flow.bind(ids, (int(axis.reshape(-1)[0]),), node, "it sums over them")
    flow.give(node.outputs[0], ids)


def meanvariance(flow: Flow, node: ir.Node) -> None:
    """MeanVarianceNormalization."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    flow.bind(ids, graph.attribute(node, "axes", [0, 2, 3]), node, "it normalises over them")
    flow.give(node.outputs[0], ids)


def reduce(flow: Flow, node: ir.Node) -> None:
    """Reductions and ArgMax: what they reduce over is whole or gone."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    axes = axes_of(node, ids.ndim)
    if axes is None:
        flow.refuse(node, "its axes are not constant")
        return
    flow.bind(ids, axes, node, "it reduces over them")
    left = flat(ids, axes)
    if left.size == 1:
        return
    flow.give(node.outputs[0], left if graph.attribute(node, "keepdims", 1) else np.squeeze(left, tuple(axes)))


def axes_of(node: ir.Node, rank: int) -> list[int] | None:
    """Return the axes that a node names, by attribute or input; all when it names none; None when unknown."""
    if node.op_type in ("ArgMax", "ArgMin"):
        return [graph.attribute(node, "axis", 0) % rank]
    axes = graph.attribute(node, "axes")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None and given is not None:
        found = graph.constant(given)
        if found is None:
            return None
        axes = found.reshape(-1).tolist()
    if not axes:
        return [] if graph.attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in axes)


def pool(flow: Flow, node: ir.Node) -> None:
    """Pooling over positions, local or global."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    positions = range(2, ids.ndim)
    flow.bind(ids, positions, node, "it pools over them")
    if (left := flat(ids, positions)).size > 1:
        flow.give(node.outputs[0], left)


def mixes(flow: Flow, node: ir.Node) -> None:
    """Ops known to let channels depend on each other."""
    flow.refuse(node, "it mixes neighbouring channels")
