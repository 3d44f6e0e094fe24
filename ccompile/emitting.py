"""Write a subgraph in the place of one node, op by op, in the words of the model's own opset.

opset   what changed
10      Slice takes its numbers as inputs
11      Pad takes its numbers as inputs
13      Split takes its sizes as an input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.core import Array


@dataclass
class Emitter:
    """Adds nodes before `node`, each named after it; `dtype` is that of the constants that `weight` makes."""

    node: ir.Node
    dtype: np.dtype[np.floating] = field(default_factory=lambda: np.dtype(np.float32))
    made: list[ir.Node] = field(default_factory=list)
    _shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    @property
    def main(self) -> ir.Graph:
        """Return the graph that the node is in."""
        found = self.node.graph
        assert isinstance(found, ir.Graph)
        return found

    @property
    def opset(self) -> int:
        """Return the opset of the default domain."""
        return graph.opset(self.main)

    def several(
        self, op: str, inputs: Sequence[ir.Value | None], count: int, **attributes: graph.Attribute
    ) -> list[ir.Value]:
        """Add a node with `count` outputs and return them."""
        base = f"{self.node.name}/{op.lower()}"
        made = graph.add_node(op, inputs, attributes, before=self.node, base=base)
        made.resize_outputs(count)
        for output in made.outputs[1:]:
            output.name = graph.fresh_name(self.main, f"{made.name}_out")
        self.made.append(made)
        return list(made.outputs)

    def op(self, op: str, *inputs: ir.Value | None, **attributes: graph.Attribute) -> ir.Value:
        """Add a node and return its output."""
        return self.several(op, inputs, 1, **attributes)[0]

    def weight(self, array: Array, name: str = "w") -> ir.Value:
        """Return a constant of `dtype`. Raises FloatingPointError when it is not finite in that type."""
        with np.errstate(all="ignore"):  # told as an error
            stored = array.astype(self.dtype)
        if not graph.is_finite(stored):
            raise FloatingPointError(f"a constant of `{self.node.name}` is not finite in {self.dtype}")
        return graph.add_constant(self.main, f"{self.node.name}_{name}", stored)

    def integers(self, *numbers: int) -> ir.Value:
        """Return a constant vector of int64, the same one for the same numbers."""
        if numbers not in self._shapes:
            array = np.array(numbers, np.int64)
            self._shapes[numbers] = graph.add_constant(self.main, f"{self.node.name}_n", array)
        return self._shapes[numbers]

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Return the value in another shape: 0 copies a size, -1 is what is left."""
        return self.op("Reshape", value, self.integers(*shape))

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        """Return the value with its axes in another order."""
        return self.op("Transpose", value, perm=list(perm))

    def crop(self, value: ir.Value, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int]) -> ir.Value:
        """Return value[starts:ends] along the axes."""
        if self.opset < 10:
            return self.op("Slice", value, starts=list(starts), ends=list(ends), axes=list(axes))
        return self.op("Slice", value, self.integers(*starts), self.integers(*ends), self.integers(*axes))

    def pad(self, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        """Return the value with zeros around it; the value itself where there are none."""
        if not any((*before, *after)):
            return value
        if self.opset < 11:
            return self.op("Pad", value, pads=[*before, *after])
        return self.op("Pad", value, self.integers(*before, *after))

    def halves(self, value: ir.Value, axis: int, size: int) -> tuple[ir.Value, ir.Value]:
        """Return the two halves of an even axis of 2 `size`."""
        if self.opset < 13:
            first, last = self.several("Split", [value], 2, axis=axis, split=[size, size])
        else:
            first, last = self.several("Split", [value, self.integers(size, size)], 2, axis=axis)
        return first, last

    def done(self, value: ir.Value) -> list[ir.Node]:
        """Let `value`, which this emitter made last, take the node's place, drop what nothing reads any more.

        Returns the nodes made.
        """
        last, main = value.producer(), self.main
        assert last is not None
        graph.replace_node(self.node, last)
        graph.remove_dead(main)
        return self.made
