"""Nodes that compute what another computes already: the same op, attributes and operands."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from ccompile import folding, graph, tidying
from ccompile.core import Site, Skip, View

_OTHER = frozenset({"Dropout"})  # random in training
_PLAIN = frozenset("FLOAT FLOATS INT INTS STRING STRINGS".split())


def merged(view: View, skipped: dict[str, Skip]) -> list[Site]:
    """Let readers of repeated nodes read the first.

    Random ops and ops with bodies are no repeats. Neither is a DequantizeLinear: integer kernels want their own; nor a
    node of constants only: a weight that two layers share is left alone by what would shrink it.
    """
    first: dict[Hashable, ir.Node] = {}
    fixed = {value for value in view.graph.initializers.values() if not value.is_graph_input()}
    found = []
    for node in view.graph:
        if all(value is None or value in fixed for value in node.inputs):
            fixed.update(node.outputs)
            continue
        key = _key(node, view)
        kept = node if key is None else first.setdefault(key, node)
        if kept is node:
            continue
        excluded = [skip for other in (kept, node) if (skip := view.excluded(other)) is not None]
        if excluded:
            skipped[excluded[0].node] = excluded[0]
            continue
        names, output = (str(kept.name), str(node.name)), tidying.reader(node.outputs[0])
        if not _replace(node, kept):
            skipped[names[1]] = Skip(names[1], f"computes what `{names[0]}` does, but both are graph outputs")
            continue
        found.append(Site(names, f"{kept.op_type} computed once", output=output))
    return found


def _key(node: ir.Node, view: View) -> Hashable:
    """Return what is equal for nodes that compute the same, or None for one that is to be computed by itself."""
    if node.domain not in ("", "ai.onnx") or node.op_identifier() in view.model.functions:
        return None
    if node.op_type in folding.RANDOM | folding.QUANTISED | _OTHER or node.op_type == "Constant":
        return None
    held = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            return None
        if attribute.type.name == "TENSOR":
            tensor = attribute.as_tensor()
            if tensor.dtype == ir.DataType.STRING:
                return None
            held.append((name, tensor.dtype.name, repr(graph.dims_of(tensor)), tensor.tobytes()))
        elif attribute.type.name in _PLAIN:
            held.append((name, attribute.type.name, repr(attribute.value), b""))
        else:
            return None
    outputs = tuple(bool(output.name) for output in node.outputs)
    return node.op_type, tuple(node.inputs), tuple(held), outputs


def _replace(node: ir.Node, kept: ir.Node) -> bool:
    """Let `kept` take the place of a later node; False where the graph's interface keeps both."""
    if len(node.outputs) == 1:
        return graph.bypass(node, kept.outputs[0])
    if any(output.is_graph_output() for output in node.outputs):
        return False
    for old, new in zip(node.outputs, kept.outputs, strict=True):
        old.replace_all_uses_with(new)
    main = node.graph
    assert isinstance(main, ir.Graph)
    main.remove(node, safe=True)
    return True
