"""What is known of shape vectors, and how Reshape and Flatten carry channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_flow import Dims, Entry, Flow, compressed, flat, line, product, varying
from ccompile.analysis.shapes import UNKNOWN, Dim
from ccompile.core import Array

Segment = tuple[list[int], list[int]]  # axes before, axes after, with the same number of elements


def numbers(flow: Flow, value: ir.Value | None) -> tuple[Entry, ...] | None:
    """Return what is known of a vector of sizes, or None."""
    if value is None:
        return None
    found = flow.numbers.get(str(value.name))
    if found is None and graph.is_constant(value):
        array = graph.constant(value)
        if array is not None and array.dtype.kind in "iu" and array.ndim < 2:
            return tuple(int(n) for n in array.reshape(-1))
    return found


def follow_sizes(flow: Flow, node: ir.Node) -> bool:
    """Note the vector of sizes that a node hands on; return whether it does."""
    entries = _sizes(flow, node)
    if entries is not None:
        flow.numbers[str(node.outputs[0].name)] = entries
    return entries is not None


def _sizes(flow: Flow, node: ir.Node) -> tuple[Entry, ...] | None:
    first = node.inputs[0]
    if node.op_type == "Shape":
        rank = None if first is None else flow.rank(first)
        if rank is None or first is None:
            return None
        whole = tuple((str(first.name), axis) for axis in range(rank))
        return whole[graph.attribute(node, "start", 0) : graph.attribute(node, "end", rank)]
    parts = [numbers(flow, value) for value in node.inputs]
    if node.op_type == "Concat":
        return None if any(p is None for p in parts) else tuple(entry for part in parts for entry in part or ())
    if parts[0] is None or not any(isinstance(entry, tuple) for entry in parts[0]):
        return None
    if node.op_type == "Gather":
        index = graph.constant(node.inputs[1])
        inside = index is not None and bool((np.abs(index) < len(parts[0])).all())
        return tuple(parts[0][int(i)] for i in np.asarray(index).reshape(-1)) if inside else None
    if node.op_type == "Slice":
        part = (slices(node, 1) or {}).get(0)
        return None if part is None else parts[0][part]
    return parts[0]


def reads_sizes(flow: Flow, node: ir.Node) -> None:
    """Bind channels whose number tells `node` something."""
    for value in node.inputs:
        for entry in flow.numbers.get(str(value.name), ()) if value is not None else ():
            reads_size(flow, node, entry)


def reads_size(flow: Flow, node: ir.Node, entry: Entry) -> None:
    """Bind the channels that `entry` counts, if it does."""
    if isinstance(entry, tuple) and (ids := flow.values.get(entry[0])) is not None:
        flow.bind(ids, (entry[1],), node, f"it computes with the size of `{entry[0]}`")


def slices(node: ir.Node, rank: int) -> dict[int, slice | None] | None:
    """Return what a Slice cuts of each axis, None where it is not constant; None when the axes are unknown."""
    given: dict[str, list[int] | None] = {}
    for index, name in enumerate(("starts", "ends", "axes", "steps"), start=1):
        value = node.inputs[index] if len(node.inputs) > index else None
        array = graph.constant(value)
        given[name] = graph.attribute(node, name) if value is None else None
        if array is not None:
            given[name] = array.reshape(-1).tolist()
        elif value is not None and name in ("axes", "steps"):
            return None
    starts, ends, axes, steps = given.values()
    if axes is None and starts is None:
        return None
    found: dict[int, slice | None] = {}
    for k, axis in enumerate(axes if axes is not None else range(len(starts or ()))):
        found[axis % rank] = slice(starts[k], ends[k], steps[k] if steps else 1) if starts and ends else None
    return found


def paddings(node: ir.Node, rank: int) -> dict[int, tuple[int, int]] | None:
    """Return what a Pad puts before and behind its axes; None where that is not constant or of another rank."""
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    pads = given.reshape(-1).tolist() if given is not None else graph.attribute(node, "pads")
    listed = node.inputs[3] if len(node.inputs) > 3 else None
    chosen = graph.constant(listed)
    if pads is None or (listed is not None and chosen is None):
        return None
    axes = list(range(rank)) if chosen is None else [int(axis) % rank for axis in chosen.reshape(-1)]
    if len(pads) != 2 * len(axes):
        return None
    return {axis: (int(pads[k]), int(pads[k + len(axes)])) for k, axis in enumerate(axes)}


def is_same(flow: Flow, entry: Entry, ids: Array, axis: int) -> bool:
    """Return whether a size is that of the very channels of `ids`."""
    if not isinstance(entry, tuple) or (other := flow.values.get(entry[0])) is None:
        return False
    return np.array_equal(line(other, entry[1]), line(ids, axis)) and len(varying(other)) == len(varying(ids)) == 1


def reshape(flow: Flow, node: ir.Node) -> None:
    """Reshape and Flatten: run the ids themselves through the change of shape."""
    x = node.inputs[0]
    ids = flow.ids(x)
    if ids is None or x is None:
        if str(node.outputs[0].name) not in flow.numbers:
            reads_sizes(flow, node)
        return
    dims = flow.dims(x)
    assert dims is not None
    target = _flatten_target(node, dims) if node.op_type == "Flatten" else _target(flow, node, str(x.name), dims)
    if isinstance(target, str):
        flow.refuse(node, target)
        reads_sizes(flow, node)
        return
    template, after = target
    segments = segments_of(dims, after, template)
    moved = _through(flow, node, ids, dims, after, segments)
    if moved is None:
        reads_sizes(flow, node)
        return
    if node.op_type == "Reshape":
        _count_target(flow, node, ids, moved, template)
    flow.give(node.outputs[0], moved)


def _count_target(flow: Flow, node: ir.Node, ids: Array, moved: Array, template: tuple[int, ...]) -> None:
    """Note which entries of the target count channels; bind those that other entries count."""
    entries = numbers(flow, node.inputs[1]) or ()
    own = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    for axis, entry in enumerate(entries):
        if moved.shape[axis] > 1 and template[axis] != -1:
            flow.count(node, axis, template, moved, axis)
        elif moved.shape[axis] == 1 and (entry == 0 or entry == (own, axis)) and axis < ids.ndim:
            flow.bind(ids, (axis,), node, "it copies their number to another axis")
        elif not is_same(flow, entry, moved, axis):
            reads_size(flow, node, entry)


def _flatten_target(node: ir.Node, dims: Dims) -> tuple[tuple[int, ...], Dims]:
    axis = graph.attribute(node, "axis", 1)
    axis += len(dims) if axis < 0 else 0
    return (0 if axis == 1 else -1, -1), (dims[0] if axis == 1 else product(dims[:axis]), product(dims[axis:]))


def _target(flow: Flow, node: ir.Node, name: str, dims: Dims) -> tuple[tuple[int, ...], Dims] | str:
    """Return a constant target that is right for any size of the open axes, and the new dimensions; or why not."""
    entries = numbers(flow, node.inputs[1])
    if entries is None:
        return "its target shape is computed"
    if 0 in entries and graph.attribute(node, "allowzero", 0):
        return "its target shape is empty"
    known = flow.types.get(str(node.outputs[0].name), UNKNOWN).static
    template: list[int] = []
    after: list[Dim] = []
    for axis, entry in enumerate(entries):
        here = dims[axis] if axis < len(dims) else None
        if isinstance(entry, tuple) and here is not None and flow.open_size(entry) == here:
            entry = (name, axis)
        if entry == 0 or entry == (name, axis):
            fixed = axis < len(dims) and isinstance(here, int)
            template.append(here if fixed and isinstance(here, int) else 0)
            after.append(here)
        elif isinstance(entry, int) and entry > 0:
            template.append(entry)
            after.append(entry)
        else:
            template.append(-1)
            after.append(known[axis] if known is not None and len(known) == len(entries) else None)
    if template.count(-1) > 1:
        return "its target shape is computed from more than one open size"
    if -1 in template and after[template.index(-1)] is None:
        after[template.index(-1)] = _remaining(dims, template, after)
    return tuple(template), tuple(after)


def _remaining(dims: Dims, template: list[int], after: list[Dim]) -> int | None:
    """Return the size that -1 stands for: what the other entries of the target leave, or None when that is open."""
    left = [dim for axis, dim in enumerate(dims) if axis >= len(template) or template[axis] != 0]
    taken = [dim for entry, dim in zip(template, after, strict=True) if entry > 0]
    total, rest = product(left), product(taken)
    return total // rest if total is not None and rest else None


def segments_of(before: Dims, after: Dims, template: tuple[int, ...] = ()) -> list[Segment]:
    """Split a change of shape into independent ones: matched from the left, then from the right, the rest is one.

    >>> segments_of(("N", 6, "T"), ("N", 2, 3, "T"))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    n, m = len(before), len(after)
    same = {i for i in range(min(n, m)) if i < len(template) and template[i] == 0}
    left = _match(before, after, same)
    i, j = (max((axis for part in left for axis in part[k]), default=-1) + 1 for k in (0, 1))
    right = [
        ([n - 1 - a for a in reversed(ins)], [m - 1 - b for b in reversed(outs)])
        for ins, outs in reversed(_match(before[i:][::-1], after[j:][::-1], set()))
    ]
    p, q = (min((axis for part in right for axis in part[k]), default=end) for k, end in ((0, n), (1, m)))
    middle = [(list(range(i, p)), list(range(j, q)))] if i < p or j < q else []
    return [*left, *middle, *right]


