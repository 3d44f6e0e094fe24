"""Which nodes have an integer kernel, on which inputs, and what of the nodes behind them a grid of codes absorbs.

kind        ops                                              what stands in the graph
layer       Conv, Gemm, MatMul with a constant weight        Dequantize -> op -> Quantize, weight int8, bias int32
arithmetic  Add, Mul, MatMul, Concat, Average- and           Dequantize -> op -> Quantize, constants uint8
            GlobalAveragePool, Sigmoid, LeakyRelu
move        Reshape, Flatten, Squeeze, Unsqueeze,            the op itself, on codes
            Transpose, Slice, Split, Gather, Expand, Tile,
            Identity, MaxPool, DepthToSpace, SpaceToDepth,
            Pad with zeros, Resize to the nearest
none        everything else: ConvTranspose, LSTM, GRU, RNN, Softmax, normalisations, If, Loop ... stay in float

Behind a layer or arithmetic, read once, these need no node: Relu and Clip (a grid ends where they clip, if 0 is
between), Mul and Div by a positive scalar (another scale), Add and Sub of a scalar (another zero).
Source: ONNX Runtime's QDQ selectors (core/optimizer/qdq_transformer) and the element types of its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.analysis.shapes import UNKNOWN, Shapes
from ccompile.core import Array

Kind = Literal["layer", "arithmetic", "move"]
ARITHMETIC = (
    "Add",
    "Mul",
    "MatMul",
    "Concat",
    "AveragePool",
    "GlobalAveragePool",
    "Sigmoid",
    "LeakyRelu",
)
MOVES = (
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Slice",
    "Split",
    "Gather",
    "Expand",
    "Tile",
    "Identity",
    "MaxPool",
    "DepthToSpace",
    "SpaceToDepth",
    "Pad",
    "Resize",
)
FLOATING = ("ConvTranspose", "LSTM", "GRU", "RNN", "Attention", "If", "Loop", "Scan")  # named where they stay
_SCALARS = ("Add", "Sub", "Mul", "Div")
_LIMITS = ("Relu", "Clip")
_FLOAT_OUT = ("Gemm", "MatMul")
_LONGEST = 65_000  # columns whose products of 255 and 127 an int32 sums


@dataclass(frozen=True, eq=False)
class Unit:
    """A node that may compute on codes: r = node(...), and its result y = scale r + shift behind the `tail` it absorbs.

    data: positions of the inputs that become codes. low, high: limits beyond which nothing of r is seen.
    """

    node: ir.Node
    kind: Kind
    data: tuple[int, ...]
    tail: tuple[ir.Node, ...] = ()
    scale: float = 1.0
    shift: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def name(self) -> str:
        """Return the node's name."""
        return str(self.node.name)

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """Return the results: behind the tail, or all of a move's."""
        return (self.tail[-1].outputs[0],) if self.tail else tuple(o for o in self.node.outputs if o.name)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """Return the values that become codes, those that are not constant."""
        found = (self.node.inputs[at] for at in self.data)
        return tuple(value for value in found if value is not None and not graph.is_constant(value))

    @property
    def writes_float(self) -> bool:
        """Return whether the integer kernel writes float where nothing behind reads codes.

        Those of products do, but a Relu or Clip right behind keeps the runtime from them unless a Quantize follows.
        """
        reader = graph.only_use(self.node.outputs[0])
        return self.node.op_type in _FLOAT_OUT and (reader is None or reader.op_type not in _LIMITS)


def units(main: ir.Graph, types: Shapes, apart: frozenset[str] = frozenset()) -> Iterator[Unit | tuple[ir.Node, str]]:
    """Yield the units in order, and the nodes that have no integer kernel where one might look for it, with the reason.

    apart: names of nodes that no unit may absorb.
    """
    absorbed: set[ir.Node] = set()
    for node in main:
        if node in absorbed or node.op_type == "Constant" or all(map(graph.is_constant, node.outputs)):
            continue
        found = _unit(node, types)
        if isinstance(found, str):
            if found:
                yield node, found
            continue
        if found.kind != "move":
            found = _with_tail(found, types, apart)
            absorbed.update(found.tail)
        yield found


def _unit(node: ir.Node, types: Shapes) -> Unit | str:
    """Return a node's unit without its tail, or why it has none; nothing where nobody would expect one."""
    if node.op_type in FLOATING:
        return f"the runtime has no integer kernel for {node.op_type}"
    if node.domain not in ("", "ai.onnx") or node.op_type not in (*graph.LINEAR, *ARITHMETIC, *MOVES):
        return ""
    if node.op_type in MOVES:
        return _move(node, types)
    kinds = {_dtype(value, types) for value in (*node.inputs, node.outputs[0]) if value is not None}
    if kinds - {ir.DataType.FLOAT}:
        return "" if None not in kinds and not any(kind and kind.is_floating_point() for kind in kinds) else (
            "its values are not all float32"
        )  # fmt: skip
    if node.op_type in graph.LINEAR and any(graph.is_constant(value) for value in node.inputs[:2]):
        return _layer(node)
    if node.op_type in graph.LINEAR and node.op_type != "MatMul":
        return "its weight is not constant"
    if node.op_type == "AveragePool" and any(d != 1 for d in graph.attribute(node, "dilations", [])):
        return "the integer kernel knows no dilation"
    data = tuple(range(len(node.inputs)))
    moving = [value for value in node.inputs if not graph.is_constant(value)]
    if any(_is_decoded(value) for value in moving):
        return "it is quantised already"
    return Unit(node, "arithmetic", data)


