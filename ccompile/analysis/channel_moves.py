"""How ops that move, cut, join or stretch values treat channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_flow import Flow, flat, lifted
from ccompile.analysis.channel_linear import embedding
from ccompile.analysis.channel_maths import axes_of, join
from ccompile.analysis.channel_reshape import is_same, numbers, paddings, reads_size, reads_sizes, slices
from ccompile.core import Array


def transpose(flow: Flow, node: ir.Node) -> None:
    """Transpose."""
    ids = flow.ids(node.inputs[0])
    if ids is not None:
        flow.give(node.outputs[0], np.transpose(ids, graph.attribute(node, "perm")))


def squeeze(flow: Flow, node: ir.Node) -> None:
    """Squeeze with given axes."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    if graph.attribute(node, "axes") is None and len(node.inputs) < 2:
        flow.refuse(node, "it drops whatever axis has size 1")
        return
    axes = axes_of(node, ids.ndim)
    if axes is None or any(ids.shape[axis] > 1 for axis in axes):
        flow.refuse(node, "its axes are not constant")
        return
    flow.give(node.outputs[0], np.squeeze(ids, tuple(axes)))


def unsqueeze(flow: Flow, node: ir.Node) -> None:
    """Unsqueeze."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    axes = graph.attribute(node, "axes")
    found = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = found.reshape(-1).tolist() if found is not None else axes
    if axes is None:
        flow.refuse(node, "its axes are not constant")
    else:
        flow.give(node.outputs[0], np.expand_dims(ids, tuple(int(axis) for axis in axes)))


def concat(flow: Flow, node: ir.Node) -> None:
    """Concat: along its axis channels stand side by side, along the others they must agree."""
    values = [value for value in node.inputs if value is not None]
    carried = [ids for value in values if (ids := flow.ids(value)) is not None]
    if not carried:
        return
    axis = graph.attribute(node, "axis") % carried[0].ndim
    if all(ids.shape[axis] == 1 for ids in carried):
        joint = join(flow, node)
        if joint is not None:
            flow.give(node.outputs[0], joint)
        return
    sizes = [dims[axis] if (dims := flow.dims(value)) is not None else None for value in values]
    if not all(isinstance(size, int) for size in sizes):
        flow.refuse(node, "it joins them with an axis of open size")
        return
    around = np.broadcast_shapes(*(flat(ids, (axis,)).shape for ids in carried))
    parts = []
    for value, size in zip(values, sizes, strict=True):
        assert isinstance(size, int)
        ids = flow.ids(value)
        if ids is None:
            ids = _held(flow, node, value, size).reshape([size if k == axis else 1 for k in range(len(around))])
        elif ids.shape[axis] == 1:
            ids = ids.repeat(size, axis)
        parts.append(_widened(ids, around, axis))
    flow.give(node.outputs[0], np.concatenate(parts, axis))


def _widened(ids: Array, around: tuple[int, ...], axis: int) -> Array:
    """Return `ids` broadcast to `around` on every axis but one."""
    return np.broadcast_to(ids, (*around[:axis], ids.shape[axis], *around[axis + 1 :]))


def _held(flow: Flow, node: ir.Node, value: ir.Value, size: int) -> Array:
    ids = flow.fresh(node, size)
    flow.pin(ids, node, f"it joins {flow.describe(value)}")
    return ids


def split(flow: Flow, node: ir.Node) -> None:
    """Split."""
    x = node.inputs[0]
    ids = flow.ids(x)
    if ids is None or x is None:
        return
    axis = graph.attribute(node, "axis", 0) % ids.ndim
    if ids.shape[axis] == 1:
        for output in node.outputs:
            flow.give(output, ids)
        return
    given = node.inputs[1] if len(node.inputs) > 1 else None
    found = graph.constant(given)
    sizes = found.tolist() if found is not None else graph.attribute(node, "split")
    if given is not None and found is None:
        flow.refuse(node, "its sizes are computed")
        return
    if sizes is None:
        each = -(-ids.shape[axis] // len(node.outputs))
        sizes = [min(each, ids.shape[axis] - k * each) for k in range(len(node.outputs))]
    ends = np.cumsum(sizes)
    for k, (output, end) in enumerate(zip(node.outputs, ends, strict=True)):
        part = np.take(ids, range(int(end) - int(sizes[k]), int(end)), axis)
        flow.count(node, k, sizes, part, axis)
        flow.give(output, part)


def cut(flow: Flow, node: ir.Node) -> None:
    """Slice: plain along other axes; along channels when it is constant and has step 1."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    ranges = slices(node, ids.ndim)
    if ranges is None:
        flow.refuse(node, "its axes are not constant")
        return
    out = ids
    for index, (axis, part) in enumerate(ranges.items()):
        if ids.shape[axis] == 1:
            continue
        if part is None or part.step != 1:
            flow.bind(ids, (axis,), node, "it does not cut them by a constant range of step 1")
            continue
        start, end, _ = part.indices(ids.shape[axis])
        flow.count(node, index, (start, end), ids, axis)
        out = out.take(range(start, end), axis)
    flow.give(node.outputs[0], out)