def _match(before: Dims, after: Dims, same: set[int]) -> list[Segment]:
    found: list[Segment] = []
    i = j = 0
    while i < len(before) and j < len(after):
        a, b = before[i], after[j]
        if (a is not None and a == b) or (i == j and i in same):
            found.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        p, q = i + 1, j + 1
        while isinstance(a, int) and isinstance(b, int) and a != b:
            if a < b:
                more = before[p] if p < len(before) else None
                a, p = (a * more if isinstance(more, int) else None), p + 1
            else:
                more = after[q] if q < len(after) else None
                b, q = (b * more if isinstance(more, int) else None), q + 1
        if a is None or b is None or a != b:
            break
        found.append((list(range(i, p)), list(range(j, q))))
        i, j = p, q
    return found


def _through(flow: Flow, node: ir.Node, ids: Array, before: Dims, after: Dims, segments: list[Segment]) -> Array | None:
    """Return the ids after a reshape, or None when they are gone; axes that cannot be followed are bound."""
    for ins, outs in segments:
        moving = [axis for axis in ins if ids.shape[axis] > 1]
        sizes = product(before[axis] for axis in ins), product(after[axis] for axis in outs)
        if moving and (sizes[0] is None or sizes[0] != sizes[1]):
            flow.bind(ids, moving, node, "it mixes them with an axis of open size")
            ids = flat(ids, moving)
    wide, out = [1] * len(before), [1] * len(after)
    for ins, outs in segments:
        if any(ids.shape[axis] > 1 for axis in ins):
            for axis in ins:
                wide[axis] = size if isinstance(size := before[axis], int) else 1
            for axis in outs:
                out[axis] = size if isinstance(size := after[axis], int) else 1
    if ids.size == 1:
        return None
    return compressed(np.broadcast_to(ids, wide).reshape(out))