def _layer(node: ir.Node) -> Unit | str:
    form = linear.layer(node)
    if isinstance(form, str):
        return form
    if form.weight == 0:
        return "its weight is the left operand"
    if linear.bias(node, form) is None:
        return "its bias is not one constant per channel"
    if form.columns > _LONGEST:
        return f"a sum of {form.columns} products may exceed 32 bits"
    if _is_decoded(node.inputs[0]):
        return "it is quantised already"
    return Unit(node, "layer", (0,))


def _move(node: ir.Node, types: Shapes) -> Unit | str:
    value = node.inputs[0] if node.inputs else None
    if value is None or _dtype(value, types) != ir.DataType.FLOAT or graph.is_constant(value):
        return ""
    if node.op_type == "MaxPool" and (len([o for o in node.outputs if o.name]) > 1 or _is_dilated(node)):
        return "its indices are read, or it is dilated"
    if node.op_type == "MaxPool" and not _is_behind_convolution(value):
        return "the runtime pools codes fast behind a convolution only"
    if node.op_type == "Resize" and graph.attribute(node, "mode", "nearest") != "nearest":
        return "it interpolates"
    if node.op_type == "Pad" and not _pads_zeros(node):
        return "it pads with something else than zeros"
    return Unit(node, "move", (0,))


def _is_behind_convolution(value: ir.Value) -> bool:
    """Return whether a value is a convolution's, through what a grid absorbs and other pooling."""
    node = value.producer()
    while node is not None and node.op_type in (*_LIMITS, "MaxPool", *_SCALARS):
        moving = [v.producer() for v in node.inputs if v is not None and not graph.is_constant(v)]
        node = moving[0] if len(moving) == 1 else None
    return node is not None and node.op_type == "Conv"


def _is_dilated(node: ir.Node) -> bool:
    return any(step != 1 for step in graph.attribute(node, "dilations", []))


def _pads_zeros(node: ir.Node) -> bool:
    if graph.attribute(node, "mode", "constant") != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    fill = graph.constant(given)
    return given is None or (fill is not None and not fill.any())


def _is_decoded(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _dtype(value: ir.Value, types: Shapes) -> ir.DataType | None:
    return types.get(str(value.name), UNKNOWN).dtype or value.dtype


# ---------------------------------------------------------------------------------------------- tails


def _with_tail(unit: Unit, types: Shapes, apart: frozenset[str]) -> Unit:
    """Return the unit with the nodes behind it that its grid absorbs."""
    value, tail = unit.node.outputs[0], []
    scale, shift, low, high = 1.0, 0.0, -math.inf, math.inf
    while True:
        reader = graph.only_use(value)
        if reader is None or reader.domain not in ("", "ai.onnx") or str(reader.name) in apart:
            break
        if reader.op_type in _LIMITS:
            limits = _limits(reader, value)
            if limits is None:
                break
            ends = [(limit - shift) / scale for limit in limits]
            if not ends[0] <= 0 <= ends[1]:
                break
            low, high = max(low, ends[0]), min(high, ends[1])
        elif reader.op_type in _SCALARS:
            k = _scalar(reader, value, types)
            if k is None:
                break
            if reader.op_type in ("Add", "Sub"):
                shift += k if reader.op_type == "Add" else -k
            else:
                factor = k if reader.op_type == "Mul" else 1 / k
                scale, shift = scale * factor, shift * factor
        else:
            break
        tail.append(reader)
        value = reader.outputs[0]
    seen = _sight(value) if not tail else None
    low = max(low, seen) if seen is not None else low
    return Unit(unit.node, unit.kind, unit.data, tuple(tail), scale, shift, low, high)


def _limits(node: ir.Node, value: ir.Value) -> tuple[float, float] | None:
    """Return the limits of a Relu or of a Clip of `value` with constant limits, else None."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.inputs[0] is not value:
        return None
    found = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        operand = node.inputs[index] if len(node.inputs) > index else None
        limit = graph.constant(operand)
        if operand is not None and (limit is None or limit.size != 1):
            return None
        found.append(float(graph.attribute(node, name, default) if limit is None else limit.reshape(-1)[0]))
    return (found[0], found[1]) if found[0] < found[1] else None


def _scalar(node: ir.Node, value: ir.Value, types: Shapes) -> float | None:
    """Return the constant that a node combines `value` with, if it is a scalar that can go into a grid."""
    left, right = node.inputs
    constant = right if left is value else left
    k: Array | None = graph.constant(constant)
    rank = types.get(str(value.name), UNKNOWN).shape
    if k is None or k.size != 1 or (k.ndim > 0 and (rank is None or k.ndim > len(rank))):
        return None
    number = float(np.float64(k.reshape(-1)[0]))
    swapped = left is not value
    if not math.isfinite(number) or (swapped and node.op_type in ("Sub", "Div")):
        return None
    return None if node.op_type in ("Mul", "Div") and not number > 0 else number


def _sight(value: ir.Value) -> float | None:
    """Return the value below which x Clip(x + c, 0, h), the one thing that reads x, is 0."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 2 or value.is_graph_output():
        return None
    for shifted, product in (readers, readers[::-1]):
        if (shifted.op_type, product.op_type) != ("Add", "Mul"):
            continue
        clip = graph.only_use(shifted.outputs[0])
        constant = next((graph.constant(v) for v in shifted.inputs if v is not value), None)
        if clip is None or clip.op_type != "Clip" or constant is None or constant.size != 1:
            continue
        limits = _limits(clip, shifted.outputs[0])
        if limits is not None and not limits[0] and graph.only_use(clip.outputs[0]) is product:
            return -float(constant.reshape(-1)[0])
    return None
