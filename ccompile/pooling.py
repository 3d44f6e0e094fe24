"""Poolings in the place of a MaxPool, and weighted means that are plain ones.

s3                  MaxPool(k, stride 1), then AveragePool(s, s): what S3Pool's random rows and columns are on average
detail-preserving   numerics.detail_pool in standard ops, where windows neither overlap nor leave anything out
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import kernels
from ccompile.analysis.shapes import ValueType
from ccompile.core import Array, Site
from ccompile.emitting import Emitter
from ccompile.numerics import detail_pool
from ccompile.numerics.detail_pool import Parameters

_OPSET = 13  # Resize without a region of interest


def averaged(node: ir.Node) -> Site:
    """Let an AveragePool with the same windows stand in place of a MaxPool."""
    new = graph.add_node("AveragePool", node.inputs[:1], before=node, base=f"{node.name}_average")
    kept = ("kernel_shape", "strides", "pads", "auto_pad", "ceil_mode", "dilations")
    new.attributes.update({name: node.attributes[name] for name in kept if name in node.attributes})
    graph.replace_node(node, new)
    return Site((str(node.name), str(new.name)), "the mean in place of the maximum")


def softened(node: ir.Node, known: ValueType) -> Site | str:
    """Let the means of the maxima at all positions stand in place of a MaxPool with strides.

    The last means are of what there is, so that sizes stay: pads that are not counted fill their windows.
    Source: Zhai et al. 2017, arXiv:1611.05138, section 3.3.
    """
    size = tuple(graph.attribute(node, "kernel_shape"))
    window = kernels.windows(node, size, known.shape)
    if isinstance(window, str):
        return window
    strides, dilations, begins, ends = window
    if set(strides) == {1}:
        return "it has stride 1, which is at all positions already"
    if graph.attribute(node, "ceil_mode", 0):
        return "it rounds its size up"
    emit = Emitter(node)
    more: dict[str, graph.Attribute] = {"dilations": list(dilations)} if set(dilations) != {1} else {}
    more |= {"pads": [*begins, *ends]} if any((*begins, *ends)) else {}
    most = emit.op("MaxPool", node.inputs[0], kernel_shape=list(size), **more)
    rest = [*(0 for _ in strides), *(stride - 1 for stride in strides)]
    emit.done(emit.op("AveragePool", most, kernel_shape=list(strides), strides=list(strides), pads=rest))
    names = (str(node.name), *(str(new.name) for new in emit.made))
    return Site(names, f"means of {' x '.join(map(str, strides))} maxima")


def why_no_detail(node: ir.Node, known: ValueType, opset: int) -> str:
    """Return why no detail-preserving pooling can be written in place of a MaxPool of `known`, or nothing."""
    size = tuple(graph.attribute(node, "kernel_shape"))
    window = kernels.windows(node, size, known.shape)
    if isinstance(window, str):
        return window
    if opset < _OPSET:
        return f"opset {opset} has no Resize by factors alone"
    if known.dtype != ir.DataType.FLOAT or known.shape is None:
        return "it does not pool float32 of a known rank"
    if window[0] != size or any(window[2]) or any(window[3]) or set(window[1]) != {1}:
        return "its windows overlap, are padded or leave positions out"
    if any(not isinstance(dim, int) or dim % k for dim, k in zip(known.shape[2:], size, strict=True)):
        return "its windows do not fill the map"
    return ""


def windows_of(maps: Array, size: tuple[int, ...]) -> Array:
    """Return windows[n, taps] of maps[m, ...] in whole windows side by side."""
    split = maps.reshape(
        len(maps), *(part for dim, k in zip(maps.shape[1:], size, strict=True) for part in (dim // k, k))
    )
    axes = range(1, split.ndim)
    found: Array = split.transpose(0, *(a for a in axes if a % 2), *(a for a in axes if not a % 2))
    return found.reshape(-1, int(np.prod(size)))


def detailed(node: ir.Node, maps: Array) -> Site:
    """Let a detail-preserving pooling stand in place of a MaxPool, fitted to its maxima over maps[m, ...] it reads."""
    size = tuple(graph.attribute(node, "kernel_shape"))
    windows = windows_of(maps, size)
    found = detail_pool.fitted(windows, windows.max(1))
    if not found.power:
        return averaged(node)
    made = _emitted(node, size, found)
    told = f"detail-preserving, alpha {found.alpha:.3g}, lambda {found.power:.3g}"
    return Site((str(node.name), *(str(new.name) for new in made)), told)


def _emitted(node: ir.Node, size: tuple[int, ...], found: Parameters) -> list[ir.Node]:
    emit, x = Emitter(node), node.inputs[0]

    def number(value: float, name: str) -> ir.Value:
        return emit.weight(np.array(value), name)

    def mean(value: ir.Value | None) -> ir.Value:
        return emit.op("AveragePool", value, kernel_shape=list(size), strides=list(size))

    factors = emit.weight(np.array([1, 1, *size]), "factors")
    how: dict[str, graph.Attribute] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    centre = emit.op("Resize", mean(x), None, factors, mode="nearest", **how)
    above = emit.op("Mul", emit.op("Relu", emit.op("Sub", x, centre)), number(1 / found.scale, "scale"))
    raised = emit.op("Pow", above, number(found.power, "lambda"))
    weights = emit.op("Add", raised, number(found.alpha, "alpha"))
    return emit.done(emit.op("Div", mean(emit.op("Mul", weights, x)), mean(weights)))


# ---------------------------------------------------------------------------------------------- exact forms


def axis_by_axis(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Take the maxima along one axis after the other, the longest strides first."""
    size = graph.attribute(node, "kernel_shape")
    axes = len(size)
    strides = graph.attribute(node, "strides", [1] * axes)
    made: list[ir.Node] = []
    value = node.inputs[0]
    for axis in sorted(range(axes), key=lambda axis: -strides[axis]):
        new = graph.add_node("MaxPool", [value], before=node, base=f"{node.name}_axis")
        new.attributes.update(node.attributes)
        for name, rest in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 0)):
            if name in node.attributes:
                given = graph.attribute(node, name)
                kept = [held if at % axes == axis else rest for at, held in enumerate(given)]
                new.attributes[name] = ir.AttrInt64s(name, kept)
        made.append(new)
        value = new.outputs[0]
    graph.replace_node(node, made[-1])
    return made


