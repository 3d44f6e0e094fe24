"""Fold channel-wise scales and shifts into the linear layer next to them.

z = a * y + c per channel (BatchNormalization: a = gamma / sqrt(var + eps), c = beta - a mean; or Mul, Div, Add, Sub by
a channel constant).  After y = W x + b:  z = (a W) x + (a b + c).  Before y = W z + b:  y = (W a) x + (b + W c), which
needs W to see every z: no padding unless c = 0.

Fires:  after Conv, ConvTranspose, Gemm, BatchNormalization (and MatMul when c = 0); before Conv, Gemm (and when c = 0
        ConvTranspose, MatMul); constants plain and, for the weight, read once; the value between read once.
Error:  float rounding: computed in float64, stored in the weight's type.
Cost:   one node, its constants and one pass over the activation less per fold.
Source: Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.shapes import UNKNOWN, Dim, shapes
from ccompile.core import Array, Kind, PassResult, Rewrite, Site, Skip, View

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")
_AFTER = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
_BEFORE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class FoldBatchnorm(Rewrite):
    """Options of fold-batchnorm: those that every step takes."""

    kind: ClassVar[Kind] = "exact"

    def run(self, view: View) -> PassResult:
        """Fold until nothing folds; each BatchNormalization that stays is a Skip."""
        applied: list[Site] = []
        while True:
            skipped: list[Skip] = []
            before = len(applied)
            for node in view.graph:
                if node.op_type != "BatchNormalization" and node.op_type not in _ARITHMETIC:
                    continue
                outcome = view.excluded(node) or _fold(node, view)
                if isinstance(outcome, Site):
                    applied.append(outcome)
                elif node.op_type == "BatchNormalization" or outcome.reason:
                    skipped.append(outcome)
            if len(applied) == before:
                graph.remove_dead(view.graph)
                view.changed()
                return PassResult(tuple(applied), tuple(skipped))


@dataclass(frozen=True)
class _Affine:
    """z = scale * x + shift; both scalars or [channels], in float64.

    `shape` is the constant's, broadcast from the back; None for BatchNormalization, whose channels are axis 1.
    """

    x: ir.Value
    scale: Array
    shift: Array
    shape: tuple[int, ...] | None

    def misfit(self, dims: tuple[Dim, ...] | None, axis: int, channels: int) -> str:
        """Return why this does not run along `axis` of a value of that shape, or nothing."""
        if dims is None:
            return "the rank of the value is unknown"
        rank = len(dims)
        if self.shape is not None and len(self.shape) > rank:
            return "its constant enlarges the value"
        if self.scale.ndim == 0:
            return ""
        position = 1
        if self.shape is not None:
            position = rank - len(self.shape) + max(range(len(self.shape)), key=self.shape.__getitem__)
        if position != axis % rank or self.scale.size != channels:
            return "its constant does not run along the channels"
        return ""


def _fold(node: ir.Node, view: View) -> Site | Skip:
    name = str(node.name)
    if node.domain not in ("", "ai.onnx"):
        return Skip(name, "")
    affine = _batchnorm(node) if node.op_type == "BatchNormalization" else _arithmetic(node)
    if isinstance(affine, str):
        return Skip(name, affine)
    known = view.ask(shapes).get(str(affine.x.name), UNKNOWN).shape
    producer, consumer = affine.x.producer(), graph.only_use(node.outputs[0])
    reasons = []
    for linear, ops, fold in ((producer, _AFTER, _fold_after), (consumer, _BEFORE, _fold_before)):
        if linear is None or linear.op_type not in ops or linear.domain not in ("", "ai.onnx"):
            continue
        if any(selector.matches(view.facts(linear)) for selector in view.options.skip):
            reasons.append(f"`{linear.name}` is named by `skip`")
            continue
        if not (reason := fold(linear, node, affine, known)):
            note = f"{node.op_type} `{name}` folded in"
            return Site((str(linear.name),), note, output=str(linear.outputs[0].name))
        reasons.append(reason)
    return Skip(name, "; ".join(reasons) or ("" if node.op_type in _ARITHMETIC else "no linear layer next to it"))


def _batchnorm(node: ir.Node) -> _Affine | str:
    if graph.attribute(node, "training_mode", 0):
        return "it is in training mode"
    if not graph.attribute(node, "spatial", 1):
        return "it normalises every position apart (spatial = 0)"
    if any(list(output.uses()) or output.is_graph_output() for output in node.outputs[1:]):
        return "its statistics are read"
    arrays = [graph.constant(value) for value in node.inputs[1:5]]
    if any(array is None for array in arrays) or node.inputs[0] is None:
        return "its parameters are not constant"
    gamma, beta, mean, var = (np.asarray(array, np.float64) for array in arrays)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite is refused where it is stored
        scale = gamma / np.sqrt(var + graph.attribute(node, "epsilon", 1e-5))
    return _Affine(node.inputs[0], scale, beta - scale * mean, None)


def _arithmetic(node: ir.Node) -> _Affine | str:
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None or graph.is_constant(left) == graph.is_constant(right):
        return ""
    x, constant, swapped = (right, left, True) if graph.is_constant(left) else (left, right, False)
    shape = graph.static_shape(constant)
    if shape is None or math.prod(shape) != max(shape, default=1):
        return ""
    k = graph.constant(constant)
    if k is None or k.dtype.kind != "f" or (swapped and node.op_type == "Div") or not graph.is_finite(k):
        return ""
    if node.op_type == "Div" and not k.all():
        return ""
    value = k.astype(np.float64).reshape(-1 if k.size > 1 else ())
    one, zero = np.ones_like(value), np.zeros_like(value)
    if node.op_type in ("Mul", "Div"):
        return _Affine(x, value if node.op_type == "Mul" else one / value, zero, shape)
    if node.op_type == "Sub":
        return _Affine(x, -one, value, shape) if swapped else _Affine(x, one, -value, shape)
    return _Affine(x, one, value, shape)


def _channel_axis(linear: ir.Node) -> int:
    """Return the channel axis of a layer's data and result: the second of convolutions, the last of products."""
    return -1 if linear.op_type in ("Gemm", "MatMul") else 1


