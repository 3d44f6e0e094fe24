"""Even out the weight ranges of consecutive layers, channel by channel: exact through activations that scale.

f(s x) = s f(x) for s > 0 and f one of Relu, LeakyRelu, max and average pooling and views, so that

    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 (W1 x + b1)),   S = diag(s),  s_c = sqrt(r1_c / r2_c),

with r1 the largest weights of W1's rows and r2 those of W2's columns, which then are equal.
Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.moments import Layer
from ccompile.numerics import rounding

_SCALES = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity")
_SWEEPS = 8
_SAME = 1e-3  # scales nearer to 1 than this change nothing


def equalise(main: ir.Graph) -> list[tuple[str, str]]:
    """Equalise in place until nothing moves; return the pairs of layers, by name, that were changed."""
    pairs = [pair for node in main if (pair := _pair(node)) is not None]
    changed: dict[tuple[str, str], None] = {}
    for _ in range(_SWEEPS):
        moved = [(str(a.name), str(b.name)) for a, b in pairs if _balance(a, b)]
        changed |= dict.fromkeys(moved)
        if not moved:
            break
    return list(changed)


def _pair(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return a layer and the only layer that reads it, through activations that scale."""
    if not _is_plain(node):
        return None
    value = node.outputs[0]
    while (reader := graph.only_use(value)) is not None and reader.op_type in _SCALES:
        if len([output for output in reader.outputs if output.name]) > 1:
            return None
        value = reader.outputs[0]
    if reader is None or reader.inputs[0] is not value or not _is_plain(reader):
        return None
    first, second = linear.layer(node), linear.layer(reader)
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    same = first.groups * first.out == second.groups * second.channels
    return (node, reader) if same and (node.op_type == "Conv") == (reader.op_type == "Conv") else None


def _is_plain(node: ir.Node) -> bool:
    form = linear.layer(node) if node.op_type in ("Conv", "Gemm") else ""
    if not isinstance(form, Layer) or linear.bias(node, form) is None:
        return False
    biases = [value for value in node.inputs[2:3] if value is not None]
    return not graph.weight_refusal(node.inputs[1]) and all(len(list(value.uses())) == 1 for value in biases)


def _balance(node: ir.Node, reader: ir.Node) -> bool:
    first, second = linear.layer(node), linear.layer(reader)
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    W1, W2, b1 = linear.matrix(node, first), linear.matrix(reader, second), linear.bias(node, first)
    assert b1 is not None
    taps = W2.reshape(second.groups, second.out, second.channels, second.taps)
    s = rounding.balance(np.abs(W1).max(2).reshape(-1), np.abs(taps).max((1, 3)).reshape(-1))
    if np.abs(np.log(s)).max() < _SAME:
        return False
    rows = s.reshape(first.groups, first.out)
    columns = s.reshape(second.groups, 1, second.channels, 1)
    linear.store(node, first, W1 / rows[:, :, None], b1 / rows)
    linear.store(reader, second, (taps * columns).reshape(W2.shape), None)
    return True
