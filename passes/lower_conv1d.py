"""Run convolutions of one dimension as the runtime runs those of two, and of one or none as products.

1 x k:     y = Conv1D(x)  becomes  y = Conv(x as [n, c, 1, l]) with W[o, c, 1, k]: the same products, in the runtime's
           fast layout; an image of width 1 is turned likewise. Activations behind go along, and neighbours stay turned.
Toeplitz:  one channel, y[p] = sum_t w[t] x[p + t]: in blocks of B, Y[j, :] = [X[j, :], X[j + 1, :]] T with
           T[i, p] = w[i - p], or in one product with T[L, P] where that is smaller.
Gemm:      maps of one position, as squeeze-and-excitation has them: y[n, o] = W[o, i] x[n, i] + b[o]. Activations
           behind go along, and neighbours stay matrices.

Fires:  Conv of rank 3; Conv k x 1 on width 1; one input and output channel, k >= 16, stride 1 and a static length;
        Conv of one tap without groups or pads on maps of one position.
Error:  float reordering.
Cost:   1 x k: none but two reshapes. Toeplitz: k -> 2 B >= 2 (k - 1) multiply-adds per element, in large products.
Source: Gray 2006, Toeplitz and Circulant Matrices: A Review, doi:10.1561/0100000006.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ccompile import graph, products, turning
from ccompile.analysis import kernels
from ccompile.analysis.shapes import UNKNOWN, shapes
from ccompile.core import Array, PassResult, Skip, View
from ccompile.lowering import Formulation, Lowering

if TYPE_CHECKING:
    from ccompile.numerics.composition import Kernel

_ROW = [0, 0, 1, -1]
_LEAST = 16  # taps: below, a product has no advantage
_BLOCK = 16  # blocks are multiples of this


class LowerConv1d(Lowering):
    """Options of lower-conv1d: those that every lowering takes."""

    def run(self, view: View) -> PassResult:
        """Decide and rewrite site by site; reshapes between neighbours that are both turned go."""
        result = super().run(view)
        graph.remove_dead(view.graph)
        view.changed()
        return result

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return the forms of a convolution that runs along one axis."""
        if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            return ()
        shape = graph.static_shape(node.inputs[1])
        known = view.ask(shapes).get(str(node.inputs[0].name), UNKNOWN).shape if node.inputs[0] is not None else None
        if products.is_point(shape, known):
            return products.of_point(node, known, graph.opset(view.model))
        column = shape is not None and len(shape) == 4 and shape[3] == 1 < shape[2]
        if shape is not None and not (len(shape) == 3 or column):
            return ()
        if column and (known is None or len(known) != 4 or known[3] != 1):
            return ()
        kernel = "its weight is not constant" if shape is None else kernels.convolution(node, known)
        if shape is None and (known is None or len(known) != 3):
            return ()
        if isinstance(kernel, str):
            return Skip(str(node.name), kernel)
        if column and (kernel.begins[1] or kernel.ends[1]):
            return Skip(str(node.name), "it pads an image of width 1 at its sides")
        if reason := graph.weight_refusal(node.inputs[1]):
            return Skip(str(node.name), reason)
        names = tuple(str(other.name) for other in turning.followers(node))
        found = [Formulation("1 x k", 0.0, partial(_as_row, kernel), names)]
        length = known[2] if known is not None else None
        if _is_single(kernel) and isinstance(length, int) and graph.opset(view.model) >= 13:
            found.append(Formulation("Toeplitz", 0.0, partial(_as_product, kernel, length)))
        return found


def _is_single(kernel: Kernel) -> bool:
    plain = kernel.strides == kernel.dilations == (1,)
    return kernel.W.shape[:2] == (1, 1) and kernel.groups == 1 and plain and kernel.taps[0] >= _LEAST


# ---------------------------------------------------------------------------------------------- 1 x k


