"""Which values are in the blocked layout of a target's fast convolutions, and which are brought into it or out of it.

Convolutions that fit, and pooling, work on channels in blocks (`layout.block`); a value comes into blocks before the
first of them that reads it, and out of them before anything else. Ops of `layout.carries` work on blocks where all
their inputs are in blocks and of one shape: they do not broadcast, unless the op before absorbs a factor or a shift per
channel.
Source: ONNX Runtime's NCHWc transformer (onnxruntime/core/optimizer/nchwc_transformer.cc), simplified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from ccompile import graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.analysis.shapes import Shapes
    from ccompile.cost_weights import Constants
    from ccompile.target import Layout

POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu")
_IMAGE = 4  # dimensions of what is laid out in blocks


class Blocks:
    """The values of one graph in blocks, and by node the values that change their layout for it."""

    def __init__(
        self,
        nodes: Sequence[ir.Node],
        layout: Layout | None,
        fused: Sequence[str],
        constants: Constants,
        types: Shapes,
    ) -> None:
        self._layout = layout
        self._fused = fused
        self._constants = constants
        self._types = types
        self._blocked: set[ir.Value] = set()
        self._tails: set[ir.Value] = set()  # what convolutions in blocks give, with the ops behind that they absorb
        self._copied: set[ir.Value] = set()  # values that exist in both layouts
        self.reorders: dict[ir.Node, list[ir.Value]] = {}
        if layout is not None:
            for node in nodes:
                self._visit(node)
            for node in nodes:
                self._leave(node, [value for value in node.outputs if value.is_graph_output()])

    def runs(self, node: ir.Node) -> bool:
        """Return whether a node works on blocks."""
        return any(value in self._blocked for value in node.outputs)

    def joins(self, node: ir.Node) -> bool:
        """Return whether an op of two operands may be part of the op before it: in blocks, or with one per channel."""
        if self._layout is None or node.op_type not in BINARY:
            return True
        fixed = [value for value in node.inputs if value is not None and self._constants.is_fixed(value)]
        if not fixed:
            return self.runs(node)
        return all(self._is_per_channel(value, node.outputs[0]) for value in fixed)

    def _is_per_channel(self, value: ir.Value, image: ir.Value) -> bool:
        shape, whole = (self._constants.type_of(v, self._types).static for v in (value, image))
        if shape is None or whole is None or len(whole) != _IMAGE:
            return shape is not None and whole is not None and math.prod(shape) == whole[-1]
        return math.prod(shape) == whole[1] == (*(1,) * _IMAGE, *shape)[-3]

    def _visit(self, node: ir.Node) -> None:
        moving = [value for value in node.inputs if value is not None and not self._constants.is_fixed(value)]
        if self._fits(node):
            if self._takes_plain(node):
                self._leave(node, moving[:1])
            else:
                self._change(node, [value for value in moving[:1] if value not in self._blocked])
            self._blocked.add(node.outputs[0])
            if node.op_type == "Conv":
                self._tails.add(node.outputs[0])
        elif self._carries(node, moving):
            self._blocked.update(node.outputs[:1])
        else:
            self._leave(node, moving)

    def _leave(self, node: ir.Node, values: Sequence[ir.Value]) -> None:
        self._change(node, [value for value in values if value in self._blocked])

    def _change(self, node: ir.Node, values: Sequence[ir.Value]) -> None:
        for value in dict.fromkeys(values):
            if value not in self._copied:
                self._copied.add(value)
                self.reorders.setdefault(node, []).append(value)

    def _fits(self, node: ir.Node) -> bool:
        """Return whether a node can work on blocks: a float32 image whose channels come in whole blocks per group."""
        layout = self._layout
        if layout is None or node.domain not in ("", "ai.onnx") or not self._is_image(node.inputs[:1]):
            return False
        block = layout.block
        if node.op_type in POOLS:
            return self._channels(node) % block == 0
        weight = node.inputs[1] if node.op_type == "Conv" else None
        W = None if weight is None else self._constants.type_of(weight, self._types).static
        if weight is None or W is None or len(W) != _IMAGE or not self._constants.is_fixed(weight):
            return False
        groups = int(graph.attribute(node, "group", 1))
        if groups == 1:
            return W[1] < block or W[1] % layout.inputs == 0
        if W[1] == 1 and W[0] == groups:
            return groups % layout.depthwise == 0
        return W[1] % block == 0 and W[0] // groups % block == 0

    def _takes_plain(self, node: ir.Node) -> bool:
        """Return whether a convolution reads its image as it is: with less than a block of channels."""
        weight = node.inputs[1] if node.op_type == "Conv" else None
        shape = None if weight is None else self._constants.type_of(weight, self._types).static
        block = self._layout.block if self._layout is not None else 1
        return shape is not None and shape[1] < block and int(graph.attribute(node, "group", 1)) == 1

    def _carries(self, node: ir.Node, moving: Sequence[ir.Value]) -> bool:
        if self._layout is None or node.domain not in ("", "ai.onnx"):
            return False
        if self._is_tail(node, moving):
            self._tails.update(node.outputs[:1])
            return True
        if node.op_type not in self._layout.carries:
            return False
        if node.op_type in BINARY and len(moving) < len(node.inputs) and not self.joins(node):
            return False
        if not moving or any(value not in self._blocked for value in moving):
            return False
        if node.op_type == "Concat":
            inputs = (self._constants.type_of(value, self._types).static for value in moving)
            whole = all(shape is not None and shape[1] % self._layout.block == 0 for shape in inputs)
            return whole and int(graph.attribute(node, "axis", 0)) == 1
        shapes = {self._constants.type_of(value, self._types).shape for value in moving}
        return len(shapes) == 1

    def _is_tail(self, node: ir.Node, moving: Sequence[ir.Value]) -> bool:
        """Return whether a convolution in blocks absorbs an op of one operand."""
        if node.op_type not in self._fused or len(moving) != 1 or moving[0] not in self._tails or not self.joins(node):
            return False
        return graph.only_use(moving[0]) is node

    def _is_image(self, values: Sequence[ir.Value | None]) -> bool:
        known = [self._constants.type_of(value, self._types) for value in values if value is not None]
        return bool(known) and all(
            found.static is not None and len(found.static) == _IMAGE and found.dtype == ir.DataType.FLOAT
            for found in known
        )

    def _channels(self, node: ir.Node) -> int:
        value = node.inputs[0]
        shape = self._constants.type_of(value, self._types).static if value is not None else None
        return shape[1] if shape else 0
