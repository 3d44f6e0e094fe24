"""Compute convolutions with long kernels, and circulant matrices, as products of spectra.

y = F^-1 [ (F k) o (F x) ], with the discrete Fourier transforms as matrix products, which any machine is good at: whole
ones of short lengths, of long ones in four steps n = n1 n2. The DFT op itself runs at a hundredth of their speed.

Fires:  Conv in float32 at stride 1 without dilation, constant weight not stored in a smaller form, of known sizes,
        `min_kernel` taps along an axis: depthwise ones along one or two axes, others along their rows; MatMul and Gemm
        whose constant weight is circulant, or made of circulant blocks, to the last bit; where the target, or a race,
        says that it pays.
Error:  2 x 2^-24 x the roots of the transforms' lengths, relative L2 on white data: about 1e-6, rarely 3e-6.
Cost:   rows: 1.5 n / m products per output (tiles of m rows, n >= m + taps - 1) for `taps`; planes and long kernels:
        some n (n1 + n2) for n taps. Spectra of weights are stored: 1.5 n / taps of a weight, or n of a long kernel's.
Source: Mathieu et al. 2014, arXiv:1312.5851; Bailey 1990 (four steps); Cheng et al. 2015, arXiv:1502.03436 (circulant).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile import convolution, fourier_forms, graph
from ccompile.analysis import linear
from ccompile.analysis.shapes import UNKNOWN, shapes
from ccompile.convolution import Convolution
from ccompile.core import Array, Skip, View
from ccompile.emitting import Emitter
from ccompile.lowering import Formulation, Lowering
from ccompile.numerics import dft

_OPS = ("Concat", "MatMul", "Reshape", "Transpose", "Split", "Mul", "Add", "Sub", "Slice", "Pad")
_TILES = (1, 2, 4)
_BLOCKS = (1, 2, 4)  # times the kernel, for overlap-add
_LEAST_BLOCK = 8

Write = Callable[[Emitter, Convolution], ir.Value]


class LowerFft(Lowering):
    """Options of lower-fft."""

    min_kernel: int = Field(5, ge=2, le=1 << 20, description="fewest taps along an axis of a kernel that is worth it")

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return the products of spectra that fit a convolution or a matrix."""
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            return ()
        if lacks := [op for op in _OPS if not view.target.runs(op)]:
            return Skip(str(node.name), f"the target has no {lacks[0]}")
        if node.op_type != "Conv":
            return _of_matrix(node, view)
        conv = convolution.read(node, view.ask(shapes))
        found = conv if isinstance(conv, str) else self._of_convolution(conv)
        return Skip(str(node.name), found) if isinstance(found, str) else found

    def _of_convolution(self, conv: Convolution) -> list[Formulation] | str:
        if max(conv.kernel, default=1) < self.min_kernel:
            return f"its kernel has fewer than {self.min_kernel} taps along each axis"
        if conv.depthwise and len(conv.kernel) == 1:
            return fourier_forms.refusal_1d(conv) or _lines(conv)
        if conv.depthwise:
            if reason := fourier_forms.refusal_2d(conv):
                return reason
            lengths = [dft.length(*conv.along(axis)[:4]) for axis in (0, 1)]
            return [_formulation("planes", dft.error(*lengths), conv, fourier_forms.planes_2d)]
        if reason := fourier_forms.refusal_rows(conv, 1):
            return reason
        if conv.kernel[0] < self.min_kernel:
            return f"its kernel has fewer than {self.min_kernel} rows"
        return _rows(conv)


def _lines(conv: Convolution) -> list[Formulation]:
    """Return the forms of a long kernel along one axis: in one piece, and in blocks where the signal is longer."""
    size, before, after, taps, _ = conv.along(0)
    plan = dft.four_step(dft.length(size, before, after, taps), size)
    found = [_formulation("four steps", dft.error(plan.n1, plan.n2), conv, fourier_forms.long_1d)]
    for times in _BLOCKS:
        block = times * max(taps, 64)
        if 2 * block <= size and not fourier_forms.refusal_1d(conv, block):
            write = _in_blocks(block)
            n = math.isqrt(2 * block)
            found.append(_formulation(f"four steps in blocks of {block}", dft.error(2 * n, n), conv, write))
    return found


