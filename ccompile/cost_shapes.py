"""The shapes that pricing needs beyond the top level: concrete inputs, bodies of local functions, subgraphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from ccompile import graph, onnx_io
from ccompile.analysis.shapes import UNKNOWN, Shapes, ValueType, infer
from ccompile.errors import DataError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def inlined(model: ir.Model, shapes: Shapes) -> tuple[ir.Model, Shapes]:
    """Return a copy without local functions, and its shapes under the same input shapes."""
    from onnx_ir.passes.common import InlinePass

    flat = graph.copy(model)
    InlinePass()(flat)
    graph.name_nodes(flat.graph)
    known = {str(value.name): shapes.get(str(value.name), UNKNOWN).static for value in flat.graph.inputs}
    inferred = infer(flat, {name: static for name, static in known.items() if static is not None})
    return flat, inferred | {name: known for name, known in shapes.items() if known.static is not None}


def inner_types(model: ir.Model, shapes: Shapes) -> dict[ir.Graph, Shapes]:
    """Return the types of the values in each subgraph, and around it, inferred from the top-level `shapes`."""
    if not any(any(graph.subgraphs(node)) for node in model.graph):
        return {}
    proto = onnx_io.skeleton(model)
    _forget(proto.graph)
    known = {value.name for value in proto.graph.input}
    for name, found in shapes.items():
        if found.static is not None and found.dtype is not None:
            typed = onnx.helper.make_tensor_value_info(name, found.dtype.value, found.static)
            (proto.graph.input if name in known else proto.graph.value_info).append(typed)
    merged = {value.name: value for value in proto.graph.input}
    del proto.graph.input[:]
    proto.graph.input.extend(merged.values())
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    return dict(_walk(model.graph, proto.graph, shapes))


def _forget(proto: onnx.GraphProto) -> None:
    """Drop declared intermediate types, also in subgraphs: they occur wrong in the wild."""
    del proto.value_info[:]
    for node in proto.node:
        for sub in _subprotos(node):
            _forget(sub)


def _subprotos(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for found in node.attribute for g in ([found.g] if found.HasField("g") else found.graphs)]


def _walk(graph_: ir.Graph, proto: onnx.GraphProto, outer: Shapes) -> Iterator[tuple[ir.Graph, Shapes]]:
    for node, written in zip(graph_, proto.node, strict=True):
        for sub, subproto in zip(graph.subgraphs(node), _subprotos(written), strict=True):
            types = dict(outer)
            for value in (*subproto.input, *subproto.value_info, *subproto.output):
                if outer.get(value.name, UNKNOWN).static is not None:
                    continue  # observed
                tensor = value.type.tensor_type
                dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
                shape = dims if tensor.HasField("shape") else None
                types[value.name] = ValueType(ir.DataType(tensor.elem_type) if tensor.elem_type else None, shape)
            yield sub, types
            yield from _walk(sub, subproto, types)


def example_shapes(model: ir.Model, given: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, tuple[int, ...]]:
    """Return concrete input shapes for one sample.

    A dynamic first axis is 1, also where `given` says more; other dynamic axes are what `given` says, else 1 (see
    guessed_axes). Inputs of unknown rank that are not given are left out.
    Raises DataError when `given` names no input, or its rank or a fixed dimension differs.
    """
    given = given or {}
    names = [str(value.name) for value in model.graph.inputs]
    for name in given:
        if name not in names:
            raise DataError(f"the model has no input `{name}`", hint=nearest(name, names))
    found = {}
    for value in model.graph.inputs:
        name, declared = str(value.name), graph.declared_shape(value)
        shape = given.get(name)
        if shape is not None:
            found[name] = _one_sample(name, shape, declared)
        elif declared is not None:
            found[name] = tuple(dim if isinstance(dim, int) else 1 for dim in declared)
    return found


def _one_sample(name: str, shape: tuple[int, ...], declared: tuple[int | str | None, ...] | None) -> tuple[int, ...]:
    if declared is None:
        return shape
    fits = len(shape) == len(declared) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(declared, shape, strict=False)
    )
    if not fits:
        raise DataError(f"input `{name}` is declared {list(declared)}, not {list(shape)}")
    return (1, *shape[1:]) if declared and not isinstance(declared[0], int) else shape


def guessed_axes(model: ir.Model, given: Mapping[str, tuple[int, ...]] | None = None) -> tuple[str, ...]:
    """Return, in words, which dimensions example_shapes sets to 1 because nothing says what they are."""
    notes = []
    for value in model.graph.inputs:
        declared = graph.declared_shape(value)
        if str(value.name) in (given or {}):
            continue
        if declared is None:
            notes.append(f"input `{value.name}`: its rank is unknown")
        elif axes := [str(axis) for axis, dim in enumerate(declared) if axis and not isinstance(dim, int)]:
            notes.append(f"input `{value.name}`: axis {', '.join(axes)} taken as 1")
    return tuple(notes)
