"""Run poolings as the op that computes the same fastest, where and after as few elements as can be.

mean over a window = depthwise Conv with W = 1 / taps, and back;  mean over all positions = GlobalAveragePool =
ReduceMean over the spatial axes = AveragePool with the map as its window;  a pooling of one tap = the strides of the
convolution before it;  max(f(x)) = f(max(x)) for f that never falls;  a 1 x 1 convolution to fewer channels may come
before a mean of stride 1;  the maximum over a window = that along one axis of those along the other;  a mean whose
weights are equal (detail-preserving pooling with lambda = 0) = the plain one.

Fires:  AveragePool whose windows have one size (as Conv: float32); depthwise Conv with equal weights and no bias;
        ReduceMean over all spatial axes; MaxPool, AveragePool of one tap behind a Conv, also through activations;
        MaxPool next to a non-decreasing activation that nothing else reads; AveragePool of stride 1 before a Conv 1x1;
        MaxPool over two axes or more; a Div of AveragePools of w x and w, w = z^0 or a constant above it.
Error:  float reordering.
Cost:   never more elements or multiply-adds; which form is the fastest is the target's to say. A mean as a Conv,
        or behind one, was slower as measured than estimated, and a maximum axis by axis has no estimate: these are
        tried where times are measured (as a Conv: or the target has no AveragePool).
Source: Lee et al. 2018, arXiv:1805.00748 (order of pooling and activation); ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ccompile import graph, merging, pooling
from ccompile.analysis import kernels
from ccompile.analysis.shapes import UNKNOWN, Dim, shapes
from ccompile.core import PassResult, Skip, View
from ccompile.lowering import Formulation, Lowering
from ccompile.numerics.composition import Kernel

# Activations that never fall, whatever their parameters; LeakyRelu and PRelu where their slopes are not negative.
_RISING = frozenset(
    "Celu Clip Elu Erf Exp HardSigmoid LeakyRelu PRelu Relu Selu Sigmoid Softplus Softsign Tanh".split()
)
_POINTWISE = _RISING | {"HardSwish", "Gelu", "Mish", "Swish", "Neg", "Abs", "Sqrt", "BatchNormalization"}
_WINDOWS = ("MaxPool", "AveragePool")


class LowerPool(Lowering):
    """Options of lower-pool: those that every lowering takes."""

    def run(self, view: View) -> PassResult:
        """Decide and rewrite site by site; constants that nothing reads any more go."""
        result = super().run(view)
        graph.remove_dead(view.graph)
        view.changed()
        return result

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return the forms of a pooling, or of what is one."""
        if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
            return ()
        kind = view.ask(shapes).get(str(node.inputs[0].name), UNKNOWN)
        known = kind.shape
        found: list[Formulation] = []
        if node.op_type == "AveragePool":
            as_conv = kind.dtype == ir.DataType.FLOAT and (
                self.select != "target" or not view.target.runs(node.op_type)
            )
            found = [form for form in _of_average(node, known) if form.label != "Conv" or as_conv]
        elif node.op_type == "Conv":
            found = _of_conv(node, known)
            if self.select != "target" and (pool := merging.pool_before(node, view)) is not None:
                found.append(Formulation("pooling behind", 0.0, _pooling_behind, (str(pool.name),)))
        elif node.op_type == "ReduceMean":
            found = _of_mean(node, known)
        elif node.op_type == "Div":
            found = _of_equal_weights(node, view)
        if node.op_type == "MaxPool" and len(node.outputs) == 1:
            found = _of_max(node)
            if self.select != "target" and sum(k > 1 for k in graph.attribute(node, "kernel_shape")) > 1:
                found.append(Formulation("axis by axis", 0.0, pooling.axis_by_axis))
        if node.op_type in _WINDOWS:
            found += _of_one_tap(node, known)
        return [form for form in found if all(view.target.runs(op) for op in (form.label,) if op[0].isupper())]


# ---------------------------------------------------------------------------------------------- means


def _of_average(node: ir.Node, known: tuple[Dim, ...] | None) -> list[Formulation]:
    channels = known[1] if known is not None and len(known) > 2 else None
    if not isinstance(channels, int):
        return []
    kernel = kernels.pooling(node, channels, known)
    if isinstance(kernel, str):
        return []
    found = []
    if tuple(known[2:] if known is not None else ()) == kernel.taps and not kernel.is_padded:
        found.append(Formulation("GlobalAveragePool", 0.0, _as_global))
    return [*found, Formulation("Conv", 0.0, partial(_as_depthwise, kernel))]


