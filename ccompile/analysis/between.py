"""What stands between a layer and its readers: whether it treats channels alike, and lets a positive factor through.

Two channels that go in equal come out equal when every op on the way does to one what it does to the other. When every
op is also positively homogeneous, f(s x) = s f(x) for s > 0, channels that go in as multiples come out as the same
multiples. Both properties survive composition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channels import Group, Member
from ccompile.core import Array

# ops that treat channels alike; what they read besides is common to all channels, or a `through` member of the group
_ALIKE = """
    Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
    CastLike Ceil Celu Clip Concat Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish InstanceNormalization IsInf IsNaN Less LessOrEqual Log Max Mean Min Mish Mod Mul Not Or Pad Pow
    QuantizeLinear DequantizeLinear Reciprocal ReduceLogSum ReduceLogSumExp ReduceProd ReduceSumSquare Round Selu Shrink
    Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu Where Xor
"""
# ops of these that are positively homogeneous whatever their options
_HOMOGENEOUS = """
    Abs AveragePool Flatten GlobalAveragePool GlobalLpPool GlobalMaxPool Identity LeakyRelu LpPool MaxPool Neg PRelu
    ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Shape Squeeze Transpose Unsqueeze
"""


@dataclass(frozen=True, eq=False)
class Between:
    """Units of equal `kind`[size] are treated alike; `unscaled` says what lets no factor through, "" if all does."""

    kind: Array
    unscaled: str


def between(model: ir.Model, group: Group, without: frozenset[Member] = frozenset()) -> Between | str:
    """Return how the ops between a group's producer and its consumers treat its units, or which one is in the way.

    `without`: members whose constants the caller compares itself (an offset that acts as the producer's bias).
    """
    carried = {carrier.value for carrier in group.carriers}
    readers = {member.node for member in group.by_role("consumer")}
    apart = {member.node for member in without}
    unscaled = ""
    for node in model.graph:
        given = [value is not None and str(value.name) in carried for value in node.inputs]
        if not any(given) or node.name in readers:
            continue
        if node.op_type not in _KNOWN or node.domain not in ("", "ai.onnx") or _is_random(node):
            return f"`{node.name}` ({node.op_type}) is not known to treat all its channels alike"
        if not unscaled and node.name not in apart and not _scales(node, given):
            unscaled = f"`{node.name}` ({node.op_type}) lets no factor through"
    kind = _kinds(model, group, without)
    return kind if isinstance(kind, str) else Between(kind, unscaled)


def units(unit: Array, size: int) -> Array | None:
    """Return the positions of each unit, ascending, as [size, positions]; None when units differ in their number.

    >>> units(np.array([1, 0, -1, 1, 0]), 2).tolist()
    [[1, 4], [0, 3]]
    """
    count = np.bincount(unit[unit >= 0], minlength=size)
    if not (count == count[0]).all():
        return None
    return np.argsort(unit, kind="stable")[(unit < 0).sum() :].reshape(size, -1)


def _kinds(model: ir.Model, group: Group, without: frozenset[Member]) -> Array | str:
    """Number the units so that equal numbers mean equal constants in every `through` member."""
    nodes = {str(node.name): node for node in model.graph}
    kind: Array = np.zeros(group.size, np.int64)
    for member in group.by_role("through"):
        if member in without:
            continue
        node, found = nodes[member.node], units(member.unit, group.size)
        array = graph.constant(node.inputs[member.input])
        if array is None or found is None:
            return f"`{node.name}` ({node.op_type}) treats its units differently"
        rows = np.moveaxis(array, member.axis, 0)[found].reshape(group.size, -1).astype(np.float64)
        table = np.column_stack([kind, rows])
        kind = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
        if kind.max() == group.size - 1:
            return f"`{node.name}` ({node.op_type}) has other constants for every unit"
    return kind


def _is_random(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        return bool(graph.attribute(node, "training_mode", 0))
    if node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    training = graph.constant(node.inputs[2])
    return training is None or bool(training.any())


def _scales(node: ir.Node, given: list[bool]) -> bool:
    """Return whether f(s x) = s f(x), x being the operands that are `given` channels of the group."""
    rule = _SCALES.get(node.op_type)
    return node.op_type in _HOMOGENEOUS.split() if rule is None else rule(node, given)


def _is_zero(value: ir.Value | None) -> bool:
    array = graph.constant(value)
    return array is not None and array.dtype.kind not in "OSU" and not array.any()


def _others_are_zero(node: ir.Node, given: list[bool]) -> bool:
    return all(mine or _is_zero(value) for mine, value in zip(given, node.inputs, strict=True))


def _clips_at_zero(node: ir.Node, given: list[bool]) -> bool:
    """Return whether each bound is 0, absent or infinite."""
    bounds = [graph.constant(value) for value in node.inputs[1:] if value is not None]
    if any(bound is None for bound in bounds):
        return False
    limits = [float(b.reshape(-1)[0]) for b in bounds if b is not None]
    limits += [graph.attribute(node, name) for name in ("min", "max") if name in node.attributes]
    return all(limit == 0 or np.isinf(limit) for limit in limits)


def _pads_with_zero(node: ir.Node, given: list[bool]) -> bool:
    if graph.attribute(node, "mode", "constant") != "constant":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return graph.attribute(node, "value", 0) == 0 if value is None else _is_zero(value)


# op -> whether this node of it is positively homogeneous in its `given` operands
_SCALES: dict[str, Callable[[ir.Node, list[bool]], bool]] = {
    **dict.fromkeys("Add Max Mean Min Sub Sum".split(), _others_are_zero),
    "Clip": _clips_at_zero,
    "Concat": lambda node, given: not any(graph.is_constant(value) for value in node.inputs),
    "Div": lambda node, given: given == [True, False],
    "Dropout": lambda node, given: True,
    "Mul": lambda node, given: sum(given) == 1,
    "Pad": _pads_with_zero,
    "PRelu": lambda node, given: given == [True, False],
}
_KNOWN = frozenset(_ALIKE.split()) | frozenset(_HOMOGENEOUS.split())
