"""Where one matrix product can stand for two that follow each other."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import kernels, linear
from ccompile.core import Array, Site, View
from ccompile.merging import Plan, carried_out, is_standard, refusal
from ccompile.moments import Layer

PRODUCTS = ("Gemm", "MatMul")


def multiplied(second: ir.Node, view: View) -> Site | str:
    """Merge a Gemm or MatMul with the one that it reads, perhaps through an Add of a bias; return why not, if so."""
    value = second.inputs[0]
    shift, first = None, value.producer() if value is not None else None
    if first is not None and first.op_type == "Add" and is_standard(first):
        shift, first = first, _product_behind(first)
    if value is None or first is None or first.op_type not in PRODUCTS or not is_standard(first):
        return ""
    nodes = [first, second] if shift is None else [first, shift, second]
    one, other = linear.layer(first), linear.layer(second)
    if isinstance(one, str) or isinstance(other, str) or one.weight == 0 or other.weight == 0:
        return ""
    if any(graph.only_use(node.outputs[0]) is not after for node, after in itertools.pairwise(nodes)):
        return f"what is between it and `{first.name}` is read elsewhere"
    if reason := refusal(nodes, view):
        return reason
    b = linear.bias(first, one) if shift is None else _shift(shift, first, one)
    c = linear.bias(second, other)
    if b is None or c is None:
        return "a bias differs from row to row"
    plan = Plan(f"merged with `{first.name}`", other.out * one.columns, lambda: _multiply(nodes, one, other, b, c))
    return carried_out([plan], one.out * one.columns + other.out * other.columns, nodes)


def _product_behind(shift: ir.Node) -> ir.Node | None:
    moving = [value for value in shift.inputs if value is not None and not graph.is_constant(value)]
    return moving[0].producer() if len(moving) == 1 else None


def _shift(shift: ir.Node, first: ir.Node, form: Layer) -> Array | None:
    """Return bias and constant of an Add together, [1, out]; None where they are no one number per channel."""
    b = linear.bias(first, form)
    added = graph.constant(next(value for value in shift.inputs if graph.is_constant(value)))
    if b is None or added is None or added.ndim > 1 or added.size not in (1, form.out):
        return None
    shifted: Array = b + added.astype(np.float64)
    return shifted


def _multiply(nodes: list[ir.Node], one: Layer, other: Layer, b: Array, c: Array) -> ir.Node | None:
    """Let nodes first [- Add] - second become one node, or one and the Add where there is no Gemm to hold the bias."""
    first, second = nodes[0], nodes[-1]
    W1, W2 = linear.matrix(first, one), linear.matrix(second, other)
    W, bias = W2 @ W1, c + np.einsum("god,gd->go", W2, b)
    keeps = next((node for node in (second, first) if node.op_type == "Gemm"), second if not bias.any() else None)
    if keeps is None:  # MatMul - Add - MatMul
        shift = nodes[1]
        if not _stored(first, one, W, None):
            return None
        graph.replace_constant(
            shift, int(graph.is_constant(shift.inputs[1])), bias[0].astype(kernels.weight_dtype(first))
        )
        graph.absorb(second, shift.outputs[0])
        return shift
    if not _stored(keeps, one if keeps is first else other, W, bias if keeps.op_type == "Gemm" else None):
        return None
    if keeps is second:
        second.replace_input_with(0, first.inputs[0])
        return second
    for shift in nodes[1:-1]:
        graph.bypass(shift, first.outputs[0])
    graph.absorb(second, first.outputs[0])
    return first


def _stored(node: ir.Node, form: Layer, W: Array, bias: Array | None) -> bool:
    try:
        linear.store(node, form, W, bias)
    except FloatingPointError:
        return False
    return True