def _wide(linear: ir.Node) -> bool:
    """Return whether Gemm's weight is stored [out, in]."""
    return bool(graph.attribute(linear, "transB", 0))


def _fold_after(linear: ir.Node, node: ir.Node, affine: _Affine, known: tuple[Dim, ...] | None) -> str:
    if graph.only_use(affine.x) is not node:
        return f"the output of `{linear.name}` is read elsewhere"
    if linear.op_type == "BatchNormalization":
        return _merge_batchnorm(linear, node, affine, known)
    if reason := _weight_reason(linear):
        return reason
    W, bias = graph.constant(linear.inputs[1]), _bias(linear)
    if W is None or isinstance(bias, str):
        return bias if isinstance(bias, str) else "its weight is not constant"
    groups = graph.attribute(linear, "group", 1)
    channels = _out_channels(linear, W.shape, groups)
    if reason := affine.misfit(known, _channel_axis(linear), channels):
        return reason
    if linear.op_type == "MatMul" and (affine.shift.any() or W.ndim != 2):
        return "a MatMul has no bias to hold a shift" if W.ndim == 2 else "its weight is not a matrix"
    scale = np.broadcast_to(affine.scale, channels)
    new_bias = scale * bias + affine.shift if bias.any() or affine.shift.any() else None
    if not _store(linear, _scale_out(linear, W, scale, groups), new_bias, W.dtype):
        return "the folded weight would not be finite"
    graph.absorb(node, linear.outputs[0])
    return ""


def _merge_batchnorm(norm: ir.Node, node: ir.Node, affine: _Affine, known: tuple[Dim, ...] | None) -> str:
    inner = _batchnorm(norm)
    if isinstance(inner, str):
        return f"`{norm.name}` cannot take it: {inner}"
    gamma, beta = graph.constant(norm.inputs[1]), graph.constant(norm.inputs[2])
    assert gamma is not None
    assert beta is not None
    if reason := affine.misfit(known, 1, gamma.size):
        return reason
    arrays = (gamma.astype(np.float64) * affine.scale, beta.astype(np.float64) * affine.scale + affine.shift)
    with np.errstate(over="ignore"):
        stored = [array.astype(gamma.dtype) for array in arrays]
    if not all(graph.is_finite(array) for array in stored):
        return "the folded parameters would not be finite"
    for index, array in zip((1, 2), stored, strict=True):
        graph.replace_constant(norm, index, array)
    graph.absorb(node, norm.outputs[0])
    return ""


def _fold_before(linear: ir.Node, node: ir.Node, affine: _Affine, known: tuple[Dim, ...] | None) -> str:
    if linear.inputs[0] is not node.outputs[0]:
        return f"`{linear.name}` reads it as a weight"
    if reason := _weight_reason(linear):
        return reason
    W, bias = graph.constant(linear.inputs[1]), _bias(linear)
    if W is None or isinstance(bias, str):
        return bias if isinstance(bias, str) else "its weight is not constant"
    groups = graph.attribute(linear, "group", 1)
    channels = _in_channels(linear, W.shape, groups)
    if reason := affine.misfit(known, _channel_axis(linear), channels):
        return reason
    if affine.shape is not None and affine.scale.ndim and known and known[_channel_axis(linear)] != channels:
        return "its constant may enlarge the value"
    if linear.op_type == "MatMul" and W.ndim != 2:
        return "its weight is not a matrix"
    if affine.shift.any() and (linear.op_type in ("MatMul", "ConvTranspose") or _pads(linear)):
        why = "it pads with zeros" if linear.op_type == "Conv" else "its borders or its missing bias forbid it"
        return f"`{linear.name}` cannot take a shift before it: {why}"
    scale, shift = (np.broadcast_to(array, channels) for array in (affine.scale, affine.shift))
    new_bias = bias + _respond(linear, W, shift, groups) if shift.any() else None
    if not _store(linear, _scale_in(linear, W, scale, groups), new_bias, W.dtype):
        return "the folded weight would not be finite"
    graph.bypass(node, affine.x)
    return ""


