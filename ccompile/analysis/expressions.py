"""Expressions of one value x in simple ops, read backwards: polynomials, lines, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from ccompile import graph

Powers = dict[int, float]  # power of x -> its factor
RELATIVE = 1e-3  # how far constants may be from those of the definition: exporters round them
TIGHT = 1e-5


@dataclass
class Reader:
    """Reads expressions of x and remembers the nodes that it went through."""

    x: ir.Value
    seen: dict[ir.Node, None] = field(default_factory=dict)

    def op(self, value: ir.Value | None) -> ir.Node | None:
        """Return what makes a value, where that is a standard op behind x."""
        node = value.producer() if value is not None and value is not self.x else None
        if node is None or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
            return None
        self.seen[node] = None
        return node

    def powers(self, value: ir.Value | None) -> Powers | None:
        """Return the polynomial of x that a value is, or None."""
        if value is None:
            return None
        if value is self.x:
            return {1: 1.0}
        if (number := scalar(value)) is not None:
            return {0: number}
        node = self.op(value)
        if node is None:
            return None
        if node.op_type == "Pow":
            base, power = self.powers(node.inputs[0]), scalar(node.inputs[1])
            return _power(base, round(power)) if base and power in (2.0, 3.0) else None
        if node.op_type == "Neg":
            return _times(self.powers(node.inputs[0]), {0: -1.0})
        if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
            return None
        one, other = self.powers(node.inputs[0]), self.powers(node.inputs[1])
        if node.op_type in ("Add", "Sub"):
            return _plus(one, _times(other, {0: 1.0 if node.op_type == "Add" else -1.0}))
        if node.op_type == "Div":
            other = {0: 1 / other[0]} if other is not None and set(other) == {0} and other[0] else None
        return _times(one, other)

    def peeled(self, value: ir.Value | None) -> tuple[float, float, ir.Value] | None:
        """Return (a, c, inner) with value = a inner + c, as much peeled off as can be."""
        if value is None or value is self.x:
            return None if value is None else (1.0, 0.0, value)
        node = value.producer()
        if node is None or node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
            return 1.0, 0.0, value
        numbers = [scalar(operand) for operand in node.inputs]
        if (numbers[0] is None) == (numbers[1] is None):
            return 1.0, 0.0, value
        at = 0 if numbers[0] is None else 1
        number, below = numbers[1 - at], self.peeled(node.inputs[at])
        if below is None or number is None or (node.op_type == "Div" and (at == 1 or not number)):
            return 1.0, 0.0, value
        self.op(value)
        a, c, inner = below
        if node.op_type in ("Mul", "Div"):
            factor = number if node.op_type == "Mul" else 1 / number
            return a * factor, c * factor, inner
        if node.op_type == "Add":
            return a, c + number, inner
        return (a, c - number, inner) if at == 0 else (-a, number - c, inner)

    def clipped(self, value: ir.Value | None) -> tuple[float, float, ir.Value] | None:
        """Return (low, high, inner) where value is inner between bounds."""
        low, high = -math.inf, math.inf
        found = False
        while value is not None and value is not self.x and (bounds := _bounds(value)) is not None:
            self.op(value)
            below, above, value = bounds
            low, high, found = max(low, below) if high > below else high, min(high, above), True
        return (low, high, value) if found and value is not None and low < high else None


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element, of whatever rank, as a number."""
    array = graph.constant(value) if value is not None and graph.is_constant(value) else None
    if array is None or array.size != 1 or array.dtype.kind not in "fi":
        return None
    return float(array.reshape(()))


def _plus(one: Powers | None, other: Powers | None) -> Powers | None:
    if one is None or other is None:
        return None
    return {power: one.get(power, 0.0) + other.get(power, 0.0) for power in {*one, *other}}


def _times(one: Powers | None, other: Powers | None) -> Powers | None:
    if one is None or other is None:
        return None
    found: Powers = {}
    for p, a in one.items():
        for q, b in other.items():
            found[p + q] = found.get(p + q, 0.0) + a * b
    return found


def _power(base: Powers, power: int) -> Powers | None:
    found: Powers | None = {0: 1.0}
    for _ in range(power):
        found = _times(found, base)
    return found


def _bounds(value: ir.Value) -> tuple[float, float, ir.Value] | None:
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf, node.inputs[0]
    if node.op_type == "Clip":
        given = [graph.attribute(node, "min"), graph.attribute(node, "max")]
        for at, operand in enumerate(node.inputs[1:3]):
            if operand is not None and (number := scalar(operand)) is None:
                return None
            given[at] = number if operand is not None else None
        low, high = given
        return -math.inf if low is None else low, math.inf if high is None else high, node.inputs[0]
    if node.op_type not in ("Min", "Max") or len(node.inputs) != 2:
        return None
    for operand, other in (node.inputs, node.inputs[::-1]):
        if other is not None and operand is not None and (number := scalar(operand)) is not None:
            return (-math.inf, number, other) if node.op_type == "Min" else (number, math.inf, other)
    return None


def near(found: float, wanted: float, share: float = RELATIVE) -> bool:
    """Return whether a constant is what a definition has."""
    return abs(found - wanted) <= share * max(abs(wanted), 1e-3)
