"""Functions on onnx_ir models: copy, look through constants, rewire. The graph never knows passes.

Weights are read-only and shared between copies, so a pass that writes into one in place raises.
"""

from __future__ import annotations

import copy as shallow
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ccompile import see_through
from ccompile.see_through import SEE_THROUGH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ccompile.core import Array

ENCODED, attribute = see_through.ENCODED, see_through.attribute
_TAKEN = "ccompile.names"  # Graph.meta: the names in use, kept so that a fresh one needs no walk
Attribute = int | float | str | list[int] | list[float] | list[str]

# Ops whose constant second operand is a weight.
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def name_nodes(graph: ir.Graph) -> None:
    """Give every top-level node a unique name; the first node of a name keeps it."""
    taken = {node.name for node in graph if node.name}
    seen: set[str] = set()
    for node in graph:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        base = node.name or default_name(node.op_type, [str(output.name) for output in node.outputs])
        name, number = base, 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        node.name = name
        taken.add(name)


def opset(held: ir.Model | ir.Graph) -> int:
    """Return the version of the default operators; 1 where none is declared."""
    return held.opset_imports.get("", held.opset_imports.get("ai.onnx", 1))


def default_name(op_type: str, outputs: Sequence[str]) -> str:
    """Return what a node without a name is called; files leave it out."""
    return f"{op_type}_{next((name for name in outputs if name), '')}"


def copy(model: ir.Model) -> ir.Model:
    """Return a copy whose nodes, values and tensor names are its own and whose weight arrays are shared."""
    twin = model.clone()
    twin.graph.meta.pop(_TAKEN, None)
    for graph in twin.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = renamed(value.const_value, name)
    return twin


def renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return a tensor of that name that shares the data: a value's name is also its tensor's, wherever it is."""
    if isinstance(tensor, ir.serde.TensorProtoTensor):  # keeps its name in the message it came in
        array, props = _read_only(tensor.numpy()), tensor.metadata_props
        return ir.Tensor(array, tensor.dtype, name=name, doc_string=tensor.doc_string, metadata_props=props)
    twin = shallow.copy(tensor)
    twin.name = name
    return twin


def signature(model: ir.Model) -> tuple[tuple[str, str, str], ...]:
    """Return (name, type, shape) of every graph input and output, in order."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return tuple((str(v.name), str(v.type), str(v.shape) if v.shape is not None else "?") for v in values)


# ---------------------------------------------------------------------------------------------- constants


def dims_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return a tensor's shape as integers."""
    return tuple(tensor.shape.numpy())


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor when `value` is an initializer or the output of a Constant node."""
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, found in node.attributes.items():
        if found.is_ref():
            return None
        if name == "value":
            return found.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.array(found.value, np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.array(found.value, np.int64))
    return None


def constant(value: ir.Value | None) -> Array | None:
    """Return what `value` always is, looking through the ops that weights hide behind, or None.

    The array is read-only. Seen through: what see_through.SEE_THROUGH lists.
    """
    tensor = stored(value)
    if tensor is not None:
        return None if tensor.dtype == ir.DataType.STRING else _read_only(tensor.numpy())
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in SEE_THROUGH or node.domain not in ("", "ai.onnx"):
        return None
    if stored_chain(value) is None:
        return None
    found = SEE_THROUGH[node.op_type](node, [constant(operand) for operand in node.inputs])
    return None if found is None else _read_only(np.asarray(found))  # of 0-d arrays numpy makes scalars


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that `constant(value)` is, the stored one where there is one."""
    tensor = stored(value)
    if tensor is None and is_constant(value) and (array := constant(value)) is not None:
        return ir.tensor(array)
    return tensor


def is_constant(value: ir.Value | None) -> bool:
    """Return whether `constant(value)` would give an array, without computing it."""
    return stored(value) is not None or (value is not None and stored_chain(value) is not None)