def _weight_reason(linear: ir.Node) -> str:
    if linear.op_type == "Gemm" and graph.attribute(linear, "transA", 0):
        return f"`{linear.name}` transposes its input"
    reason = graph.weight_refusal(linear.inputs[1])
    return f"`{linear.name}`: {reason}" if reason else ""


def _bias(linear: ir.Node) -> Array | str:
    """Return the bias in float64, scalar zero without one, or why it cannot be used."""
    if linear.op_type == "MatMul" or len(linear.inputs) < 3 or linear.inputs[2] is None:
        return np.zeros(())
    bias = graph.constant(linear.inputs[2])
    if bias is None:
        return f"`{linear.name}`: its bias is not constant"
    if linear.op_type != "Gemm":
        return bias.astype(np.float64)
    if bias.ndim == 2 and bias.shape[0] != 1:
        return f"`{linear.name}`: its bias differs from row to row"
    beta: float = graph.attribute(linear, "beta", 1.0)
    return bias.astype(np.float64).reshape(-1 if bias.size > 1 else ()) * beta


def _out_channels(linear: ir.Node, shape: tuple[int, ...], groups: int) -> int:
    if linear.op_type == "ConvTranspose":
        return shape[1] * groups
    if linear.op_type == "Gemm":
        return shape[0] if _wide(linear) else shape[1]
    return shape[0] if linear.op_type == "Conv" else shape[-1]


def _in_channels(linear: ir.Node, shape: tuple[int, ...], groups: int) -> int:
    if linear.op_type == "Conv":
        return shape[1] * groups
    if linear.op_type == "Gemm":
        return shape[1] if _wide(linear) else shape[0]
    return shape[0]


def _scale_out(linear: ir.Node, W: Array, scale: Array, groups: int) -> Array:
    W = W.astype(np.float64)
    if linear.op_type == "ConvTranspose":  # W[i, o / groups, ...]: the rows of group g feed its own o / groups outputs
        per = scale.reshape(groups, 1, W.shape[1], *(1,) * (W.ndim - 2))
        return (W.reshape(groups, -1, *W.shape[1:]) * per).reshape(W.shape)
    if linear.op_type == "Conv" or _wide(linear):
        return W * scale.reshape(-1, *(1,) * (W.ndim - 1))
    return W * scale


def _scale_in(linear: ir.Node, W: Array, scale: Array, groups: int) -> Array:
    W = W.astype(np.float64)
    if linear.op_type == "Conv":  # W[o, i / groups, ...]: the rows of group g read its own i / groups inputs
        per = scale.reshape(groups, 1, W.shape[1], *(1,) * (W.ndim - 2))
        return (W.reshape(groups, -1, *W.shape[1:]) * per).reshape(W.shape)
    if linear.op_type == "ConvTranspose":
        return W * scale.reshape(-1, *(1,) * (W.ndim - 1))
    if _wide(linear):
        return W * scale
    return W * scale[:, None]


def _respond(linear: ir.Node, W: Array, shift: Array, groups: int) -> Array:
    """Return the layer's response, without bias, to the constant input `shift`[channels]."""
    W = W.astype(np.float64)
    if linear.op_type == "Conv":
        per = W.reshape(groups, -1, W.shape[1], math.prod(W.shape[2:])).sum(-1)
        flat: Array = np.einsum("goi,gi->go", per, shift.reshape(groups, -1)).reshape(-1)
        return flat
    alpha: float = graph.attribute(linear, "alpha", 1.0)
    return (W @ shift if _wide(linear) else shift @ W) * alpha


def _pads(linear: ir.Node) -> bool:
    auto = graph.attribute(linear, "auto_pad", "NOTSET")
    return auto in ("SAME_UPPER", "SAME_LOWER") or (auto == "NOTSET" and any(graph.attribute(linear, "pads", [])))


def _store(linear: ir.Node, W: Array, bias: Array | None, dtype: np.dtype[np.generic]) -> bool:
    """Give the layer its new weight and bias; False, and nothing changed, when they would overflow."""
    with np.errstate(over="ignore"):
        weight = W.astype(dtype)
        shift = None if bias is None else bias.astype(dtype)
    if not graph.is_finite(weight) or (shift is not None and not graph.is_finite(shift)):
        return False
    graph.replace_constant(linear, 1, weight)
    if shift is not None:
        channels = _out_channels(linear, weight.shape, graph.attribute(linear, "group", 1))
        graph.replace_constant(linear, 2, np.broadcast_to(shift, channels))
        linear.attributes.pop("beta", None)
    return True
