"""Nodes that are linear over positions, as kernels of numerics.composition, and kernels as nodes.

op                   as a kernel
Conv                 itself
AveragePool          a mean per channel, where all windows have the same number of elements
BatchNormalization   a factor and a shift per channel, one tap
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.shapes import Dim
from ccompile.core import Array
from ccompile.numerics.composition import Ints, Kernel, mean

Dims = tuple[Dim, ...] | None


def convolution(node: ir.Node, known: Dims) -> Kernel | str:
    """Return a Conv as a kernel, or why it is none; `known` is its input's shape, needed where pads are automatic."""
    W, b = graph.constant(node.inputs[1]), None
    if W is None:
        return f"the weight of `{node.name}` is not constant"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        b = graph.constant(node.inputs[2])
        if b is None:
            return f"the bias of `{node.name}` is not constant"
    window = windows(node, W.shape[2:], known)
    if isinstance(window, str):
        return window
    bias = np.zeros(W.shape[0]) if b is None else b.astype(np.float64)
    return Kernel(W.astype(np.float64), bias, graph.attribute(node, "group", 1), *window)


def pooling(node: ir.Node, channels: int, known: Dims) -> Kernel | str:
    """Return an AveragePool as a kernel, or why it is none; `known` is its input's shape."""
    size = tuple(graph.attribute(node, "kernel_shape"))
    window = windows(node, size, known)
    if isinstance(window, str):
        return window
    strides, dilations, begins, ends = window
    if (any(begins) or any(ends)) and not graph.attribute(node, "count_include_pad", 0):
        return f"`{node.name}` does not count its padding, so that its windows differ at the borders"
    if graph.attribute(node, "ceil_mode", 0) and not _fits(known, size, window):
        return f"`{node.name}` rounds its size up, so that its last windows may be smaller"
    return mean(channels, size, strides, dilations, begins, ends)


def windows(node: ir.Node, size: Ints, known: Dims) -> tuple[Ints, Ints, Ints, Ints] | str:
    """Return strides, dilations and the pads before and after of a node with a window, or why they are unknown."""
    axes = len(size)
    strides = tuple(graph.attribute(node, "strides", [1] * axes))
    dilations = tuple(graph.attribute(node, "dilations", [1] * axes))
    auto = graph.attribute(node, "auto_pad", "NOTSET")
    if auto in ("NOTSET", "", "VALID"):
        pads = graph.attribute(node, "pads", [0] * (2 * axes)) if auto != "VALID" else [0] * (2 * axes)
        if min(pads) < 0:
            return f"`{node.name}` has negative pads"
        return strides, dilations, tuple(pads[:axes]), tuple(pads[axes:])
    before, after = [], []
    for axis in range(axes):
        dim = known[2 + axis] if known is not None and len(known) == 2 + axes else None
        if not isinstance(dim, int):
            return f"`{node.name}` pads by its input's size, which is not known"
        reach = (size[axis] - 1) * dilations[axis] + 1
        total = max(0, (-(-dim // strides[axis]) - 1) * strides[axis] + reach - dim)
        before.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        after.append(total - before[-1])
    return strides, dilations, tuple(before), tuple(after)


def _fits(known: Dims, size: Ints, window: tuple[Ints, Ints, Ints, Ints]) -> bool:
    """Return whether windows end where the input does, so that rounding the size up changes nothing."""
    if known is None or len(known) != 2 + len(size):
        return False
    for dim, k, stride, dilation, begin, end in zip(known[2:], size, *window, strict=True):
        if not isinstance(dim, int) or (dim + begin + end - (k - 1) * dilation - 1) % stride:
            return False
    return True


def normalisation(node: ir.Node, axes: int) -> Kernel | str:
    """Return a BatchNormalization in inference as a kernel of one tap on `axes` spatial axes, or why it is none."""
    arrays = [graph.constant(value) for value in node.inputs[1:5]]
    if graph.attribute(node, "training_mode", 0) or not graph.attribute(node, "spatial", 1):
        return f"`{node.name}` is no factor per channel"
    if any(array is None for array in arrays) or any(list(output.uses()) for output in node.outputs[1:]):
        return f"the parameters of `{node.name}` are not constant"
    gamma, beta, mu, var = (np.asarray(array, np.float64) for array in arrays)
    scale = gamma / np.sqrt(var + graph.attribute(node, "epsilon", 1e-5))
    ones, none = (1,) * axes, (0,) * axes
    return Kernel(scale.reshape(-1, 1, *ones), beta - scale * mu, scale.size, ones, ones, none, none)


def store(node: ir.Node, kernel: Kernel, dtype: np.dtype[np.generic]) -> bool:
    """Make a Conv compute `kernel`; False, and nothing changed, when its weight would not be finite in `dtype`."""
    with np.errstate(over="ignore"):
        W, b = kernel.W.astype(dtype), kernel.b.astype(dtype)
    if not graph.is_finite(W) or not graph.is_finite(b):
        return False
    graph.replace_constant(node, 1, W)
    if b.any() or len(node.inputs) > 2:
        graph.replace_constant(node, 2, b)
    describe(node, kernel)
    return True


def describe(node: ir.Node, kernel: Kernel) -> None:
    """Give a Conv the attributes of `kernel`; what is at its default is left out."""
    given: dict[str, tuple[list[int], bool]] = {
        "kernel_shape": (list(kernel.taps), True),
        "strides": (list(kernel.strides), set(kernel.strides) != {1}),
        "dilations": (list(kernel.dilations), set(kernel.dilations) != {1}),
        "pads": ([*kernel.begins, *kernel.ends], kernel.is_padded),
    }
    node.attributes.pop("auto_pad", None)
    node.attributes.pop("group", None)
    for name, (numbers, needed) in given.items():
        node.attributes.pop(name, None)
        if needed:
            node.attributes[name] = ir.AttrInt64s(name, numbers)
    if kernel.groups != 1:
        node.attributes["group"] = ir.AttrInt64("group", kernel.groups)


def weight_dtype(node: ir.Node) -> np.dtype[np.generic]:
    """Return the type of a node's constant weight."""
    W: Array | None = graph.constant(node.inputs[1])
    assert W is not None
    return W.dtype