def _in_blocks(block: int) -> Write:
    return lambda to, conv: fourier_forms.long_1d(to, conv, block)


def _rows(conv: Convolution) -> list[Formulation]:
    """Return spectra of the rows in some numbers of tiles; a tile has more rows than half the kernel."""
    size, before, after, taps, out = conv.along(0)
    found = []
    for tiles in _TILES:
        if tiles > 1 and 2 * -(-out // tiles) < taps:
            break
        n = dft.length(size, before, after, taps) if tiles == 1 else -(-out // tiles) + taps - 1
        label = "spectra of rows" if tiles == 1 else f"spectra of rows in {tiles} tiles"
        found.append(_formulation(label, dft.error(n), conv, _in_tiles(tiles)))
    return found


def _in_tiles(tiles: int) -> Write:
    return lambda to, conv: fourier_forms.rows(to, conv, tiles)


def _formulation(label: str, bound: float, conv: Convolution, write: Write) -> Formulation:
    def build(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
        to = Emitter(node)
        return to.done(write(to, conv.at(node)))

    return Formulation(label, bound, build)


# ---------------------------------------------------------------------------------------------- matrices


def _of_matrix(node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
    """Return the forms of a matrix that is circulant, or made of circulant blocks."""
    name, form = str(node.name), linear.layer(node)
    if isinstance(form, str):
        return Skip(name, form)
    stored = graph.constant(node.inputs[form.weight])
    assert stored is not None
    W = stored if form.wide else stored.T
    b = dft.circulant_block(W)
    if b is None or b < _LEAST_BLOCK:
        return Skip(name, "its weight is not circulant")
    if stored.dtype != np.float32 or form.weight == 0:
        return Skip(name, f"it computes in {stored.dtype}" if form.weight else "its weight is the left operand")
    known = view.ask(shapes).get(form.input, UNKNOWN).shape
    if known is None or sum(not isinstance(dim, int) for dim in known[:-1]) > 1:
        return Skip(name, "the shape of its input is open")
    leading = [dim if isinstance(dim, int) else -1 for dim in known[:-1]]
    alpha: float = graph.attribute(node, "alpha", 1.0) if form.op == "Gemm" else 1.0
    C = alpha * dft.first_columns(W, b).astype(np.float64)
    n1 = dft.factor(b)
    if b == len(W) == W.shape[1] and n1 is not None:
        write = _circulant(C[0, 0], n1, math.prod(leading) == 1)
        return [Formulation(f"circulant, {n1} x {b // n1}", dft.error(n1, b // n1), _dense(write, leading))]
    return [Formulation(f"circulant blocks of {b}", dft.error(b), _dense(_blocks(C), leading))]


def _circulant(column: Array, n1: int, one: bool) -> Callable[[Emitter, ir.Value], ir.Value]:
    return lambda to, x: fourier_forms.circulant(to, x, column, n1, one)


def _blocks(C: Array) -> Callable[[Emitter, ir.Value], ir.Value]:
    return lambda to, x: fourier_forms.blocks(to, x, C)


def _dense(
    write: Callable[[Emitter, ir.Value], ir.Value], leading: Sequence[int]
) -> Callable[[ir.Graph, ir.Node], Sequence[ir.Node]]:
    """Return what writes a product of rows in the place of a node with these sizes before the last; with its bias."""

    def build(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
        to, x = Emitter(node), node.inputs[0]
        assert x is not None
        y = write(to, x)
        if len(leading) != 1:
            y = to.reshape(y, *leading, -1 if -1 not in leading else _outs(node))
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is not None:
            beta = graph.attribute(node, "beta", 1.0)
            y = to.op("Add", y, bias if beta == 1 else to.op("Mul", bias, to.weight(np.array(beta), "beta")))
        return to.done(y)

    return build


def _outs(node: ir.Node) -> int:
    form = linear.layer(node)
    assert not isinstance(form, str)
    return form.out
