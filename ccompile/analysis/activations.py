"""Activations that are written out in simpler ops, recognised by what they compute of one value x.

name          function                                   written as (any order; factors, sums and quotients of scalars)
HardSigmoid   min(max(alpha x + beta, 0), 1)             Clip, or Min, Max, Relu, between scalings
HardSwish     x HardSigmoid(x), alpha 1/6, beta 1/2      a product
Gelu          x (1 + erf(x / sqrt 2)) / 2                a product
Gelu, tanh    x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
Mish          x tanh(log(1 + exp x))                     a product, with Softplus, or the op
LeakyRelu     x, or alpha x where x < 0                  Max, Where
Clip          min(max(x, low), high)                     Min, Max
Sigmoid       1 / (1 + exp(-x))                          Div or Reciprocal
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.expressions import TIGHT, Reader, near, scalar


@dataclass(frozen=True)
class Activation:
    """A function of x by its name above, with its parameters, and the nodes that compute it."""

    name: str
    x: ir.Value
    parameters: dict[str, float]
    nodes: tuple[ir.Node, ...]

    @property
    def rank(self) -> int:
        """Return the rank that x must have for its constants not to add axes."""
        shapes = (graph.static_shape(value) for node in self.nodes for value in node.inputs if graph.is_constant(value))
        return max((len(shape) for shape in shapes if shape is not None), default=0)


def recognise(node: ir.Node) -> Activation | None:
    """Return the activation whose last node this is, written out, or None."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    for rule in _RULES.get(node.op_type, ()):
        if (found := rule(node)) is not None and (len(found.nodes) > 1 or node.op_type == "Mish"):
            return found
    return None


def _activation(name: str, read: Reader, last: ir.Node, **parameters: float) -> Activation:
    nodes = tuple(other for other in dict.fromkeys([last, *read.seen]))
    return Activation(name, read.x, parameters, nodes)


def _hard_sigmoid(node: ir.Node) -> Activation | None:
    found = []
    for x in _sources(node):
        read = Reader(x)
        if (line := _gate_clip(read, node.outputs[0], 1.0)) is not None:
            found.append(_activation("HardSigmoid", read, node, alpha=line[0], beta=line[1]))
    return max(found, key=lambda one: len(one.nodes), default=None)  # the farthest x


def _gate_clip(read: Reader, value: ir.Value, factor: float) -> tuple[float, float] | None:
    """Return alpha and beta where `factor` times a value is min(max(alpha x + beta, 0), 1)."""
    outer = read.peeled(value)
    inside = read.clipped(outer[2]) if outer is not None else None
    if outer is None or inside is None:
        return None
    a, c = factor * outer[0], factor * outer[1]
    line = read.powers(inside[2])
    if line is None or 1 not in line or set(line) - {0, 1} or a <= 0:
        return None
    ends = a * inside[0] + c, a * inside[1] + c
    if not (near(ends[0], 0.0, TIGHT) and near(ends[1], 1.0, TIGHT)):
        return None
    return a * line[1], a * line.get(0, 0.0) + c


def _sources(node: ir.Node, depth: int = 8) -> Iterator[ir.Value]:
    """Yield the values that a node may be a function of: those behind it, nearest first."""
    edge, seen = [node], {node.outputs[0]}
    for _ in range(depth):
        values = [v for other in edge for v in other.inputs if v is not None and not graph.is_constant(v)]
        fresh = [value for value in dict.fromkeys(values) if value not in seen]
        seen.update(fresh)
        yield from fresh
        edge = [other for value in fresh if (other := value.producer()) is not None]


def _gated(node: ir.Node) -> Activation | None:
    """Recognise x times a gate of x."""
    factor = 1.0
    factors: list[ir.Value] = []
    inner: list[ir.Node] = []
    open_values: list[ir.Value | None] = [node.outputs[0]]
    while open_values:
        value = open_values.pop()
        maker = value.producer() if value is not None else None
        number = scalar(value)
        if number is not None:
            factor *= number
        elif value is None:
            return None
        elif maker is None or (maker is not node and graph.only_use(maker.outputs[0]) is None):
            factors.append(value)
        elif maker.op_type == "Mul":
            inner.append(maker)
            open_values += maker.inputs
        elif maker.op_type == "Div" and scalar(maker.inputs[1]):
            inner.append(maker)
            factor /= scalar(maker.inputs[1]) or 1.0
            open_values.append(maker.inputs[0])
        else:
            factors.append(value)
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        for rule in (_gelu, _mish, _hard_swish):
            read = Reader(x, dict.fromkeys(inner))
            if (found := rule(read, gate, factor)) is not None:
                return _activation(found[0], read, node, **found[1])
    return None


