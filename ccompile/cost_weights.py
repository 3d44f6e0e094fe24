"""Which values are constant, and what the constants that a node reads are made of.

Two notions. A value is *fixed* when it depends on constants only. It is *folded* when the runtime computes it once, at
session creation: fixed, but not behind a DequantizeLinear, whose small input is what stays.
A fixed value is made of *leaves*: stored tensors, and the outputs of ConstantOfShape, which are counted by shape and
never built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, onnx_io
from ccompile.analysis.shapes import UNKNOWN, Shapes, ValueType
from ccompile.cost_ops import LINEAR, NEVER_FOLDED, NOT_WEIGHTS, UNPACKS, ZERO_POINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ccompile.core import Array

_NOT_NUMBERS = (ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.UNDEFINED)


class Constants:
    """The fixed and the folded values of the graphs that were added, outer graphs first."""

    def __init__(self) -> None:
        self._fixed: set[ir.Value] = set()
        self._folded: set[ir.Value] = set()
        self._stored: dict[ir.Value, ir.TensorProtocol | None] = {}

    def stored(self, value: ir.Value) -> ir.TensorProtocol | None:
        """Return graph.stored(value), computed once: building a Constant's tensor is slow."""
        if value not in self._stored:
            self._stored[value] = graph.stored(value)
        return self._stored[value]

    def type_of(self, value: ir.Value, types: Shapes) -> ValueType:
        """Return the type of a stored tensor or, of other values, what `types` says."""
        tensor = self.stored(value)
        if tensor is None:
            return types.get(str(value.name), UNKNOWN)
        return ValueType(tensor.dtype, tuple(dim for dim in tensor.shape if isinstance(dim, int)))

    def add(self, nodes: Iterator[ir.Node]) -> None:
        """Classify the outputs of nodes in topological order."""
        for node in nodes:
            operands = [value for value in node.inputs if value is not None]
            if not operands or any(graph.subgraphs(node)) or not all(map(self.is_fixed, operands)):
                continue
            if node.op_type == "DequantizeLinear" or node.op_type not in NEVER_FOLDED:
                self._fixed.update(node.outputs)
            if node.op_type not in NEVER_FOLDED and all(map(self.is_folded, operands)):
                self._folded.update(node.outputs)

    def is_fixed(self, value: ir.Value) -> bool:
        """Return whether the value depends on constants only."""
        return value in self._fixed or self.stored(value) is not None

    def is_folded(self, value: ir.Value) -> bool:
        """Return whether the runtime holds the value as a constant."""
        return value in self._folded or self.stored(value) is not None


@dataclass(frozen=True)
class Leaf:
    """A stored tensor (`tensor`) or the output of a ConstantOfShape, in an expression.

    `is_weight`: it carries data, not a shape, a scale, a zero point. `is_index`: it selects. `decoder`: the node that
    subtracts the zero point `zero` from it.
    """

    value: ir.Value
    tensor: ir.TensorProtocol | None
    is_weight: bool
    is_index: bool = False
    decoder: ir.Node | None = None
    zero: ir.Value | None = None


@dataclass(frozen=True)
class Read:
    """What one node reads of constants that no earlier node read: parameters, those that are not zero, stored bytes."""

    params: int = 0
    nonzero: int = 0
    stored_bytes: int = 0