def _as_global(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    new = graph.add_node("GlobalAveragePool", node.inputs[:1], before=node, base=f"{node.name}_global")
    if node.op_type == "ReduceMean" and not graph.attribute(node, "keepdims", 1):
        new = graph.add_node("Flatten", new.outputs, before=node, base=f"{node.name}_flat")
    graph.replace_node(node, new)
    return (new,)


def _as_depthwise(kernel: Kernel, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    W = graph.add_constant(main, f"{node.name}_mean", kernel.W.astype(np.float32))
    new = graph.add_node("Conv", [node.inputs[0], W], before=node, base=f"{node.name}_conv")
    kernels.describe(new, kernel)
    graph.replace_node(node, new)
    return (new,)


def _of_conv(node: ir.Node, known: tuple[Dim, ...] | None) -> list[Formulation]:
    W = graph.constant(node.inputs[1])
    if W is None or W.ndim < 3 or W.shape[1] != 1 or W[0, 0].size < 2 or np.any(np.float32(1 / W[0, 0].size) != W):
        return []
    kernel = kernels.convolution(node, known)
    if isinstance(kernel, str) or kernel.outs != kernel.groups or kernel.b.any() or set(kernel.dilations) != {1}:
        return []
    return [Formulation("AveragePool", 0.0, partial(_as_average, kernel))]


def _as_average(kernel: Kernel, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    new = graph.add_node("AveragePool", node.inputs[:1], before=node, base=f"{node.name}_pool")
    kernels.describe(new, kernel)
    new.attributes.pop("group", None)
    if kernel.is_padded:
        new.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    graph.replace_node(node, new)
    return (new,)


def _of_mean(node: ir.Node, known: tuple[Dim, ...] | None) -> list[Formulation]:
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else graph.attribute(node, "axes")
    if known is None or len(known) < 3 or given is None:
        return []
    axes = sorted(int(axis) % len(known) for axis in given)
    return [Formulation("GlobalAveragePool", 0.0, _as_global)] if axes == list(range(2, len(known))) else []


def _of_equal_weights(node: ir.Node, view: View) -> list[Formulation]:
    """Return a detail-preserving pooling with lambda = 0, a weighted mean with equal weights, as a mean."""
    found = pooling.equal_weights(node)
    if found is None:
        return []
    x, inner = found
    of_x, of_both = (view.ask(shapes).get(str(v.name), UNKNOWN).shape for v in (x, inner[0].outputs[0]))
    if of_x is None or None in of_x or of_x != of_both:
        return []
    return [Formulation("AveragePool", 0.0, pooling.as_plain_mean, tuple(str(other.name) for other in inner))]


# ---------------------------------------------------------------------------------------------- order


def _of_max(node: ir.Node) -> list[Formulation]:
    found = []
    before = _source(node)
    if before is not None and _is_rising(before):
        found.append(Formulation("activation behind", 0.0, _activation_behind, (str(before.name),)))
    after = graph.only_use(node.outputs[0])
    if after is not None and _is_rising(after) and after.inputs[0] is node.outputs[0]:
        found.append(Formulation("activation before", 0.0, _activation_before, (str(after.name),)))
    return found


def _source(node: ir.Node) -> ir.Node | None:
    """Return what makes the value that a node alone reads."""
    value = node.inputs[0]
    made = value.producer() if value is not None and graph.only_use(value) is node else None
    return made if made is not None and made.domain in ("", "ai.onnx") and made.inputs else None


def _is_rising(node: ir.Node) -> bool:
    """Return whether a node is an activation of one moving value that never falls, and the same at all positions."""
    if node.op_type not in _RISING or node.domain not in ("", "ai.onnx"):
        return False
    if any(value is not None and not graph.is_constant(value) for value in node.inputs[1:]):
        return False
    if node.op_type == "PRelu":
        slope = graph.constant(node.inputs[1])
        return slope is not None and bool((slope >= 0).all()) and (slope.size == 1 or set(slope.shape[1:]) == {1})
    return node.op_type != "LeakyRelu" or graph.attribute(node, "alpha", 0.01) >= 0


def _activation_behind(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    before = _source(node)
    assert before is not None
    return _swapped(before, node)


def _activation_before(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    after = graph.only_use(node.outputs[0])
    assert after is not None
    return _swapped(node, after)


def _swapped(first: ir.Node, second: ir.Node) -> Sequence[ir.Node]:
    """Let two nodes of one moving value each change places; their names stay."""
    twin = graph.add_node(
        second.op_type, [first.inputs[0], *second.inputs[1:]], before=first, base=f"{second.name}_sooner"
    )
    twin.attributes.update(second.attributes)
    first.replace_input_with(0, twin.outputs[0])
    graph.absorb(second, first.outputs[0])
    twin.name = second.name
    return twin, first


def _pooling_behind(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    value = node.inputs[0]
    pool = value.producer() if value is not None else None
    assert pool is not None
    return (merging.conv_sooner(pool, node),)


# ---------------------------------------------------------------------------------------------- strides


def _of_one_tap(node: ir.Node, known: tuple[Dim, ...] | None) -> list[Formulation]:
    """Return a pooling that only leaves positions out as strides of the convolution before it."""
    size = tuple(graph.attribute(node, "kernel_shape"))
    window = kernels.windows(node, size, known)
    if isinstance(window, str) or set(size) != {1} or any(window[2]) or any(window[3]) or len(node.outputs) > 1:
        return []
    chain = _chain(node)
    if not chain or graph.attribute(node, "ceil_mode", 0):
        return []
    return [Formulation("strides", 0.0, _as_strides, tuple(str(other.name) for other in chain))]


def _chain(node: ir.Node) -> list[ir.Node]:
    """Return the Conv behind which `node` stands, and the activations between, or nothing."""
    found: list[ir.Node] = []
    while (before := _source((found or [node])[0])) is not None:
        if before.op_type == "Conv":
            return [before, *found] if graph.attribute(before, "auto_pad", "NOTSET") in ("NOTSET", "VALID") else []
        if before.op_type not in _POINTWISE or len(before.outputs) != 1:
            return []
        found.insert(0, before)
    return []


def _as_strides(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    chain = _chain(node)
    more = graph.attribute(node, "strides", [1] * len(graph.attribute(node, "kernel_shape")))
    strides = graph.attribute(chain[0], "strides", [1] * len(more))
    chain[0].attributes["strides"] = ir.AttrInt64s("strides", [s * t for s, t in zip(strides, more, strict=True)])
    for other in chain:
        other.outputs[0].shape = None
    graph.absorb(node, chain[-1].outputs[0])
    return chain
