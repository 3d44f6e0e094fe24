"""Which channels must live and die together, in any graph.

Ids of channels run through the graph's own shape ops (channel_flow); where two meet they are joined; what is not
understood pins what it touches, with the reason. Removing whole units of a group keeps every tensor a rectangle and
changes nothing but what the removed channels contributed. Source: the coupling of Torch-Pruning (Fang et al. 2023,
arXiv:2301.12900), computed here by index arrays instead of per-layer rules.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import channel_guess, channel_linear, channel_maths, channel_moves, channel_reshape
from ccompile.analysis.channel_flow import Flow, Handler, Read, Role, compressed, default_domain, flat, varying
from ccompile.analysis.channel_groups import Carrier, Channels, Gathering, Group, Member, Size
from ccompile.core import Array

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil
    Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity
    IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCE = """
    ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare
"""
_POOL = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
_AXIS = "Hardmax LayerNormalization LogSoftmax LpNormalization RMSNormalization Softmax"

# op -> how it treats channels; any other op pins what flows into it
_OPS: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE.split(), channel_maths.elementwise),
    **dict.fromkeys(_REDUCE.split(), channel_maths.reduce),
    **dict.fromkeys(_POOL.split(), channel_maths.pool),
    **dict.fromkeys(_AXIS.split(), channel_maths.along_axis),
    "BatchNormalization": channel_maths.batchnorm,
    "Concat": channel_moves.concat,
    "Conv": channel_linear.conv,
    "ConvTranspose": channel_linear.conv,
    "CumSum": channel_maths.cumsum,
    "DepthToSpace": channel_moves.depth_to_space,
    "DequantizeLinear": channel_maths.quantize,
    "Expand": channel_moves.expand,
    "Flatten": channel_reshape.reshape,
    "Gather": channel_moves.gather,
    "Gemm": channel_linear.gemm,
    "GroupNormalization": channel_maths.groupnorm,
    "InstanceNormalization": channel_maths.instancenorm,
    "LRN": channel_maths.mixes,
    "MatMul": channel_linear.matmul,
    "MeanVarianceNormalization": channel_maths.meanvariance,
    "Pad": channel_moves.pad,
    "QuantizeLinear": channel_maths.quantize,
    "Reshape": channel_reshape.reshape,
    "Resize": channel_moves.resize,
    "Shape": lambda flow, node: None,
    "Slice": channel_moves.cut,
    "SpaceToDepth": channel_moves.space_to_depth,
    "Split": channel_moves.split,
    "Squeeze": channel_moves.squeeze,
    "Tile": channel_moves.tile,
    "Transpose": channel_moves.transpose,
    "Unsqueeze": channel_moves.unsqueeze,
    "Upsample": channel_moves.resize,
}
# ops that hand shape vectors on, and ops that look after the sizes they are given
_SIZE_OPS = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze")
_SIZED_OPS = ("Expand", "Reshape", "Resize")


def channels(model: ir.Model) -> Channels:
    """Return the groups of coupled channels of a model's main graph."""
    flow = Flow(model)
    for node in model.graph:
        _walk(flow, node)
    _pin_outside(flow)
    _agree_on_shared(flow)
    return Gathering(flow, _settle(flow)).gather()


def _walk(flow: Flow, node: ir.Node) -> None:
    if all(graph.is_constant(output) for output in node.outputs):
        return
    handler = _OPS.get(node.op_type) if default_domain(node) else None
    hands_on = handler is not None and node.op_type in _SIZE_OPS and channel_reshape.follow_sizes(flow, node)
    if handler is None or not (hands_on or node.op_type in _SIZED_OPS):
        channel_reshape.reads_sizes(flow, node)
    if handler is None:
        name = node.op_type if default_domain(node) else f"{node.domain}::{node.op_type}"
        flow.refuse(node, f"unknown op {name}")
        return
    if node.op_type != "Split" and any(list(o.uses()) or o.is_graph_output() for o in node.outputs[1:]):
        flow.refuse(node, "its further outputs are read")
    else:
        handler(flow, node)
    channel_guess.guess(flow, node)


