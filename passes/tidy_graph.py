"""Remove what computes nothing: constants folded, no-ops and dead nodes gone, equal initializers shared.

A node whose output equals one of its inputs is bypassed; a node that depends on constants only becomes an initializer,
unless that would store more bytes than it frees (a ConstantOfShape, a codebook, a half-precision weight) or undo a
quantisation; initializers with equal bytes become one.

Fires:  Identity, Dropout, Cast, Transpose, Reshape, Flatten, Expand, Slice, Pad, Concat, Sum, Max, Min, Mean, Split
        that change nothing; x * 1, x + 0 and the like; Transposes and Reshapes in a row; Shape of a static shape; all
        deterministic constant nodes.
Error:  none; constants are computed by the runtime itself.
Cost:   never more nodes, never more stored bytes (but for constants of up to `growth` bytes each).
Source: compiler folklore; semantics by op from the ONNX operator specification.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from pydantic import Field

from ccompile import graph, tidying
from ccompile.analysis.shapes import UNKNOWN, ValueType, shapes
from ccompile.core import Array, Kind, PassResult, Rewrite, Site, Skip, View
from ccompile.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

Types = dict[str, ValueType]

_RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli".split())
_QUANTISED = frozenset("QuantizeLinear DequantizeLinear DynamicQuantizeLinear".split())
_FOLDED_DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16}
    | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32}
    | {ir.DataType.UINT64}
)
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_FILLED = {"strides": 1, "dilations": 1, "pads": 0}  # what these are on every axis when absent


class TidyGraph(Rewrite):
    """Options of tidy-graph."""

    kind: ClassVar[Kind] = "exact"

    fold_constants: bool = Field(True, description="compute nodes that depend on constants only")
    share_initializers: bool = Field(True, description="store equal initializers once")
    compact: bool = Field(
        False, description="leave out of the file what follows: inner types that inference finds, default attributes"
    )
    growth: int = Field(4096, ge=0, le=1_000_000_000, description="a folded constant of up to this many bytes may grow")

    def run(self, view: View) -> PassResult:
        """Apply all rules until none fires."""
        applied: list[Site] = []
        skipped: dict[str, Skip] = {}
        while True:
            before = len(applied)
            applied += _lift_constants(view)
            applied += _bypass_noops(view, skipped)
            applied += tidying.joined(view, skipped)
            if self.fold_constants:
                applied += _fold(view, self.growth, skipped)
            if self.share_initializers:
                applied += _share(view, skipped)
            applied += [Site((str(node.name),), "dead") for node in graph.remove_dead(view.graph)]
            view.changed()
            if len(applied) == before:
                if self.compact:
                    applied += _compact(view)
                alive = {str(node.name) for node in view.graph}
                return PassResult(tuple(applied), tuple(skip for skip in skipped.values() if skip.node in alive))


def _compact(view: View) -> list[Site]:
    """Take off declared types that inference gives as well, and attributes that say what their absence says."""
    found = []
    for node in view.graph:
        said = []
        for value in node.outputs:
            if not value.is_graph_output() and _is_declared(value, _types(view, value)):
                value.shape, value.type = None, None
                said.append("a type that follows")
        for name in [name for name, held in node.attributes.items() if _is_default(node, name, held)]:
            node.attributes.pop(name)
            said.append(f"`{name}` at its default")
        if said:
            found.append(Site((str(node.name),), "left out: " + ", ".join(said)))
    return found


def _is_default(node: ir.Node, name: str, held: ir.Attr) -> bool:
    if held.is_ref() or node.domain not in ("", "ai.onnx") or not isinstance(node.graph, ir.Graph):
        return False
    if name in _FILLED and node.op_type in _WINDOWED:
        return all(entry == _FILLED[name] for entry in held.value)
    schema = onnx.defs.get_schema(node.op_type, node.graph.opset_imports.get("", 1), "")
    known = schema.attributes.get(name)
    if known is None or known.required or not known.default_value.name:
        return False
    default = onnx.helper.get_attribute_value(known.default_value)
    return bool((default.decode() if isinstance(default, bytes) else default) == held.value)


def _is_declared(value: ir.Value, kind: ValueType) -> bool:
    return (
        value.shape is not None
        and kind.shape is not None
        and value.dtype == kind.dtype
        and graph.declared_shape(value) == kind.shape
    )


def _types(view: View, value: ir.Value | None) -> ValueType:
    return UNKNOWN if value is None else view.ask(shapes).get(str(value.name), UNKNOWN)


def _reader(value: ir.Value) -> str:
    """Return the name of a value that `value` leads to and that the rewrite keeps, for the search for a culprit."""
    for use in value.uses():
        if use.node.outputs and use.node.graph is value.graph:
            return str(use.node.outputs[0].name)
    return str(value.name) if value.is_graph_output() else ""


def _lift_constants(view: View) -> list[Site]:
    found = []
    for node in view.graph:
        tensor = graph.stored(node.outputs[0]) if node.op_type == "Constant" and node.outputs else None
        if tensor is None or node.outputs[0].is_graph_output() or view.excluded(node):
            continue
        old = node.outputs[0]
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(graph.dims_of(tensor))
        mine = graph.renamed(tensor, str(old.name))
        value = ir.Value(name=old.name, const_value=mine, type=kind, shape=shape)
        output = _reader(old)
        old.replace_all_uses_with(value)
        view.graph.remove(node, safe=True)
        view.graph.register_initializer(value)
        found.append(Site((str(node.name),), "Constant node became an initializer", output=output))
    return found


# ---------------------------------------------------------------------------------------------- no-ops


def _noop_always(node: ir.Node, view: View) -> bool:
    return True


def _noop_dropout(node: ir.Node, view: View) -> bool:
    if len(node.outputs) > 1 and (list(node.outputs[1].uses()) or node.outputs[1].is_graph_output()):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = graph.constant(training)
    return training is None or (flag is not None and not flag.any())


def _noop_cast(node: ir.Node, view: View) -> bool:
    dtype = _types(view, node.inputs[0]).dtype
    return dtype is not None and dtype == graph.attribute(node, "to")


def _noop_transpose(node: ir.Node, view: View) -> bool:
    perm = graph.attribute(node, "perm")
    return perm is not None and list(perm) == list(range(len(perm)))


def _noop_static(node: ir.Node, view: View) -> bool:
    before, after = _types(view, node.inputs[0]).static, _types(view, node.outputs[0]).static
    return before is not None and before == after


def _noop_reshape(node: ir.Node, view: View) -> bool:
    wanted, known = graph.constant(node.inputs[1]), _types(view, node.inputs[0]).shape
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
    dims = _types(view, node.inputs[0]).shape
    if dims is None or len(node.inputs) < 3:
        return False
    starts, ends = (graph.constant(node.inputs[i]) for i in (1, 2))
    given = [graph.constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else None for i in (3, 4)]
    if starts is None or ends is None or (len(node.inputs) > 3 and node.inputs[3] and given[0] is None):
        return False
    if len(node.inputs) > 4 and node.inputs[4] and given[1] is None:
        return False
    axes = given[0] if given[0] is not None else np.arange(len(starts))
    steps = given[1] if given[1] is not None else np.ones(len(starts), np.int64)
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
    known = _types(view, node.inputs[0]).shape
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


def _bypass_noops(view: View, skipped: dict[str, Skip]) -> list[Site]:
    found = []
    for node in view.graph:
        if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None or not node.outputs:
            continue
        shapes_of = {value: _types(view, value).shape for value in node.inputs if value is not None}
        source = _inverse_transposes(node) or tidying.neutral(node, shapes_of)
        removable = source is not None
        source = source or node.inputs[0]
        if not removable and not (node.op_type in _NOOP and _NOOP[node.op_type](node, view)):
            continue
        if excluded := view.excluded(node):
            skipped[excluded.node] = excluded
            continue
        name, output = str(node.name), _reader(node.outputs[0])
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


# ---------------------------------------------------------------------------------------------- constants


def _fold(view: View, growth: int, skipped: dict[str, Skip]) -> list[Site]:
    folded: dict[ir.Node, None] = {}
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
        folded[node] = None
        known.update(node.outputs)
    edges = [v for node in folded for v in node.outputs if any(use.node not in folded for use in v.uses())]
    return found + _evaluate(view, edges, skipped)


def _static_shape_of(node: ir.Node, view: View) -> Array | None:
    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    dims = _types(view, node.inputs[0]).shape
    if dims is None:
        return None
    part = dims[graph.attribute(node, "start", 0) : graph.attribute(node, "end", None)]
    return np.array(part, np.int64) if all(isinstance(dim, int) for dim in part) else None


def _foldable(node: ir.Node, known: set[ir.Value], view: View) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_identifier() in view.model.functions or not node.inputs:
        return False
    if node.op_type in _RANDOM or node.op_type == "Constant" or next(graph.subgraphs(node), None) is not None:
        return False
    return all(value is None or value in known for value in node.inputs)


def _refusal(node: ir.Node, growth: int, view: View) -> Skip | None:
    """Return why a constant node stays, or None."""
    name = str(node.name)
    if node.op_type in _QUANTISED:
        return Skip(name, "constant, but folding would undo a quantisation")
    if any(output.is_graph_output() for output in node.outputs):
        return Skip(name, "constant, but a graph output must be produced by a node")
    if node.op_type == "Dropout":
        return Skip(name, "constant, but random in training")
    types = [_types(view, output) for output in node.outputs]
    if any(kind.dtype not in _FOLDED_DTYPES for kind in types):
        return Skip(name, "constant, but not a tensor of a plain numeric type")
    freed = {value for value in node.inputs if value is not None and all(use.node is node for use in value.uses())}
    read = sum(_types(view, value).nbytes or 0 for value in freed)
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
    output = _reader(value)
    value.replace_all_uses_with(graph.add_constant(view.graph, f"{value.name}_folded", array))
    return Site((str(producer.name),), f"{producer.op_type} of constants folded", output=output)


def _share(view: View, skipped: dict[str, Skip]) -> list[Site]:
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
            found.append(Site(nodes, f"initializer `{value.name}` equals `{kept.name}`", output=_reader(kept)))
    return found


def _sharable(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or isinstance(tensor, graph.SparseTensor) or tensor.dtype == ir.DataType.STRING:
        return False
    return not value.is_graph_output() and not value.is_graph_input()


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(use.node for use in value.uses()))