def gather(flow: Flow, node: ir.Node) -> None:
    """Gather: constant indices choose channels; other axes keep them; a constant table makes new ones."""
    ids, where = flow.ids(node.inputs[0]), node.inputs[1]
    if ids is None or where is None:
        if graph.is_constant(node.inputs[0]):
            embedding(flow, node)
        return
    axis = graph.attribute(node, "axis", 0) % ids.ndim
    index, rank = graph.constant(where), flow.rank(where)
    if rank is None:
        flow.refuse(node, "the rank of its indices is unknown")
        return
    if ids.shape[axis] > 1 and index is not None and index.ndim == 1:
        chosen = np.where(index < 0, index + ids.shape[axis], index)
        flow.count(node, 0, chosen.tolist(), ids, axis)
        flow.give(node.outputs[0], ids.take(chosen, axis))
        return
    flow.bind(ids, (axis,), node, "it does not choose them by a constant list")
    rest = flat(ids, (axis,))
    if rest.size > 1:
        shape = (*rest.shape[:axis], *(1,) * rank, *rest.shape[axis + 1 :])
        flow.give(node.outputs[0], rest.reshape(shape))


def pad(flow: Flow, node: ir.Node) -> None:
    """Pad: padded positions of a channel axis are channels too, which nothing makes."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        return
    pads = paddings(node, ids.ndim)
    if pads is None:
        flow.refuse(node, "its amounts are not constant")
        return
    for k, (axis, (begin, end)) in enumerate(pads.items()):
        if ids.shape[axis] == 1 or begin == end == 0:
            continue
        if min(begin, end) < 0 or graph.attribute(node, "mode", "constant") != "constant":
            flow.bind(ids, (axis,), node, "it does not pad them with a constant")
            return
        shape = [-1 if other == axis else 1 for other in range(ids.ndim)]
        new = flow.fresh(node, begin + end).reshape(shape)
        parts = (new.take(range(begin), axis), ids, new.take(range(begin, begin + end), axis))
        ids = np.concatenate([_widened(part, ids.shape, axis) for part in parts], axis)
        flow.count(node, k, (begin, end), ids, axis)
    flow.give(node.outputs[0], ids)


def expand(flow: Flow, node: ir.Node) -> None:
    """Expand: axes of size 1 grow, channels stay."""
    ids, target = flow.ids(node.inputs[0]), numbers(flow, node.inputs[1])
    if ids is None or target is None:
        flow.refuse(node, "its target shape is computed")
        reads_sizes(flow, node)
        return
    rank = max(ids.ndim, len(target))
    out, entries = lifted(ids, rank), (1,) * (rank - len(target)) + target
    now = [entry for entry in target if isinstance(entry, int)]
    for axis, entry in enumerate(entries):
        if out.shape[axis] == 1:
            reads_size(flow, node, entry)
        elif len(now) == len(target):
            if entry != 1:
                flow.count(node, axis - (rank - len(target)), now, out, axis)
        elif entry != 1 and not is_same(flow, entry, out, axis):
            flow.bind(out, (axis,), node, "its target shape is computed")
    flow.give(node.outputs[0], out)


def tile(flow: Flow, node: ir.Node) -> None:
    """Tile by constant counts."""
    ids, times = flow.ids(node.inputs[0]), graph.constant(node.inputs[1])
    if ids is None:
        return
    if times is None:
        flow.refuse(node, "its counts are not constant")
        return
    repeats = [int(n) if size > 1 else 1 for n, size in zip(times, ids.shape, strict=True)]
    flow.give(node.outputs[0], np.tile(ids, repeats))


def resize(flow: Flow, node: ir.Node) -> None:
    """Resize and Upsample: channels that are not scaled pass."""
    ids = flow.ids(node.inputs[0])
    if ids is None:
        reads_sizes(flow, node)
        return
    if graph.attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        flow.refuse(node, "it crops")
        reads_sizes(flow, node)
        return
    scaled = node.inputs[2 if len(node.inputs) > 2 else 1] if len(node.inputs) > 1 else None
    scales = graph.attribute(node, "scales") if scaled is None else graph.constant(scaled)
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    axes = [axis % ids.ndim for axis in graph.attribute(node, "axes", list(range(ids.ndim)))]
    entries = numbers(flow, sizes)
    for k, axis in enumerate(axes):
        entry = entries[k] if sizes is not None and entries is not None else None
        if ids.shape[axis] == 1:
            reads_size(flow, node, entry)
            continue
        if sizes is None and scales is not None and len(scales) == len(axes) and float(scales[k]) == 1.0:
            continue
        whole = entries is not None and all(isinstance(e, int) for e in entries)
        if entry == ids.shape[axis] and whole and entries is not None:
            flow.count(node, k, [e for e in entries if isinstance(e, int)], ids, axis)
        elif not is_same(flow, entry, ids, axis):
            flow.bind(ids, (axis,), node, "it resizes them")
    flow.give(node.outputs[0], ids)


def depth_to_space(flow: Flow, node: ir.Node) -> None:
    """DepthToSpace: the channels that become one picture stay together."""
    ids, block = flow.ids(node.inputs[0]), graph.attribute(node, "blocksize")
    if ids is None:
        return
    flow.bind(ids, (0, 2, 3), node, "it spreads them over positions")
    row = flat(ids, (0, 2, 3))
    if row.size == 1:
        return
    shape = (block * block, -1) if graph.attribute(node, "mode", "DCR") == "DCR" else (-1, block * block)
    parts = row.reshape(shape)
    inner = 0 if shape[1] == -1 else 1
    flow.bind(parts, (inner,), node, "it spreads them over positions")
    flow.give(node.outputs[0], flat(parts, (inner,)).reshape(1, -1, 1, 1))


def space_to_depth(flow: Flow, node: ir.Node) -> None:
    """SpaceToDepth: every channel becomes blocksize**2 of them."""
    ids, block = flow.ids(node.inputs[0]), graph.attribute(node, "blocksize")
    if ids is None:
        return
    flow.bind(ids, (0, 2, 3), node, "it gathers them from positions")
    row = flat(ids, (0, 2, 3))
    if row.size > 1:
        flow.give(node.outputs[0], np.tile(row, (1, block * block, 1, 1)))