def _as_row(kernel: Kernel, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Let the node read [n, c, 1, l], and turn what comes out back behind the ops that follow."""
    source, chain = node.inputs[0], [node, *turning.followers(node)]
    assert source is not None
    column = len(kernel.taps) == 2
    turned = _turned(source)
    made = []
    if turned is None:
        made.append(turning.reshape(main, source, _ROW, f"{node.name}_row", before=node))
        turned = made[0].outputs[0]
    dtype = kernels.weight_dtype(node)
    node.replace_input_with(0, turned)
    graph.replace_constant(node, 1, kernel.W.reshape(*kernel.W.shape[:2], 1, kernel.taps[0]).astype(dtype))
    kernels.describe(node, _row(kernel))
    back = [0, 0, -1, 1] if column else [0, 0, -1]
    leave = turning.turned_back(chain, back, str(node.name))
    return [*made, *chain, leave]


def _turned(value: ir.Value) -> ir.Value | None:
    """Return the [n, c, 1, l] that `value` was made of by a reshape of this pass."""
    node = value.producer()
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    wanted, before = graph.constant(node.inputs[1]), node.inputs[0].producer()
    if wanted is None or wanted.tolist() not in ([0, 0, -1], [0, 0, -1, 1]):
        return None
    while before is not None and before.op_type in turning.ELEMENTWISE and before.inputs[0] is not None:
        before = before.inputs[0].producer()
    if before is None or before.op_type != "Conv" or before.domain not in ("", "ai.onnx"):
        return None
    shape = graph.static_shape(before.inputs[1])
    return node.inputs[0] if shape is not None and len(shape) == 4 and shape[2] == 1 else None


def _row(kernel: Kernel) -> Kernel:
    """Return the attributes of a kernel along one axis as those of one 1 x k."""
    W = kernel.W.reshape(*kernel.W.shape[:2], 1, kernel.taps[0])
    axes = ((one, values[0]) for one, values in ((1, kernel.strides), (1, kernel.dilations)))
    pads = ((0, values[0]) for values in (kernel.begins, kernel.ends))
    return type(kernel)(W, kernel.b, kernel.groups, *axes, *pads)


# ---------------------------------------------------------------------------------------------- Toeplitz


def toeplitz(w: Array, rows: int, columns: int, begin: int = 0) -> Array:
    """Return T[rows, columns] with T[i, p] = w[i - p + begin], zero outside.

    >>> toeplitz(np.array([1.0, 2.0]), 3, 2).tolist()
    [[1.0, 0.0], [2.0, 1.0], [0.0, 2.0]]
    """
    at = np.arange(rows)[:, None] - np.arange(columns) + begin
    inside = (at >= 0) & (at < w.size)
    return np.where(inside, w[np.where(inside, at, 0)], 0.0)


def _as_product(kernel: Kernel, length: int, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    """Let products of whole blocks stand in place of a node that reads [n, 1, length]."""
    x, w, taps = node.inputs[0], kernel.W.reshape(-1), kernel.taps[0]
    dtype = kernels.weight_dtype(node)
    begin, out = kernel.begins[0], length + kernel.slack[0]
    block = -(-(taps - 1) // _BLOCK) * _BLOCK
    made: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        made.append(graph.add_node(op, inputs, attributes, before=node, base=f"{node.name}_{op.lower()}"))
        return made[-1].outputs[0]

    def constant(what: str, array: Array) -> ir.Value:
        return graph.add_constant(main, f"{node.name}_{what}", array)

    def numbers(what: str, *values: int) -> ir.Value:
        return constant(what, np.array(values, np.int64))

    whole = length * out <= 2 * block * out
    if whole:
        y = add("MatMul", x, constant("toeplitz", toeplitz(w, length, out, begin).astype(dtype)))
    else:
        blocks = -(-out // block)
        end = (blocks + 1) * block - length - begin
        padded = add("Pad", x, numbers("pads", 0, 0, begin, 0, 0, end))
        rows = add("Reshape", padded, numbers("blocks", -1, blocks + 1, block))
        pair = [
            add("Slice", rows, numbers("from", at), numbers("to", at + blocks), numbers("axis", 1)) for at in (0, 1)
        ]
        both = add("Concat", *pair, axis=2)
        y = add("MatMul", both, constant("toeplitz", toeplitz(w, 2 * block, block).astype(dtype)))
        y = add("Reshape", y, numbers("row", -1, 1, blocks * block))
        if blocks * block > out:
            y = add("Slice", y, numbers("first", 0), numbers("length", out), numbers("last", 2))
    if kernel.b.any():
        y = add("Add", y, constant("bias", kernel.b.astype(dtype)))
    graph.replace_node(node, made[-1])
    return made
