"""Linear layers in one form, y[o] = W[o, d] x[d] + b[o] per row and group, whatever the op.

op             rows                      d per group                      weight as stored
Conv           batch x output positions  in channels / groups x taps      [o, i / groups, *kernel]
ConvTranspose  batch x output positions  in channels / groups x taps      [i, o / groups, *kernel]
Gemm           rows of A                 columns of A                     [i, o], or [o, i] with transB
MatMul         all leading axes          last axis of the left operand    [i, o] on the right
MatMul         columns of the right one  rows of the right operand        [o, i] on the left

Taps run in the kernel's order, channels outermost, so a channel's columns are d / channels neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.core import Array
from ccompile.moments import Layer


def layer(node: ir.Node) -> Layer | str:
    """Return a linear node's layer, or why it has none."""
    if node.op_type not in graph.LINEAR or node.domain not in ("", "ai.onnx"):
        return "it is not linear"
    index = 0 if node.op_type == "MatMul" and not graph.is_constant(node.inputs[1]) else 1
    weight, data = node.inputs[index], node.inputs[1 - index]
    shape = graph.static_shape(weight)
    if shape is None or data is None:
        return "its weight is not constant"
    if graph.is_constant(data):
        return "both operands are constant"
    if node.op_type in ("Conv", "ConvTranspose"):
        return _convolution(node, shape, str(data.name))
    if len(shape) != 2:
        return f"its weight has rank {len(shape)}, not 2"
    if node.op_type == "Gemm" and graph.attribute(node, "transA", 0):
        return "its input is transposed"
    wide = index == 0 or (node.op_type == "Gemm" and bool(graph.attribute(node, "transB", 0)))
    out, columns = shape if wide else shape[::-1]
    return Layer(
        name=str(node.name),
        op=node.op_type,
        input=str(data.name),
        output=str(node.outputs[0].name),
        weight=index,
        groups=1,
        out=out,
        columns=columns,
        taps=1,
        wide=wide,
    )


def _convolution(node: ir.Node, shape: tuple[int, ...], data: str) -> Layer | str:
    if any(graph.attribute(node, "output_padding", [])) or graph.attribute(node, "output_shape"):
        return "its output is padded"
    kernel = shape[2:]
    groups = graph.attribute(node, "group", 1)
    ones = [1] * len(kernel)
    if node.op_type == "Conv":
        out, channels = shape[0] // groups, shape[1]
    else:
        out, channels = shape[1], shape[0] // groups
    return Layer(
        name=str(node.name),
        op=node.op_type,
        input=data,
        output=str(node.outputs[0].name),
        weight=1,
        groups=groups,
        out=out,
        columns=channels * math.prod(kernel),
        taps=math.prod(kernel),
        kernel=kernel,
        strides=tuple(graph.attribute(node, "strides", ones)),
        dilations=tuple(graph.attribute(node, "dilations", ones)),
        pads=tuple(graph.attribute(node, "pads", [0] * (2 * len(kernel)))),
        auto_pad=graph.attribute(node, "auto_pad", "NOTSET"),
    )


def matrix(node: ir.Node, form: Layer) -> Array:
    """Return the weight as W[groups, out, columns] in float64; Gemm's alpha is in it."""
    stored = graph.constant(node.inputs[form.weight])
    assert stored is not None
    W = stored.astype(np.float64)
    if form.op == "Conv":
        return W.reshape(form.groups, form.out, form.columns)
    if form.op == "ConvTranspose":
        grouped = W.reshape(form.groups, form.channels, form.out, form.taps)
        return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)).reshape(form.groups, form.out, form.columns)
    alpha: float = graph.attribute(node, "alpha", 1.0)
    return (W if form.wide else W.T)[None] * alpha


def matrix_dtype(node: ir.Node, form: Layer) -> np.dtype[Any]:
    """Return the type of the weight."""
    stored = graph.constant(node.inputs[form.weight])
    assert stored is not None
    return stored.dtype


def bias(node: ir.Node, form: Layer) -> Array | None:
    """Return the bias as [groups, out] in float64, zeros without one; None when it is not one number per channel."""
    channels = form.groups * form.out
    value = node.inputs[2] if form.op != "MatMul" and len(node.inputs) > 2 else None
    if value is None:
        return np.zeros((form.groups, form.out))
    stored = graph.constant(value)
    if stored is None or (stored.ndim > 1 and stored.shape[0] != 1):
        return None
    beta: float = graph.attribute(node, "beta", 1.0) if form.op == "Gemm" else 1.0
    return np.broadcast_to(stored.astype(np.float64).reshape(-1) * beta, channels).reshape(form.groups, form.out)


def store(node: ir.Node, form: Layer, W: Array | None, b: Array | None) -> None:
    """Give the node the weight W[groups, out, columns] and the bias b[groups, out], each unless None.

    A MatMul takes no bias: pass None. Raises FloatingPointError, and changes nothing, when they are not finite.
    """
    old = graph.constant(node.inputs[form.weight])
    assert old is not None
    with np.errstate(all="ignore"):  # told below, as an error
        weight = None if W is None else _stored(node, form, W).astype(old.dtype)
        offset = None if b is None else b.reshape(-1).astype(old.dtype)
    if not all(array is None or graph.is_finite(array) for array in (weight, offset)):
        raise FloatingPointError(f"the fitted weight of `{form.name}` is not finite")
    if weight is not None:
        graph.replace_constant(node, form.weight, weight)
    if offset is not None and (offset.any() or len(node.inputs) > 2):
        graph.replace_constant(node, 2, offset)
        node.attributes.pop("beta", None)


