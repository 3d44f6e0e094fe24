"""The memory that a model takes: its tensors in the file, and its live values at the worst moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ccompile import graph
from ccompile.cost_fusion import Fusion
from ccompile.cost_weights import Constants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ccompile.analysis.shapes import Shapes


def stored_bytes(model: ir.Model) -> Iterator[int]:
    """Yield the bytes of every tensor of the file: initializers and attributes, in all graphs and functions."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        current = graphs.pop()
        for value in current.initializers.values():
            yield value.const_value.nbytes if value.const_value is not None else 0
        for node in current:
            graphs.extend(graph.subgraphs(node))
            tensor = graph.stored(node.outputs[0]) if node.op_type == "Constant" else None
            yield tensor.nbytes if tensor is not None else 0
            if node.op_type != "Constant":
                tensors = [found for found in node.attributes.values() if found.type == ir.AttributeType.TENSOR]
                yield sum(found.as_tensor().nbytes for found in tensors if not found.is_ref())


def peak(
    graph_: ir.Graph,
    nodes: Sequence[ir.Node],
    fusion: Fusion,
    constants: Constants,
    types: Shapes,
    inner: Mapping[ir.Node, int],
) -> tuple[int, str]:
    """Return the largest sum of live tensors and the node at which it occurs; `inner`: the peaks of bodies."""
    birth = dict.fromkeys(graph_.inputs, 0)
    death: dict[ir.Value, int] = {}
    for at, node in enumerate(nodes):
        for value in _read_values(node):
            death[fusion.root(value)] = at
        for value in node.outputs:
            root = fusion.root(fusion.written(value))
            if not constants.is_folded(root):
                birth.setdefault(root, at)
    death |= {fusion.root(value): len(nodes) for value in graph_.outputs}
    change = [0] * (len(nodes) + 2)
    for value, start in birth.items():
        nbytes = constants.type_of(value, types).nbytes or 0
        change[start] += nbytes
        change[max(start, death.get(value, start)) + 1] -= nbytes
    live = peak = 0
    where = ""
    for node, delta in zip(nodes, change, strict=False):
        live += delta
        if live + inner.get(node, 0) > peak:
            peak, where = live + inner.get(node, 0), str(node.name)
    return peak, where


def _read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, and what its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for sub in graph.subgraphs(node):
        yield from (value for value in sub.outputs)
        for inside in sub.all_nodes():
            yield from (value for value in inside.inputs if value is not None)