Found = tuple[str, dict[str, float]]


def _gelu(read: Reader, gate: ir.Value, factor: float) -> Found | None:
    outer = read.peeled(gate)
    if outer is None or not near(outer[0], outer[1], TIGHT) or not near(factor * outer[0], 0.5, TIGHT):
        return None
    node = read.op(outer[2])
    if node is None or node.op_type not in ("Erf", "Tanh"):
        return None
    terms = {power: number for power, number in (read.powers(node.inputs[0]) or {}).items() if number}
    if node.op_type == "Erf":
        return ("Gelu", {}) if set(terms) == {1} and near(terms[1], math.sqrt(0.5), TIGHT) else None
    first = math.sqrt(2 / math.pi)
    fits = set(terms) == {1, 3} and near(terms[1], first) and near(terms[3], 0.044715 * first)
    return ("Gelu, tanh", {}) if fits else None


def _mish(read: Reader, gate: ir.Value, factor: float) -> Found | None:
    node = read.op(gate)
    inner = read.op(node.inputs[0]) if node is not None and node.op_type == "Tanh" and factor == 1 else None
    return ("Mish", {}) if inner is not None and inner.op_type == "Softplus" and inner.inputs[0] is read.x else None


def _mish_itself(node: ir.Node) -> Activation | None:
    return Activation("Mish", node.inputs[0], {}, (node,)) if node.inputs[0] is not None else None


def _hard_swish(read: Reader, gate: ir.Value, factor: float) -> Found | None:
    node = gate.producer()
    if node is not None and node.op_type == "HardSigmoid" and node.inputs[0] is read.x and factor == 1:
        read.op(gate)
        found = graph.attribute(node, "alpha", 0.2), graph.attribute(node, "beta", 0.5)
        if not (near(found[0], 1 / 6, TIGHT) and near(found[1], 0.5, TIGHT)):
            return None  # nothing shorter than what stands there
    else:
        clip = _gate_clip(read, gate, factor)
        if clip is None:
            return None
        found = clip
    return "HardSwish", {"alpha": found[0], "beta": found[1]}


def _clip(node: ir.Node) -> Activation | None:
    read = Reader(ir.Value())  # whatever x is
    found = read.clipped(node.outputs[0])
    if found is None:
        return None
    return Activation("Clip", found[2], {"low": found[0], "high": found[1]}, tuple(read.seen))


def _leaky(node: ir.Node) -> Activation | None:
    if len(node.inputs) != 2:
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        if x is not None:
            read = Reader(x)
            line = read.powers(other)
            if line is not None and set(line) == {1} and 0 <= line[1] <= 1:
                return _activation("LeakyRelu", read, node, alpha=line[1])
    return None


def _leaky_where(node: ir.Node) -> Activation | None:
    test = node.inputs[0].producer() if node.inputs[0] is not None else None
    if test is None or test.op_type not in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return None
    x = test.inputs[0]
    if x is None or scalar(test.inputs[1]) != 0.0:
        return None
    read = Reader(x, {test: None})
    above, below = node.inputs[1:] if test.op_type.startswith("Greater") else node.inputs[:0:-1]
    line = read.powers(below)
    fits = above is x and line is not None and set(line) == {1}
    return _activation("LeakyRelu", read, node, alpha=line[1]) if fits and line is not None else None


def _sigmoid(node: ir.Node) -> Activation | None:
    if node.op_type == "Div" and scalar(node.inputs[0]) != 1.0:
        return None
    under = node.inputs[1 if node.op_type == "Div" else 0]
    for x in _sources(node):
        read = Reader(x)
        found = read.peeled(under)
        power = read.op(found[2]) if found is not None and found[:2] == (1.0, 1.0) else None
        if power is not None and power.op_type == "Exp" and read.powers(power.inputs[0]) == {1: -1.0}:
            return _activation("Sigmoid", read, node)
    return None


_RULES: dict[str, tuple[Callable[[ir.Node], Activation | None], ...]] = {
    "Mul": (_gated, _hard_sigmoid),
    "Div": (_gated, _hard_sigmoid, _sigmoid),
    "Reciprocal": (_sigmoid,),
    "Clip": (_hard_sigmoid, _clip),
    "Relu": (_clip,),
    "Min": (_hard_sigmoid, _clip),
    "Max": (_hard_sigmoid, _clip, _leaky),
    "Add": (_hard_sigmoid,),
    "Where": (_leaky_where,),
    "Mish": (_mish_itself,),
}
