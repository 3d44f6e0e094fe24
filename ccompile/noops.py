"""Nodes whose first output is one of their inputs.

op                            changes nothing where
Identity                      always
Dropout                       it is outside training, and nothing reads its mask
Cast                          the type is that at hand
Transpose                     the permutation is the identity, or undoes that of the Transpose before
Reshape, Flatten, Expand      the shape is that at hand
Slice, Pad                    nothing is cut off, nothing is added
Concat, Sum, Max, Min, Mean   there is one operand; Concat: or all parts of a Split are joined again
Split                         there is one part
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph, tidying
from ccompile.analysis.shapes import Dim
from ccompile.core import Array, Site, Skip, View
from ccompile.tidying import types_of

Numbers = Array | list[int]


def _noop_always(node: ir.Node, view: View) -> bool:
    return True


def _noop_dropout(node: ir.Node, view: View) -> bool:
    if len(node.outputs) > 1 and (list(node.outputs[1].uses()) or node.outputs[1].is_graph_output()):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = graph.constant(training)
    return training is None or (flag is not None and not flag.any())


def _noop_cast(node: ir.Node, view: View) -> bool:
    dtype = types_of(view, node.inputs[0]).dtype
    return dtype is not None and dtype == graph.attribute(node, "to")


def _noop_transpose(node: ir.Node, view: View) -> bool:
    perm = graph.attribute(node, "perm")
    return perm is not None and list(perm) == list(range(len(perm)))


def _noop_static(node: ir.Node, view: View) -> bool:
    before, after = types_of(view, node.inputs[0]).static, types_of(view, node.outputs[0]).static
    return before is not None and before == after


def _noop_reshape(node: ir.Node, view: View) -> bool:
    wanted, known = graph.constant(node.inputs[1]), types_of(view, node.inputs[0]).shape
    if (
        wanted is not None
        and known is not None
        and len(wanted) == len(known)
        and not graph.attribute(node, "allowzero")
    ):
        loose = [i for i, dim in enumerate(wanted) if dim == -1]
        kept = all(dim in (0, -1) or dim == known[i] for i, dim in enumerate(wanted))
        if kept and len(loose) <= 1 and 0 not in known:
            return True
    return _noop_static(node, view)


def _noop_slice(node: ir.Node, view: View) -> bool:
    dims = types_of(view, node.inputs[0]).shape
    if dims is None:
        return False
    if len(node.inputs) < 3:  # before opset 10
        first, last = (graph.attribute(node, name, []) for name in ("starts", "ends"))
        along = graph.attribute(node, "axes", list(range(len(first))))
        return bool(first) and _is_whole(dims, first, last, along, [1] * len(along))
    starts, ends = (graph.constant(node.inputs[i]) for i in (1, 2))
    given = [graph.constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else None for i in (3, 4)]
    if starts is None or ends is None or (len(node.inputs) > 3 and node.inputs[3] and given[0] is None):
        return False
    if len(node.inputs) > 4 and node.inputs[4] and given[1] is None:
        return False
    axes = given[0] if given[0] is not None else np.arange(len(starts))
    steps = given[1] if given[1] is not None else np.ones(len(starts), np.int64)
    return _is_whole(dims, starts, ends, axes, steps)


def _is_whole(dims: Sequence[Dim], starts: Numbers, ends: Numbers, axes: Numbers, steps: Numbers) -> bool:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[int(axis)]
        whole = end >= (size if isinstance(size, int) else np.iinfo(np.int32).max)
        if step != 1 or start != 0 or not whole:
            return False
    return True


def _noop_pad(node: ir.Node, view: View) -> bool:
    pads = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else graph.attribute(node, "pads")
    return pads is not None and not np.any(pads)


def _noop_single(node: ir.Node, view: View) -> bool:
    return len(node.inputs) == 1 and len(node.outputs) == 1


def _noop_flatten(node: ir.Node, view: View) -> bool:
    known = types_of(view, node.inputs[0]).shape
    return known is not None and len(known) == 2 and graph.attribute(node, "axis", 1) in (1, -1)


# op -> does it change nothing? (then its first output is its first input)
_NOOP: dict[str, Callable[[ir.Node, View], bool]] = {
    "Identity": _noop_always,
    "Dropout": _noop_dropout,
    "Cast": _noop_cast,
    "Transpose": _noop_transpose,
    "Reshape": _noop_reshape,
    "Flatten": _noop_flatten,
    "Expand": _noop_static,
    "Slice": _noop_slice,
    "Pad": _noop_pad,
    "Concat": _noop_single,
    "Sum": _noop_single,
    "Max": _noop_single,
    "Min": _noop_single,
    "Mean": _noop_single,
    "Split": lambda node, view: len(node.outputs) == 1 and bool(node.inputs),
}


def bypassed(view: View, skipped: dict[str, Skip]) -> list[Site]:
    """Let readers of nodes that change nothing read what these read."""
    found = []
    for node in view.graph:
        if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None or not node.outputs:
            continue
        shapes_of = {value: types_of(view, value).shape for value in node.inputs if value is not None}
        source = _inverse_transposes(node) or _joined_parts(node, view) or tidying.neutral(node, shapes_of)
        removable = source is not None
        source = source or node.inputs[0]
        if not removable and not (node.op_type in _NOOP and _NOOP[node.op_type](node, view)):
            continue
        if excluded := view.excluded(node):
            skipped[excluded.node] = excluded
            continue
        name, output = str(node.name), tidying.reader(node.outputs[0])
        if graph.bypass(node, source):
            found.append(Site((name,), f"{node.op_type} changes nothing", output=output))
        else:
            skipped[name] = Skip(name, "changes nothing, but keeps a graph output apart from another value")
    return found


def _inverse_transposes(node: ir.Node) -> ir.Value | None:
    """Return the input of an earlier Transpose that this one undoes."""
    first = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
    if first is None or first.op_type != "Transpose" or first.domain not in ("", "ai.onnx"):
        return None
    inner, outer = graph.attribute(first, "perm"), graph.attribute(node, "perm")
    if inner is None or outer is None or [inner[axis] for axis in outer] != list(range(len(inner))):
        return None
    return first.inputs[0]


def _joined_parts(node: ir.Node, view: View) -> ir.Value | None:
    """Return the input of a Split all of whose parts a Concat joins again, in order and along the same axis."""
    split = node.inputs[0].producer() if node.op_type == "Concat" and node.inputs[0] is not None else None
    if split is None or split.op_type != "Split" or split.domain not in ("", "ai.onnx"):
        return None
    if list(node.inputs) != list(split.outputs):
        return None
    known = types_of(view, split.inputs[0]).shape
    axes = graph.attribute(split, "axis", 0), graph.attribute(node, "axis", 1)
    if axes[0] != axes[1] and (known is None or (axes[0] - axes[1]) % len(known)):
        return None
    return split.inputs[0]
