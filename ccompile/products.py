"""Convolutions of one tap on maps of one position, as in squeeze-and-excitation, as products with a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import onnx_ir as ir

from ccompile import graph, turning
from ccompile.analysis import kernels
from ccompile.analysis.kernels import Dims
from ccompile.core import Skip
from ccompile.lowering import Formulation
from ccompile.numerics.composition import Kernel

_OPSET = 11  # Gemm's bias may be left out


def is_point(weight: tuple[int, ...] | None, known: Dims) -> bool:
    """Return whether a weight of this shape has one tap and the maps of its input one position."""
    return weight is not None and known is not None and math.prod(weight[2:]) == 1 and set(known[2:]) == {1}


def of_point(node: ir.Node, known: Dims, opset: int) -> Sequence[Formulation] | Skip:
    """Return a Conv that `is_point` as a Gemm."""
    kernel = kernels.convolution(node, known)
    name = str(node.name)
    if isinstance(kernel, str):
        return Skip(name, kernel)
    if kernel.groups > 1 or kernel.is_padded:
        return Skip(name, "on maps of one position, it has groups or pads")
    if reason := graph.weight_refusal(node.inputs[1]):
        return Skip(name, reason)
    if opset < _OPSET:
        return Skip(name, f"opset {opset} has no Gemm without a bias")
    names = tuple(str(other.name) for other in turning.followers(node))
    return [Formulation("Gemm", 0.0, partial(_as_gemm, kernel), names)]


def _as_gemm(kernel: Kernel, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Let a Gemm, and what follows, compute [n, o] in place of [n, o, 1, 1]."""
    source, followers, name = node.inputs[0], turning.followers(node), str(node.name)
    assert source is not None
    flat, made = _flat(source), []
    if flat is None:
        made.append(graph.add_node("Flatten", [source], {"axis": 1}, before=node, base=f"{name}_flat"))
        flat = made[0].outputs[0]
    dtype = kernels.weight_dtype(node)
    W = graph.add_constant(main, f"{name}_matrix", kernel.W.reshape(kernel.outs, -1).astype(dtype))
    gemm = graph.add_node("Gemm", [flat, W, *node.inputs[2:3]], {"transB": 1}, before=node, base=f"{name}_gemm")
    graph.replace_node(node, gemm)
    chain = [gemm, *followers]
    return [*made, *chain, turning.turned_back(chain, _back(len(kernel.taps)), name)]


def _back(axes: int) -> list[int]:
    return [0, -1, *(1 for _ in range(axes))]


def _flat(value: ir.Value) -> ir.Value | None:
    """Return the [n, c] that `value` was made of by a Reshape behind a Gemm."""
    node = value.producer()
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    wanted, before = graph.constant(node.inputs[1]), node.inputs[0].producer()
    if wanted is None or len(wanted) < 3 or wanted.tolist() != _back(len(wanted) - 2):
        return None
    while before is not None and before.op_type in turning.ELEMENTWISE and before.inputs[0] is not None:
        before = before.inputs[0].producer()
    is_gemm = before is not None and before.op_type == "Gemm" and before.domain in ("", "ai.onnx")
    return node.inputs[0] if is_gemm else None