def _pin_outside(flow: Flow) -> None:
    """Pin what the world outside the main graph's nodes sees: graph outputs, subgraphs."""
    for node in flow.graph:
        for output in node.outputs:
            ids, entries = flow.ids(output), flow.numbers.get(str(output.name), ())
            inner = [use.node for use in output.uses() if use.node.graph is not flow.graph]
            for seen, reason in (
                (output.is_graph_output(), f"graph output `{output.name}`"),
                (bool(inner), f"a subgraph reads `{output.name}`"),
            ):
                if seen and ids is not None:
                    flow.pin(ids, node, reason)
                for entry in entries if seen else ():
                    channel_reshape.reads_size(flow, node, entry)


def _agree_on_shared(flow: Flow) -> None:
    """Join what the readers of one constant say of it; pin it where a reader says nothing or it hides behind ops."""
    by_value: dict[ir.Value, list[Read]] = defaultdict(list)
    for read in flow.reads:
        by_value[read.value].append(read)
    for value, reads in by_value.items():
        chain = graph.stored_chain(value) or ()
        links = [node.inputs[0] for node in chain if node.op_type != "ConstantOfShape"]
        if any(link is not None and (len(list(link.uses())) > 1 or link.is_graph_output()) for link in links):
            for read in reads:
                flow.pin(read.ids, read.node, f"`{value.name}` shares its storage with another constant")
        readers = {(use.node, use.idx) for use in value.uses()}
        if len(readers) > 1 or value.is_graph_output():
            for axis in sorted({read.axis for read in reads}):
                _agree(flow, value, [read for read in reads if read.axis == axis], readers)


def _agree(flow: Flow, value: ir.Value, reads: list[Read], readers: set[tuple[ir.Node, int]]) -> None:
    silent = readers - {(read.node, read.input) for read in reads}
    plain = all(len(varying(read.ids)) == 1 for read in reads)
    if silent or not plain or value.is_graph_output():
        for read in reads:
            flow.pin(read.ids, read.node, f"`{value.name}` is shared with a reader that needs all of it")
        return
    for read in reads[1:]:
        flow.unify(reads[0].ids.reshape(-1), read.ids.reshape(-1))


def _settle(flow: Flow) -> Array:
    """Join units until every value's vary along one axis, so that what is left is always a rectangle; return them.

    Where several axes would do, the longest stays.
    """
    several = [ids for ids in _distinct(flow) if len(varying(ids)) > 1]
    unit = flow.components()
    while True:
        for ids in several:
            now = compressed(unit[ids])
            if len(varying(now)) > 1:
                keep = int(np.argmax(now.shape))
                flow.unify(ids, flat(ids, [axis for axis in range(ids.ndim) if axis != keep]))
                unit = flow.components()
                break
        else:
            break
    _pin_wholes(flow, unit)
    return unit


def _pin_wholes(flow: Flow, unit: Array) -> None:
    """Pin units that are all of some value: it would be left empty."""
    seen = set()
    for node in flow.graph:
        for output in node.outputs:
            ids = flow.ids(output)
            if ids is None or (whole := unit[ids.flat[0]]) in seen or not np.all(unit[ids] == whole):
                continue
            seen.add(whole)
            flow.pin(ids.reshape(-1)[:1], node, f"all channels of `{output.name}` stand and fall together")
            why = dict.fromkeys(skip for first, skip in flow.notes if unit[first] == whole)
            flow.pins += [(ids.reshape(-1)[:1], skip) for skip in why]


def _distinct(flow: Flow) -> list[Array]:
    return list({id(ids): ids for ids in flow.values.values()}.values())


__all__ = ["Carrier", "Channels", "Group", "Member", "Role", "Size", "channels"]
