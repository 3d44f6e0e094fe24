"""What ops make of constant operands, in numpy: how a weight is read that hides behind them.

A weight may be stored transposed, as integers with a scale, as codes into a table, or as a mask and the values that are
not zero; the runtime folds all of that when it opens a session. Only what such forms need is here, on the types that
they need it for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's plain value, or `default`."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def _dequantize(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    quantised, scale = arrays[0], arrays[1]
    if quantised is None or scale is None:
        return None
    zero = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.zeros((), np.int32)
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(()) if zero.size == 1 else zero
    elif block:
        count = quantised.shape[axis]
        scale = np.repeat(scale, block, axis)[(slice(None),) * (axis % quantised.ndim) + (slice(count),)]
        if zero.ndim:
            zero = np.repeat(zero, block, axis)[(slice(None),) * (axis % quantised.ndim) + (slice(count),)]
    else:
        around = [1] * quantised.ndim
        around[axis] = scale.size
        scale, zero = scale.reshape(around), zero.reshape(around) if zero.size > 1 else zero.reshape(())
    return ((quantised.astype(np.int32) - zero.astype(np.int32)) * scale).astype(scale.dtype)


def _cast(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    target = ir.DataType(attribute(node, "to"))
    return None if arrays[0] is None or target == ir.DataType.STRING else arrays[0].astype(target.numpy())


def _squeeze(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    axes = arrays[1] if len(arrays) > 1 else attribute(node, "axes")
    if arrays[0] is None or (axes is None and (len(arrays) > 1 or node.op_type == "Unsqueeze")):
        return None
    where = None if axes is None else tuple(int(axis) for axis in axes)
    return np.expand_dims(arrays[0], where or ()) if node.op_type == "Unsqueeze" else np.squeeze(arrays[0], where)


def _transpose(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    return None if arrays[0] is None else np.transpose(arrays[0], attribute(node, "perm"))


def _reshape(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if arrays[0] is None or arrays[1] is None:
        return None
    shape = [int(dim) for dim in arrays[1]]
    if not attribute(node, "allowzero", 0):
        shape = [arrays[0].shape[i] if dim == 0 else dim for i, dim in enumerate(shape)]
    return arrays[0].reshape(shape)


def _filled(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if arrays[0] is None:
        return None
    value = attribute(node, "value")
    fill = value.numpy().reshape(()) if value is not None else np.zeros((), np.float32)
    return np.broadcast_to(fill, tuple(int(dim) for dim in arrays[0]))


def _gather(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    data, indices = arrays[0], arrays[1]
    return None if data is None or indices is None else np.take(data, indices, axis=attribute(node, "axis", 0))


def _gather_elements(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    data, indices = arrays[0], arrays[1]
    if data is None or indices is None:
        return None
    axis = attribute(node, "axis", 0)
    around = tuple(slice(None) if at == axis % data.ndim else slice(size) for at, size in enumerate(indices.shape))
    return np.take_along_axis(data[around], np.where(indices < 0, indices + data.shape[axis], indices), axis)


def _scatter_elements(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    data, indices, updates = arrays[0], arrays[1], arrays[2]
    if data is None or indices is None or updates is None or attribute(node, "reduction", "none") != "none":
        return None
    found, axis = data.copy(), attribute(node, "axis", 0) % data.ndim
    where = list(np.indices(indices.shape))
    where[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
    found[tuple(where)] = updates
    return found


def _multiply(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    return None if arrays[0] is None or arrays[1] is None else np.multiply(arrays[0], arrays[1])


def _add(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    return None if arrays[0] is None or arrays[1] is None else np.add(arrays[0], arrays[1])


def _range(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if any(array is None for array in arrays):
        return None
    first, end, step = (array.reshape(()).item() for array in arrays if array is not None)
    return np.arange(first, end, step, dtype=arrays[0].dtype)  # type: ignore[union-attr]


def _modulo(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if arrays[0] is None or arrays[1] is None:
        return None
    return (np.fmod if attribute(node, "fmod", 0) else np.mod)(arrays[0], arrays[1])


def _shift(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if arrays[0] is None or arrays[1] is None:
        return None
    shift = np.right_shift if attribute(node, "direction") == "RIGHT" else np.left_shift
    return shift(arrays[0], arrays[1])


def _slice(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    data = arrays[0]
    if data is None or any(array is None for array in arrays[1:3]):
        return None
    if len(arrays) == 1:  # before opset 10
        bounds: list[Any] = [attribute(node, name) for name in ("starts", "ends", "axes")]
    else:
        bounds = [array if array is None else array.tolist() for array in arrays[1:4]]
    bounds += [None] * (3 - len(bounds))
    starts, ends, axes = bounds
    steps = arrays[4].tolist() if len(arrays) > 4 and arrays[4] is not None else [1] * len(starts)
    part = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        size = data.shape[axis]
        part[axis] = slice(max(start, -size), None if step < 0 and end < -size else end, step)
    return data[tuple(part)]


def _multiply_integers(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    if any(array is None for array in arrays):
        return None
    left, right = (array.astype(np.int32) for array in arrays[:2] if array is not None)
    zeros = [array.astype(np.int32) for array in arrays[2:] if array is not None]
    if zeros:
        left = left - (zeros[0][:, None] if zeros[0].ndim == 1 and zeros[0].size > 1 else zeros[0])
    if len(zeros) > 1:
        right = right - zeros[1]
    product: Array = np.matmul(left, right)
    return product


def _cumulate(node: ir.Node, arrays: Sequence[Array | None]) -> Array | None:
    data, axis = arrays[0], arrays[1]
    if data is None or axis is None:
        return None
    at = int(axis.reshape(()))
    turned = np.flip(data, at) if attribute(node, "reverse", 0) else data
    total = np.cumsum(turned, at, dtype=data.dtype)
    total = total - turned if attribute(node, "exclusive", 0) else total
    return np.flip(total, at) if attribute(node, "reverse", 0) else total


# How weights hide: op -> what it does to them.
SEE_THROUGH: dict[str, Callable[[ir.Node, Sequence[Array | None]], Array | None]] = {
    "Identity": lambda node, arrays: arrays[0],
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "DequantizeLinear": _dequantize,
    "ConstantOfShape": _filled,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "ScatterElements": _scatter_elements,
    "Mul": _multiply,
    "Add": _add,
    "Range": _range,
    "Mod": _modulo,
    "BitShift": _shift,
    "Slice": _slice,
    "MatMulInteger": _multiply_integers,
    "CumSum": _cumulate,
}
# A smaller form of the weight stands before one of these.
ENCODED = ("Cast", "DequantizeLinear", "Gather", "GatherElements", "ScatterElements", "Mul")
