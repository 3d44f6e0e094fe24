"""Which nodes vanish on a target: epilogues of linear ops, and the Quantize- and DequantizeLinear of int8 nodes.

What vanishes is the target's `fused`:
* an op right after a linear op whose output it alone reads (Relu, Clip, Add, BatchNormalization ...), also in a row;
  where the target has a blocked layout, an Add of two values only in it;
* a DequantizeLinear whose readers all compute on integers, or which only feeds constant weights to MatMuls (the runtime
  then multiplies with the packed weight);
* a QuantizeLinear after a node that computes on integers.
A node computes on integers when it is linear and both operands come through DequantizeLinear, or when it is one of
INTEGER, every operand does and only QuantizeLinear reads it.
Source: ONNX Runtime's graph optimisations and QDQ selectors, simplified; reference/kernels_onnxruntime_cpu.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccompile import graph
from ccompile.cost_ops import FREE, LINEAR

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from ccompile.cost_layout import Blocks
    from ccompile.cost_weights import Constants

_ENCODERS = ("QuantizeLinear", "DequantizeLinear")
# Ops without weights that have an integer kernel, or that the runtime lets work on the integers themselves.
INTEGER = frozenset(
    {
        *("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Where"),
        *("MaxPool", "Transpose", "Slice", "Split", "Gather", "Expand", "Resize", "DepthToSpace", "ReduceMax"),
    }
)


class Fusion:
    """The nodes of one graph that vanish, by the node that absorbs them."""

    def __init__(self, nodes: Sequence[ir.Node], fused: Sequence[str], constants: Constants, blocks: Blocks) -> None:
        self._constants = constants
        self._owner: dict[ir.Node, ir.Node] = {}  # an epilogue -> its linear op
        self._into: dict[ir.Value, ir.Node] = {}  # a value that is never written -> the node that takes it over
        self._gone: set[ir.Node] = set()
        self._order = {node: at for at, node in enumerate(nodes)}
        decodes, encodes = "DequantizeLinear" in fused, "QuantizeLinear" in fused
        self.integer = {node for node in nodes if decodes and self._computes_on_integers(node)}
        for node in nodes:
            if node.op_type in fused and node.op_type not in _ENCODERS and node.op_type not in LINEAR:
                if blocks.joins(node):
                    self._absorb(node)
            elif encodes and node.op_type == "QuantizeLinear":
                self._absorb_encoder(node)
            elif decodes and node.op_type == "DequantizeLinear" and self._before_integers(node):
                self._gone.add(node)

    def vanishes(self, node: ir.Node) -> bool:
        """Return whether the node costs nothing."""
        return node in self._gone

    def read(self, value: ir.Value) -> ir.Value:
        """Return the value that is really read for `value`: what stands before a vanished DequantizeLinear."""
        node = value.producer()
        gone = node is not None and node.op_type == "DequantizeLinear" and node in self._gone
        source = node.inputs[0] if node is not None and gone else None
        return value if source is None else source

    def written(self, value: ir.Value) -> ir.Value:
        """Return the value that is really written for `value`: what the epilogue after it gives."""
        while value in self._into:
            value = self._into[value].outputs[0]
        return value

    def root(self, value: ir.Value) -> ir.Value:
        """Return the value whose memory `value` is: behind views and vanished DequantizeLinear."""
        node = value.producer()
        while node is not None and (self.read(value) is not value or node.op_type in FREE - {"Shape", "Size"}):
            if not node.inputs or node.inputs[0] is None:
                break
            value = node.inputs[0]
            node = value.producer()
        return value

    def _absorb(self, node: ir.Node) -> None:
        """Attach `node` to the latest linear op (or epilogue of one) whose output it alone reads, if there is one."""
        found = []
        for value in node.inputs:
            before = value.producer() if value is not None else None
            if value is None or before is None or graph.only_use(value) is not node:
                continue
            if before not in self._order or self._constants.is_folded(value):
                continue
            if before.op_type in LINEAR or before in self._owner:
                found.append((self._order[before], value, before))
        if found:
            _, value, before = max(found, key=lambda entry: entry[0])
            self._owner[node] = self._owner.get(before, before)
            self._into[value] = node
            self._gone.add(node)

    def _computes_on_integers(self, node: ir.Node) -> bool:
        linear = LINEAR.get(node.op_type)
        if node.op_type in _ENCODERS or node.op_type in FREE:
            return False
        if linear is not None:
            operands = [node.inputs[at] for at in (linear.input, linear.weight) if at < len(node.inputs)]
            return len(operands) == 2 and all(map(_is_decoded, operands))
        if node.op_type not in INTEGER:
            return False
        moving = [value for value in node.inputs if value is not None and not self._constants.is_folded(value)]
        return bool(moving) and all(map(_is_decoded, moving)) and all(_only_encoded(value) for value in node.outputs)

    def _absorb_encoder(self, node: ir.Node) -> None:
        value = node.inputs[0]
        before = value.producer() if value is not None else None
        if value is None or before is None or graph.only_use(value) is not node:
            return
        if self._owner.get(before, before) in self.integer:
            self._into[value] = node
            self._gone.add(node)

    def _before_integers(self, node: ir.Node) -> bool:
        readers = [use.node for use in node.outputs[0].uses()]
        weight_only = self._constants.is_fixed(node.outputs[0]) and all(r.op_type == "MatMul" for r in readers)
        return bool(readers) and (weight_only or all(reader in self.integer for reader in readers))


def _is_decoded(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _only_encoded(value: ir.Value) -> bool:
    uses = list(value.uses())
    return bool(uses) and not value.is_graph_output() and all(use.node.op_type == "QuantizeLinear" for use in uses)