def _stored(node: ir.Node, form: Layer, W: Array) -> Array:
    """Return W[groups, out, columns] as the node stores it."""
    if form.kernel:
        return arranged(form, W)
    alpha: float = graph.attribute(node, "alpha", 1.0)
    return arranged(form, W / alpha)


def arranged(form: Layer, W: Array) -> Array:
    """Return entries [groups, out, columns] in the order in which the layer's weight is stored."""
    if form.op == "Conv":
        return W.reshape(form.groups * form.out, form.channels, *form.kernel)
    if form.op == "ConvTranspose":
        split = W.reshape(form.groups, form.out, form.channels, form.taps).transpose(0, 2, 1, 3)
        return split.reshape(form.groups * form.channels, form.out, *form.kernel)
    plain: Array = W[0] if form.wide else W[0].T
    return plain


# ---------------------------------------------------------------------------------------------- rows


def row_count(form: Layer, y_shape: Sequence[int]) -> int:
    """Return how many rows an output of that shape has."""
    if form.kernel:
        return math.prod(y_shape) // (form.groups * form.out)
    if form.op == "MatMul" and form.weight == 0:
        return math.prod(y_shape) // form.out
    return math.prod(y_shape[:-1])


def output_rows(form: Layer, y: Array, picks: Array) -> Array:
    """Return the picked rows of an output as [groups, rows, out] in float64."""
    if form.kernel:
        flat = np.moveaxis(y, 1, -1).reshape(-1, form.groups, form.out)[picks]
        return flat.transpose(1, 0, 2).astype(np.float64)
    return _rows_last(form, y).reshape(-1, form.out)[picks][None].astype(np.float64)


def input_rows(form: Layer, x: Array, y_shape: Sequence[int], picks: Array) -> Array:
    """Return the picked rows of the unfolded input as [groups, rows, columns] in float64: im2col at those rows."""
    if form.kernel:
        return _patches(form, x, y_shape, picks)
    return _rows_last(form, x).reshape(-1, form.columns)[picks][None].astype(np.float64)


def _rows_last(form: Layer, array: Array) -> Array:
    """Return an operand or result with its columns last, as a right operand has them; a vector is one column."""
    return np.moveaxis(array, -2, -1) if form.op == "MatMul" and form.weight == 0 and array.ndim > 1 else array


def _begin_pads(form: Layer, x_shape: Sequence[int], y_shape: Sequence[int]) -> list[int]:
    """Return the padding before each spatial axis, auto_pad resolved against real shapes."""
    spatial = len(form.kernel)
    if form.auto_pad in ("NOTSET", ""):
        return list(form.pads[:spatial])
    if form.auto_pad == "VALID":
        return [0] * spatial
    begins = []
    for axis in range(spatial):
        reach = (form.kernel[axis] - 1) * form.dilations[axis] + 1
        small, large = x_shape[2 + axis], y_shape[2 + axis]
        if form.op == "Conv":
            small, large = large, small
        total = max(0, (small - 1) * form.strides[axis] + reach - large)
        begins.append(total // 2 if form.auto_pad == "SAME_UPPER" else total - total // 2)
    return begins


def _patches(form: Layer, x: Array, y_shape: Sequence[int], picks: Array) -> Array:
    sample, *where = np.unravel_index(picks, (y_shape[0], *y_shape[2:]))
    begins = _begin_pads(form, x.shape, y_shape)
    count, spatial = len(picks), len(form.kernel)
    inside = np.ones((count, *form.kernel), bool)
    index: list[Any] = [sample.reshape(-1, *(1,) * spatial)]
    for axis in range(spatial):
        offsets = np.arange(form.kernel[axis]) * form.dilations[axis]
        if form.op == "Conv":
            at = where[axis][:, None] * form.strides[axis] - begins[axis] + offsets
            valid = (at >= 0) & (at < x.shape[2 + axis])
        else:
            shifted = where[axis][:, None] + begins[axis] - offsets
            at, rest = np.divmod(shifted, form.strides[axis])
            valid = (rest == 0) & (at >= 0) & (at < x.shape[2 + axis])
        around = [count] + [form.kernel[axis] if a == axis else 1 for a in range(spatial)]
        inside &= valid.reshape(around)
        index.append(np.where(valid, at, 0).reshape(around))
    found = x[(index[0], slice(None), *index[1:])]  # [rows, *kernel, channels]: the sliced axis goes last
    if not inside.all():
        found[~inside] = 0
    columns = np.empty((count, found.shape[-1], *form.kernel))  # large: no copy is made on the way
    columns[...] = np.moveaxis(found, -1, 1)
    return columns.reshape(count, form.groups, form.columns).transpose(1, 0, 2)
