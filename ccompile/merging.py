"""Where one convolution can stand for two that follow each other or are summed, what that saves, and how it is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import kernels
from ccompile.analysis.shapes import UNKNOWN, Dim, shapes
from ccompile.core import Site, View
from ccompile.numerics import composition
from ccompile.numerics.composition import Kernel

POOLS = ("AveragePool", "GlobalAveragePool")
SUMS = ("Add", "Sum")
_INFINITE = "the merged weight would not be finite"


@dataclass(frozen=True)
class Plan:
    """What could stand in place of nodes: its multiply-adds per output position, and how to get there."""

    note: str
    macs: float
    build: Callable[[], ir.Node | None]


def carried_out(plans: list[Plan], now: float, nodes: list[ir.Node]) -> Site | str:
    """Carry out the cheapest plan, or return that it costs more than the nodes do."""
    plan = min(plans, key=lambda plan: plan.macs)
    told = f"{plan.macs:.6g} multiply-adds per output position in place of {now:.6g}"
    if plan.macs > now:
        return f"{plan.note}, it would take {told}"
    names = tuple(str(node.name) for node in nodes)
    end = plan.build()
    return _INFINITE if end is None else Site(names, f"{plan.note}: {told}", output=str(end.outputs[0].name))


def refusal(nodes: list[ir.Node], view: View) -> str:
    """Return why the step's options or stored weights keep the pass away from nodes, or nothing."""
    for node in nodes:
        if excluded := view.excluded(node):
            return f"`{node.name}` is {excluded.reason}"
    weighted = [node for node in nodes if node.op_type in graph.LINEAR]
    for node in weighted:
        if reason := graph.weight_refusal(node.inputs[1]):
            return f"`{node.name}`: {reason}"
    return "their weights have different types" if len({kernels.weight_dtype(node) for node in weighted}) > 1 else ""


def is_standard(node: ir.Node | None) -> bool:
    """Return whether a value's producer is a node of the default domain."""
    return node is not None and node.domain in ("", "ai.onnx")


def _dims(value: ir.Value | None, view: View) -> tuple[Dim, ...] | None:
    return None if value is None else view.ask(shapes).get(str(value.name), UNKNOWN).shape


# ---------------------------------------------------------------------------------------------- behind each other


def behind(second: ir.Node, view: View) -> Site | str:
    """Merge a Conv or pooling with the Conv that it reads, or swap them; return why not, if there is a reason."""
    value = second.inputs[0]
    first = value.producer() if value is not None else None
    if value is None or first is None or not is_standard(first):
        return ""
    if first.op_type != "Conv" or second.op_type not in ("Conv", *POOLS):
        return ""
    if graph.only_use(value) is not second:
        return f"the output of `{first.name}` is read elsewhere"
    if reason := refusal([first, second], view):
        return reason
    kernel = kernels.convolution(first, _dims(first.inputs[0], view))
    if isinstance(kernel, str):
        return kernel
    if second.op_type == "Conv":
        return _before_conv(first, second, kernel, view)
    return _pooled(first, second, kernel, view)


def _before_conv(first: ir.Node, second: ir.Node, kernel: Kernel, view: View) -> Site | str:
    """Merge Conv - Conv."""
    after = kernels.convolution(second, _dims(second.inputs[0], view))
    if isinstance(after, str):
        return after
    if reason := composition.why_not_cascade(kernel, after):
        return f"it cannot be merged with `{first.name}`: {reason}"
    now = _share(second, math.prod(after.strides), view) * kernel.W.size + after.W.size
    return carried_out([_merged(first, second, kernel, after)], now, [first, second])


def pool_before(conv: ir.Node, view: View) -> ir.Node | None:
    """Return the AveragePool that only a 1 x 1 convolution with fewer outputs than inputs reads and that may wait."""
    value = conv.inputs[0]
    pool = value.producer() if value is not None and graph.only_use(value) is conv else None
    if pool is None or pool.op_type != "AveragePool" or not is_standard(pool) or conv.op_type != "Conv":
        return None
    kernel = kernels.convolution(conv, _dims(value, view))
    if isinstance(kernel, str) or kernel.outs >= kernel.ins or _step(pool) > 1:
        return None
    return None if _why_no_swap(kernel, conv, pool, _dims(pool.inputs[0], view)) else pool


def _pooled(first: ir.Node, second: ir.Node, kernel: Kernel, view: View) -> Site | str:
    """Merge Conv - AveragePool into a convolution with strides, or pool before a 1 x 1 convolution."""
    plans, reasons, between = [], [], _dims(second.inputs[0], view)
    if second.op_type == "GlobalAveragePool":
        taps = share = _share(second, 4.0, view)  # of unknown maps: at least 2 x 2
    else:
        taps, share = math.prod(graph.attribute(second, "kernel_shape")), _share(second, _step(second), view)
        after = kernels.pooling(second, kernel.outs, between)
        reason = after if isinstance(after, str) else composition.why_not_cascade(kernel, after)
        if isinstance(after, Kernel) and not reason:
            plans.append(_merged(first, second, kernel, after))
        reasons.append(reason)
    reason = _why_no_swap(kernel, first, second, between)
    if not reason:
        macs = kernel.W.size + taps * kernel.ins
        plans.append(Plan(f"pooled by `{second.name}` before", macs, lambda: _pool_sooner(first, second)))
    if not plans:
        return f"it cannot be merged with `{first.name}`: {'; '.join(filter(None, [*reasons, reason]))}"
    return carried_out(plans, share * kernel.W.size + taps * kernel.outs, [first, second])