def stored_chain(value: ir.Value | None) -> tuple[ir.Node, ...] | None:
    """Return the see-through nodes between `value` and storage, nearest first, or None if it is not constant."""
    if value is None:
        return None
    if stored(value) is not None:
        return ()
    node = value.producer()
    if node is None or node.op_type not in SEE_THROUGH or node.domain not in ("", "ai.onnx"):
        return None
    chains = [stored_chain(operand) for operand in node.inputs if operand is not None]
    return None if None in chains else (node, *((chains and chains[0]) or ()))


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def is_finite(array: Array, chunk: int = 1 << 20) -> bool:
    """Return whether all elements are finite, in bounded memory."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[at : at + chunk]).all()) for at in range(0, flat.size, chunk))


def weight_refusal(value: ir.Value | None) -> str:
    """Return why a pass must not replace this weight, or nothing: not constant, shared, or stored in a smaller form."""
    chain = stored_chain(value)
    if value is None or chain is None:
        return "its weight is not constant"
    for link in (value, *(node.inputs[0] for node in chain if node.op_type != "ConstantOfShape")):
        if link is None:
            continue
        if len(list(link.uses())) > 1 or link.is_graph_output():
            return "its weight is shared"
    for node in chain:
        if node.op_type in ENCODED:
            return f"its weight is stored in a smaller form, behind {node.op_type}"
    return ""


# ---------------------------------------------------------------------------------------------- rewiring


def only_use(value: ir.Value) -> ir.Node | None:
    """Return the one top-level node that reads `value`, or None: no reader, several, a subgraph, or a graph output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.graph is value.graph or value.graph is None else None


def node_named(graph: ir.Graph, name: str) -> ir.Node:
    """Return the top-level node of that name. Raises KeyError when there is none."""
    for node in graph:
        if node.name == name:
            return node
    raise KeyError(name)


def fresh_name(graph: ir.Graph, base: str) -> str:
    """Return `base`, or `base_1`, `base_2`, ...: the first that names no value or node; it is then taken."""
    taken: set[str] = graph.meta.setdefault(_TAKEN, set())
    if not taken:
        taken |= names(graph)
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def names(graph: ir.Graph) -> set[str]:
    """Return the names of all values and nodes of the graph and its subgraphs."""
    found = {str(value.name) for value in graph.inputs} | set(graph.initializers)
    for node in graph.all_nodes():
        found.add(str(node.name))
        found.update(str(output.name) for output in node.outputs)
        for subgraph in subgraphs(node):
            found |= {str(value.name) for value in subgraph.inputs} | set(subgraph.initializers)
    return found


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs in a node's attributes (If, Loop, Scan)."""
    for found in node.attributes.values():
        if found.type == ir.AttributeType.GRAPH and not found.is_ref():
            yield found.as_graph()
        elif found.type == ir.AttributeType.GRAPHS and not found.is_ref():
            yield from found.as_graphs()


def add_constant(graph: ir.Graph, base: str, array: Array) -> ir.Value:
    """Add a read-only initializer with a fresh name that starts with `base`."""
    frozen = np.ascontiguousarray(array).reshape(array.shape)
    if frozen is array or frozen.base is not None:
        frozen = frozen.copy()
    frozen.flags.writeable = False
    name = fresh_name(graph, base)
    value = ir.Value(name=name, const_value=ir.Tensor(frozen, name=name))
    value.shape, value.type = ir.Shape(frozen.shape), ir.TensorType(ir.DataType.from_numpy(frozen.dtype))
    graph.register_initializer(value)
    return value


def replace_constant(node: ir.Node, index: int, array: Array) -> None:
    """Give `node` a new constant input in place of another (or of none); a name that nothing else needs is kept."""
    main = node.graph
    assert isinstance(main, ir.Graph)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    new = add_constant(main, f"{node.name}_{index}" if old is None else f"{old.name}_{node.name}", array)
    node.replace_input_with(index, new)
    if old is not None and old.is_initializer() and not list(old.uses()) and not old.is_graph_output():
        main.initializers.pop(str(old.name))
        new.name = old.name