def equal_weights(node: ir.Node) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """Return the x, and the other nodes, of a Div that is a mean of w x over one of w with w the same everywhere.

    The second of the nodes is the pooling of w x. w is z^0, or a constant above it.
    """
    if node.op_type != "Div" or None in node.inputs:
        return None
    above, below = (_alone(value, "AveragePool", node) for value in node.inputs)
    product = _alone(above.inputs[0], "Mul", above) if above is not None else None
    if above is None or below is None or product is None or _window(above) != _window(below):
        return None
    weights = below.inputs[0]
    x = next((v for v, w in (product.inputs, product.inputs[::-1]) if w is weights and v is not weights), None)
    constant = _constant_power(weights)
    return None if x is None or constant is None else (x, (product, above, below, *constant))


def as_plain_mean(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Let an AveragePool stand in place of a Div that `equal_weights` knows."""
    found = equal_weights(node)
    assert found is not None
    new = graph.add_node("AveragePool", [found[0]], before=node, base=f"{node.name}_mean")
    new.attributes.update(found[1][1].attributes)
    new.attributes.pop("count_include_pad", None)
    graph.replace_node(node, new)
    graph.remove_dead(main)
    return (new,)


def _alone(value: ir.Value | None, op: str, reader: ir.Node) -> ir.Node | None:
    made = value.producer() if value is not None and graph.only_use(value) is reader else None
    return made if made is not None and made.op_type == op and made.domain in ("", "ai.onnx") else None


def _window(node: ir.Node) -> dict[str, object]:
    return {name: held.value for name, held in node.attributes.items()}


def _constant_power(value: ir.Value | None) -> tuple[ir.Node, ...] | None:
    """Return the nodes of z^0, or of z^0 + c with 1 + c > 0."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Pow":
        exponent = graph.constant(node.inputs[1])
        return (node,) if exponent is not None and exponent.size == 1 and not exponent.any() else None
    if node.op_type != "Add":
        return None
    for raised, operand in (node.inputs, node.inputs[::-1]):
        added = graph.constant(operand) if graph.is_constant(operand) else None
        if added is not None and added.size == 1 and 0 < 1 + float(added.reshape(-1)[0]) < np.inf:
            inner = _constant_power(raised)
            return (node, *inner) if inner is not None and len(inner) == 1 else None
    return None
