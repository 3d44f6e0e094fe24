"""Constants: nodes that make them become initializers, equal ones are stored once."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np
import onnx_ir as ir

from ccompile import graph, onnx_io, tidying
from ccompile.core import Array, Site, Skip, View
from ccompile.errors import ModelError

RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli".split())
QUANTISED = frozenset("QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split())
_FOLDED_DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16}
    | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32}
    | {ir.DataType.UINT64}
)


def lifted(view: View) -> list[Site]:
    """Let initializers take the place of Constant nodes."""
    found = []
    for node in view.graph:
        tensor = graph.stored(node.outputs[0]) if node.op_type == "Constant" and node.outputs else None
        if tensor is None or node.outputs[0].is_graph_output() or view.excluded(node):
            continue
        old = node.outputs[0]
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(graph.dims_of(tensor))
        mine = graph.renamed(tensor, str(old.name))
        value = ir.Value(name=old.name, const_value=mine, type=kind, shape=shape)
        output = tidying.reader(old)
        old.replace_all_uses_with(value)
        view.graph.remove(node, safe=True)
        view.graph.register_initializer(value)
        found.append(Site((str(node.name),), "Constant node became an initializer", output=output))
    return found


def folded(view: View, growth: int, skipped: dict[str, Skip]) -> list[Site]:
    """Let initializers take the place of nodes that depend on constants only; each may store `growth` bytes."""
    inner: dict[ir.Node, None] = {}
    known = {value for value in view.graph.initializers.values() if not value.is_graph_input()}
    found = []
    for node in view.graph:
        if (shape := _static_shape_of(node, view)) is not None and not view.excluded(node):
            found.append(_become(view, node.outputs[0], shape))
            continue
        if not _foldable(node, known, view):
            continue
        reason = view.excluded(node) or _refusal(node, growth, view)
        if reason:
            skipped[reason.node] = reason
            continue
        inner[node] = None
        known.update(node.outputs)
    edges = [v for node in inner for v in node.outputs if any(use.node not in inner for use in v.uses())]
    return found + _evaluate(view, edges, skipped)


def _static_shape_of(node: ir.Node, view: View) -> Array | None:
    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    dims = tidying.types_of(view, node.inputs[0]).shape
    if dims is None:
        return None
    part = dims[graph.attribute(node, "start", 0) : graph.attribute(node, "end", None)]
    return np.array(part, np.int64) if all(isinstance(dim, int) for dim in part) else None


def _foldable(node: ir.Node, known: set[ir.Value], view: View) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_identifier() in view.model.functions or not node.inputs:
        return False
    if node.op_type in RANDOM or node.op_type == "Constant" or next(graph.subgraphs(node), None) is not None:
        return False
    return all(value is None or value in known for value in node.inputs)


def _refusal(node: ir.Node, growth: int, view: View) -> Skip | None:
    """Return why a constant node stays, or None."""
    name = str(node.name)
    if node.op_type in QUANTISED:
        return Skip(name, "constant, but folding would undo a quantisation")
    if any(output.is_graph_output() for output in node.outputs):
        return Skip(name, "constant, but a graph output must be produced by a node")
    if node.op_type == "Dropout":
        return Skip(name, "constant, but random in training")
    types = [tidying.types_of(view, output) for output in node.outputs]
    if any(kind.dtype not in _FOLDED_DTYPES for kind in types):
        return Skip(name, "constant, but not a tensor of a plain numeric type")
    freed = {value for value in node.inputs if value is not None and all(use.node is node for use in value.uses())}
    read = sum(tidying.types_of(view, value).nbytes or 0 for value in freed)
    sizes = [kind.nbytes for kind in types if kind.nbytes is not None]
    if len(sizes) < len(types):
        return Skip(name, "constant, but of unknown size")
    if sum(sizes) > max(read, growth):
        return Skip(name, f"constant, but folding would store {sum(sizes)} bytes in place of {read}")
    return None


def _evaluate(view: View, edges: list[ir.Value], skipped: dict[str, Skip]) -> list[Site]:
    if not edges:
        return []
    try:
        return [_become(view, value, array) for value, array in zip(edges, view.evaluate(edges), strict=True)]
    except ModelError:
        pass  # one of them cannot be computed: find out which, and say so
    found = []
    for value in edges:
        try:
            found.append(_become(view, value, view.evaluate([value])[0]))
        except ModelError as error:
            producer = value.producer()
            name = str(producer.name) if producer else str(value.name)
            skipped[name] = Skip(name, f"constant, but the runtime cannot compute it: {error.problems[0].message}")
    return found


def _become(view: View, value: ir.Value, array: Array) -> Site:
    """Let an initializer take the place of a node's output."""
    producer = value.producer()
    assert producer is not None
    output = tidying.reader(value)
    value.replace_all_uses_with(graph.add_constant(view.graph, f"{value.name}_folded", array))
    return Site((str(producer.name),), f"{producer.op_type} of constants folded", output=output)


def shared(view: View, skipped: dict[str, Skip]) -> list[Site]:
    """Store equal initializers once."""
    alike: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in view.graph.initializers.values():
        if (tensor := value.const_value) is not None and _sharable(value):
            alike[(tensor.dtype, tuple(tensor.shape))].append(value)
    found = []
    for group in (group for group in alike.values() if len(group) > 1):
        blocked = {value: next(filter(None, map(view.excluded, _readers(value))), None) for value in group}
        first: dict[bytes, ir.Value] = {}
        for value in sorted(group, key=lambda value: blocked[value] is not None):  # those that may be shared come first
            assert value.const_value is not None
            kept = first.setdefault(hashlib.sha256(value.const_value.tobytes()).digest(), value)
            if kept is value:
                continue
            if (excluded := blocked[value]) is not None:
                skipped[excluded.node] = excluded
                continue
            nodes = tuple(str(node.name) for node in _readers(value))
            value.replace_all_uses_with(kept)
            view.graph.initializers.pop(str(value.name))
            found.append(Site(nodes, f"initializer `{value.name}` equals `{kept.name}`", output=tidying.reader(kept)))
    return found


def _sharable(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or isinstance(tensor, onnx_io.SparseTensor) or tensor.dtype == ir.DataType.STRING:
        return False
    return not value.is_graph_output() and not value.is_graph_input()


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(use.node for use in value.uses()))