class Weights:
    """Counts each leaf at the first node that reads it, however many do."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._counted: set[ir.Value] = set()
        self._stored: set[ir.Value] = set()

    def read(self, node: ir.Node, types: Shapes) -> Read:
        """Return what is new in the constants that a node reads; nothing for a node that is itself constant."""
        params = nonzero = stored = 0
        if any(self._constants.is_fixed(value) for value in node.outputs):
            return Read()
        for position, value in enumerate(node.inputs):
            if value is None or not self._constants.is_fixed(value):
                continue
            leaves = self._leaves(value, self._seen_as(node, position, value, types))
            stored += sum(self._new_bytes(leaf) for leaf in leaves)
            for count, dense in self._count(node, value, leaves, types):
                params, nonzero = params + count, nonzero + dense
        return Read(params, nonzero, stored)

    def _new_bytes(self, leaf: Leaf) -> int:
        if leaf.tensor is None or leaf.value in self._stored:
            return 0
        self._stored.add(leaf.value)
        return int(leaf.tensor.nbytes)

    def _count(self, node: ir.Node, value: ir.Value, leaves: list[Leaf], types: Shapes) -> Iterator[tuple[int, int]]:
        """Yield (elements, elements that are not zero) of the leaves that are weights and were not counted."""
        fresh = [leaf for leaf in leaves if leaf.is_weight and leaf.value not in self._counted]
        self._counted.update(leaf.value for leaf in fresh)
        packed = self._packed_elements(node, value, types) if fresh else None
        if packed is not None:
            yield packed, packed
            return
        for leaf in fresh:
            known = self._constants.type_of(leaf.value, types)
            if known.static and known.dtype not in _NOT_NUMBERS:
                elements = math.prod(known.static)
                yield elements, elements if leaf.is_index else nonzero_elements(leaf, elements)

    def _seen_as(self, node: ir.Node, position: int, value: ir.Value, types: Shapes) -> Leaf:
        """Return how a runtime node sees its operand: a weight, where the operand is a float or a quantised weight."""
        linear = LINEAR.get(node.op_type)
        dtype = self._constants.type_of(value, types).dtype
        is_number = dtype is None or dtype.is_floating_point() or (linear is not None and linear.quantised)
        is_weight = is_number and position not in NOT_WEIGHTS.get(node.op_type, ())
        at = ZERO_POINT.get(node.op_type)
        if linear is None or at is None or position != linear.weight:
            return Leaf(value, None, is_weight)
        return Leaf(value, None, is_weight, False, node, node.inputs[at] if at < len(node.inputs) else None)

    def _leaves(self, value: ir.Value, seen_as: Leaf) -> list[Leaf]:
        """Return the leaves of a fixed value, each once; one that is a weight anywhere in it is a weight."""
        found: dict[ir.Value, Leaf] = {}
        visited: set[tuple[ir.Value, bool]] = set()
        waiting = [replace(seen_as, value=value)]
        while waiting:
            leaf = waiting.pop()
            if (leaf.value, leaf.is_weight) in visited:
                continue
            visited.add((leaf.value, leaf.is_weight))
            tensor, node = self._constants.stored(leaf.value), leaf.value.producer()
            is_leaf = tensor is not None or (node is not None and node.op_type == "ConstantOfShape")
            if is_leaf and (leaf.value not in found or leaf.is_weight):
                found[leaf.value] = replace(leaf, tensor=tensor)
            if tensor is None and node is not None:
                waiting += _operands(node, leaf)
        return list(found.values())

    def _packed_elements(self, node: ir.Node, value: ir.Value, types: Shapes) -> int | None:
        """Return the elements of a weight whose stored elements each pack several, or None when they do not."""
        if node.op_type == "MatMulNBits":
            return int(graph.attribute(node, "K", 0)) * int(graph.attribute(node, "N", 0))
        static = self._constants.type_of(value, types).static
        return math.prod(static) if static is not None and _unpacks(value) else None


def _operands(node: ir.Node, result: Leaf) -> Iterator[Leaf]:
    """Yield how a constant node sees its operands, given how its result is seen."""
    for position, operand in enumerate(node.inputs):
        if operand is None:
            continue
        is_weight = result.is_weight and position not in NOT_WEIGHTS.get(node.op_type, ())
        is_index = result.is_index or (node.op_type.startswith("Gather") and position == 1)
        decoder, zero = result.decoder, result.zero
        if node.op_type == "DequantizeLinear":
            decoder, zero = node, node.inputs[2] if len(node.inputs) > 2 else None
        yield Leaf(operand, None, is_weight, is_index, decoder, zero)


def _unpacks(value: ir.Value) -> bool:
    waiting, visited = [value], set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.op_type in UNPACKS:
            return True
        waiting += [operand for operand in node.inputs if operand is not None]
    return False


def nonzero_elements(leaf: Leaf, elements: int, chunk: int = 1 << 20) -> int:
    """Return how many elements of a leaf are not zero (for quantised ones: not the zero point), in bounded memory."""
    if leaf.tensor is None:
        node = leaf.value.producer()
        fill = graph.attribute(node, "value") if node is not None else None
        return elements if fill is not None and np.any(fill.numpy()) else 0
    if isinstance(leaf.tensor, onnx_io.SparseTensor):
        return int(np.count_nonzero(onnx.numpy_helper.to_array(leaf.tensor.proto.values)))
    array = leaf.tensor.numpy()
    zeros = graph.constant(leaf.zero)
    if zeros is not None and zeros.size > 1 and np.any(zeros != zeros.reshape(-1)[0]):
        return _nonzero_by_channel(array, zeros, leaf.decoder)
    zero = zeros.reshape(-1)[0] if zeros is not None and zeros.size else array.dtype.type(0)
    # a broadcast array repeats its elements without holding them
    core = array[tuple(slice(0, 1) if not stride else slice(None) for stride in array.strides)]
    flat = core.reshape(-1)
    found = sum(int(np.count_nonzero(flat[at : at + chunk] != zero)) for at in range(0, flat.size, chunk))
    return found * (array.size // max(core.size, 1))


def _nonzero_by_channel(array: Array, zeros: Array, decoder: ir.Node | None) -> int:
    """Count against one zero point per channel or per block of the axis that the decoder names."""
    axis = 0
    if decoder is not None and decoder.op_type in ("DequantizeLinear", "QLinearMatMul", "MatMulInteger"):
        axis = int(graph.attribute(decoder, "axis", 1)) % array.ndim
    if zeros.ndim == 1:
        zeros = zeros.reshape([-1 if at == axis else 1 for at in range(array.ndim)])
    elif zeros.shape != array.shape:
        zeros = np.repeat(zeros, -(-array.shape[axis] // zeros.shape[axis]), axis)
        zeros = zeros[(slice(None),) * axis + (slice(array.shape[axis]),)]
    return int(np.count_nonzero(array != zeros))