def _share(node: ir.Node, otherwise: float, view: View) -> float:
    """Return how many positions a node reads for each that it gives, or `otherwise` where sizes are not known."""
    sizes = [view.ask(shapes).get(str(v.name), UNKNOWN).static for v in (node.inputs[0], node.outputs[0]) if v]
    if len(sizes) < 2 or sizes[0] is None or not sizes[1] or not math.prod(sizes[1][2:]):
        return otherwise
    return math.prod(sizes[0][2:]) / math.prod(sizes[1][2:])


def _step(node: ir.Node) -> float:
    return float(math.prod(graph.attribute(node, "strides", [1])))


def _why_no_swap(kernel: Kernel, conv: ir.Node, pool: ir.Node, known: tuple[Dim, ...] | None) -> str:
    """Return why a convolution and a pooling may not change places; `known`: what the pooling reads."""
    if not kernel.is_point:
        return f"`{conv.name}` is no 1 x 1 convolution of stride 1 without pads"
    if not kernel.b.any() or pool.op_type == "GlobalAveragePool" or not graph.attribute(pool, "count_include_pad", 0):
        return ""
    found = kernels.pooling(pool, 1, known)
    if isinstance(found, Kernel) and not found.is_padded:
        return ""
    return f"`{pool.name}` counts its padding, where the bias of `{conv.name}` would not be"


def _merged(first: ir.Node, second: ir.Node, one: Kernel, other: Kernel) -> Plan:
    def build() -> ir.Node | None:
        if not kernels.store(first, composition.cascade(one, other), kernels.weight_dtype(first)):
            return None
        graph.absorb(second, first.outputs[0])
        return first

    return Plan(f"merged with `{first.name}`", composition.cascade_macs(one, other), build)


def _pool_sooner(conv: ir.Node, pool: ir.Node) -> ir.Node:
    """Let conv - pool become pool - conv."""
    twin = _twin(pool, [conv.inputs[0]], conv)
    conv.replace_input_with(0, twin.outputs[0])
    graph.absorb(pool, conv.outputs[0])
    twin.name = pool.name
    return conv


def conv_sooner(pool: ir.Node, conv: ir.Node) -> ir.Node:
    """Let pool - conv become conv - pool."""
    twin = _twin(conv, [pool.inputs[0], *conv.inputs[1:]], pool)
    pool.replace_input_with(0, twin.outputs[0])
    graph.absorb(conv, pool.outputs[0])
    twin.name = conv.name
    return pool


def _twin(node: ir.Node, inputs: list[ir.Value | None], before: ir.Node) -> ir.Node:
    """Insert a node like `node` that reads other values; it may take over the name once `node` is gone."""
    twin = graph.add_node(node.op_type, inputs, before=before, base=str(node.name))
    twin.attributes.update(node.attributes)
    return twin


# ---------------------------------------------------------------------------------------------- beside each other


@dataclass(frozen=True)
class _Branch:
    """One operand of a sum: a convolution, a BatchNormalization or (node None) the value itself."""

    node: ir.Node | None
    source: ir.Value

    def kernel(self, like: Kernel, view: View) -> Kernel | str:
        """Return the branch as a kernel with as many axes as `like`."""
        if self.node is None:
            return composition.identity(like.ins, len(like.taps))
        if self.node.op_type == "Conv":
            return kernels.convolution(self.node, _dims(self.source, view))
        return kernels.normalisation(self.node, len(like.taps))


def summed(node: ir.Node, view: View) -> Site | str:
    """Merge two operands of a sum that read one value, one of them a Conv; return why not, if there is a reason."""
    branches = [_branch(value, node) for value in node.inputs]
    reasons = []
    for i, one in enumerate(branches):
        for j, other in enumerate(branches):
            if one is None or other is None or one.node is None or one.node.op_type != "Conv" or i == j:
                continue
            if one.source is not other.source or (other.node is not None and other.node.op_type == "Conv" and j < i):
                continue
            found = _beside(node, one.node, (j, other), view)
            if isinstance(found, Site):
                return found
            reasons.append(found)
    return "; ".join(dict.fromkeys(reasons))


def _branch(value: ir.Value | None, reader: ir.Node) -> _Branch | None:
    if value is None:
        return None
    node = value.producer()
    if node is None or not is_standard(node) or graph.only_use(value) is not reader or node.inputs[0] is None:
        return _Branch(None, value)
    return _Branch(node, node.inputs[0]) if node.op_type in ("Conv", "BatchNormalization") else _Branch(None, value)


def _beside(node: ir.Node, conv: ir.Node, second: tuple[int, _Branch], view: View) -> Site | str:
    (j, other) = second
    nodes = [conv, node] if other.node is None else [conv, other.node, node]
    if reason := refusal(nodes, view):
        return reason
    one = kernels.convolution(conv, _dims(conv.inputs[0], view))
    beside = one if isinstance(one, str) else other.kernel(one, view)
    if isinstance(one, str) or isinstance(beside, str):
        return str(one if isinstance(one, str) else beside)
    if reason := composition.why_not_beside(one, beside):
        what = f"`{other.source.name}`" if other.node is None else f"`{other.node.name}`"
        return f"`{conv.name}` and {what} cannot be one convolution: {reason}"
    now = one.W.size + one.outs + (0 if other.node is None else beside.W.size)

    def build() -> ir.Node | None:
        if not kernels.store(conv, composition.beside(one, beside), kernels.weight_dtype(conv)):
            return None
        if len(node.inputs) == 2:
            graph.absorb(node, conv.outputs[0])
            return conv
        rest = [value for at, value in enumerate(node.inputs) if at != j]
        for at, value in enumerate(rest):
            node.replace_input_with(at, value)
        node.resize_inputs(len(rest))
        return node

    return carried_out([Plan(f"summed in `{conv.name}`", composition.beside_macs(one, beside), build)], now, nodes)
