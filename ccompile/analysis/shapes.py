"""Types and shapes of all top-level values, inferred from the graph inputs alone.

Declared intermediate and output shapes are dropped first: they occur wrong in the wild, and a wrong one misleads
every consumer. Dimensions that inference cannot know stay None (or a symbol).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ccompile import graph, onnx_io

Dim = int | str | None


@dataclass(frozen=True)
class ValueType:
    """What is known about a value: its element type and, when the rank is known, its dimensions."""

    dtype: ir.DataType | None
    shape: tuple[Dim, ...] | None

    @property
    def static(self) -> tuple[int, ...] | None:
        """Return the shape when every dimension is known."""
        if self.shape is None:
            return None
        known = tuple(dim for dim in self.shape if isinstance(dim, int))
        return known if len(known) == len(self.shape) else None

    @property
    def nbytes(self) -> int | None:
        """Return the size in bytes when shape and element type are known."""
        if self.static is None or self.dtype is None or self.dtype == ir.DataType.STRING:
            return None
        return math.ceil(math.prod(self.static) * self.dtype.bitwidth / 8)


UNKNOWN = ValueType(None, None)
Shapes = Mapping[str, ValueType]


def shapes(model: ir.Model) -> dict[str, ValueType]:
    """Return the types of all top-level values under the model's own, possibly symbolic, input shapes."""
    return infer(model, {})


def infer(model: ir.Model, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, ValueType]:
    """Return the types of all top-level values, with the given graph inputs bound to concrete shapes."""
    proto = onnx_io.skeleton(model)
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        if value.name in inputs and value.type.HasField("tensor_type"):
            bound = onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name])
            value.type.CopyFrom(bound.type)
    for value in proto.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    found: dict[str, ValueType] = {}
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        inferred = proto  # only what the inputs say: callers see UNKNOWN elsewhere and act on less
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        if value.type.HasField("tensor_type"):
            found[value.name] = _value_type(value.type.tensor_type)
    for name, initializer in model.graph.initializers.items():
        if initializer.const_value is not None:
            found[name] = ValueType(initializer.const_value.dtype, graph.dims_of(initializer.const_value))
    return found


def _value_type(proto: onnx.TypeProto.Tensor) -> ValueType:
    dtype = ir.DataType(proto.elem_type) if proto.elem_type else None
    if not proto.HasField("shape"):
        return ValueType(dtype, None)
    dims: list[Dim] = []
    for dim in proto.shape.dim:
        known = dim.HasField("dim_value") and dim.dim_value >= 0
        dims.append(dim.dim_value if known else (dim.dim_param or None))
    return ValueType(dtype, tuple(dims))