def add_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Attribute] | None = None,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    base: str,
) -> ir.Node:
    """Insert a node of the default domain before or after another, with a fresh name and one fresh output."""
    beside = before or after
    assert beside is not None
    graph = beside.graph
    assert isinstance(graph, ir.Graph)
    name = fresh_name(graph, base)
    results = [ir.Value(name=fresh_name(graph, f"{name}_out"))]
    node = ir.node(op_type, inputs=inputs, attributes=dict(attributes or {}), outputs=results, name=name)
    (graph.insert_before if before is not None else graph.insert_after)(beside, node)
    return node


def replace_node(node: ir.Node, last: ir.Node) -> None:
    """Let `last`'s output take over the name, type and readers of `node`'s only output, and remove `node`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old, new = node.outputs[0], last.outputs[0]
    name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def bypass(node: ir.Node, source: ir.Value) -> bool:
    """Let readers of `node`'s first output read `source` instead and remove `node`; False when the interface forbids.

    A graph output keeps its name: the producer of `source` then writes it directly, unless `source` is a graph input,
    an initializer or itself an output.
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    output = node.outputs[0]
    if not output.is_graph_output():
        output.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        return True
    producer = source.producer()
    if producer is None or producer.graph is not graph or source.is_graph_output():
        return False
    absorb(node, source)
    return True


def absorb(node: ir.Node, source: ir.Value) -> None:
    """Let `source`, which only `node` reads, take over the name, type and readers of `node`'s output; remove `node`."""
    output = node.outputs[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name, source.type, source.shape = output.name, output.type, output.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name = name


def remove_dead(graph: ir.Graph) -> list[ir.Node]:
    """Remove top-level nodes and initializers that nothing reads; graph inputs stay. Return the nodes, last first."""
    removed = []
    for node in reversed(graph):
        if not any(output.is_graph_output() or list(output.uses()) for output in node.outputs):
            graph.remove(node, safe=True)
            removed.append(node)
    for name in _unread(graph):
        graph.initializers.pop(name)
    return removed


def unread(model: ir.Model) -> list[str]:
    """Return the initializers of the main graph that nothing reads, in any graph, and that are no input or output."""
    return _unread(model.graph)


def _unread(graph: ir.Graph) -> list[str]:
    values = graph.initializers.items()
    return [name for name, value in values if not (value.uses() or value.is_graph_input() or value.is_graph_output())]


def facts(node: ir.Node) -> dict[str, float | str]:
    """Return what selectors may ask about a node: name, op, groups, kernel, stride, dilation, channels, params."""
    known: dict[str, float | str] = {"name": str(node.name), "op": node.op_type}
    weight = node.inputs[1] if node.op_type in LINEAR and len(node.inputs) > 1 else None
    shape = static_shape(weight)
    if shape is None:
        return known
    known["params"] = math.prod(shape)
    if node.op_type in ("Conv", "ConvTranspose"):
        groups = attribute(node, "group", 1)
        a, b = shape[0], shape[1] * groups
        known |= {
            "groups": groups,
            "kernel": max(shape[2:], default=1),
            "stride": max(attribute(node, "strides", [1])),
            "dilation": max(attribute(node, "dilations", [1])),
            "out_channels": a if node.op_type == "Conv" else b,
            "in_channels": b if node.op_type == "Conv" else a,
        }
    elif len(shape) == 2:
        wide = node.op_type == "Gemm" and attribute(node, "transB", 0)
        known["in_channels"], known["out_channels"] = (shape[1], shape[0]) if wide else (shape[0], shape[1])
    return known


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a constant, or None when the value is not one."""
    tensor = stored(value)
    if tensor is not None:
        return dims_of(tensor)
    array = constant(value) if is_constant(value) else None
    return None if array is None else array.shape


def declared_shape(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """Return the shape a graph input or output declares; a dimension is None when unnamed, unknown or negative."""
    if value.shape is None:
        return None
    return tuple((dim if dim >= 0 else None) if isinstance(dim, int) else dim.value for dim in value.shape)
