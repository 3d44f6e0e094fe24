"""Compute convolutions in tiles with fewer multiplications.

F(m, r) makes m outputs of r taps with m + r - 1 products: y = A^T [ (G g) o (B^T d) ]; along one axis, or nested along
two. 3 x 3 kernels take 2.25 (4x4), 4 (2x2) or 4.5 (4x1) products per output instead of 9.

Fires:  Conv in float32 at stride 1 without dilation, constant weight not stored in a smaller form, more than one
        channel per group; the size along a tiled axis is known; m + r - 1 <= 8; where the target, or a race, says that
        it pays.
Error:  4 x 2^-24 x growth of the transforms, relative L2 on white data: 3x3 0.6e-6 (4x1), 1.7e-6 (4x4).
Cost:   (m + r - 1) / m products per output and tiled axis, for r; transforms pass over the data; weights grow alike.
Source: Winograd 1980; Lavin and Gray 2015, arXiv:1509.09308; Barabasz et al. 2020, arXiv:1803.10986 (points).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import onnx_ir as ir
from pydantic import Field, StringConstraints

from ccompile import convolution, graph, winograd_form
from ccompile.analysis.shapes import shapes
from ccompile.convolution import Convolution
from ccompile.core import Skip, View
from ccompile.emitting import Emitter
from ccompile.lowering import Formulation, Lowering
from ccompile.numerics import winograd
from ccompile.numerics.winograd import Pair

Tile = Annotated[str, StringConstraints(pattern=r"^[1-6]x[1-6]$")]
_OPS = ("Concat", "MatMul", "Reshape", "Transpose", "DepthToSpace", "Slice")
_MOST = 8  # products per tile and axis: beyond, neither time nor digits are won


class LowerWinograd(Lowering):
    """Options of lower-winograd."""

    tiles: tuple[Tile, ...] = Field(
        ("4x1", "6x1", "2x2", "3x3", "4x4"),
        min_length=1,
        description="outputs per tile that are tried, rows x columns; a kernel of one row takes m x 1 as 1 x m",
    )

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return the tiles that fit a convolution."""
        if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            return ()
        if lacks := [op for op in _OPS if not view.target.runs(op)]:
            return Skip(str(node.name), f"the target has no {lacks[0]}")
        conv = convolution.read(node, view.ask(shapes))
        if isinstance(conv, str):
            return Skip(str(node.name), conv)
        if _in_tiles(node):
            return Skip(str(node.name), "it multiplies tiles already")
        found, reasons = [], []
        for m in dict.fromkeys(_turned(tile, conv) for tile in self.tiles):
            if reason := refusal(conv, m):
                reasons.append(reason)
            else:
                kernel = winograd_form.plane(conv)[0]
                build = partial(_build, conv, m)
                found.append(Formulation(f"F({m[0]}x{m[1]})", winograd.error(m, kernel), build))
        return found or Skip(str(node.name), reasons[0])


def refusal(conv: Convolution, m: Pair) -> str:
    """Return why tiles of that size make no sense for a convolution, or nothing."""
    kernel = winograd_form.plane(conv)[0]
    if max(kernel) < 2:
        return "its kernel has one tap"
    if reason := winograd_form.refusal(conv, m):
        return reason
    if any(tile > 1 and tile + taps - 1 > _MOST for tile, taps in zip(m, kernel, strict=True)):
        return f"kernel {'x'.join(map(str, kernel))} is too large for tiles: lower-fft takes those"
    return ""


def _turned(tile: str, conv: Convolution) -> Pair:
    """Return a tile's rows and columns; along the only axis with taps where there is one."""
    rows, columns = (int(part) for part in tile.split("x"))
    one_row = winograd_form.plane(conv)[0][0] == 1
    return (columns, rows) if one_row and columns == 1 else (rows, columns)


def _in_tiles(node: ir.Node) -> bool:
    """Return whether a grouped convolution reads a Concat of strided depthwise ones: the form that this pass makes."""
    data = node.inputs[0].producer() if node.inputs[0] is not None else None
    if data is None or data.op_type != "Concat" or graph.attribute(node, "group", 1) == 1:
        return False
    parts = [value.producer() for value in data.inputs if value is not None]
    return all(part is not None and max(graph.attribute(part, "strides", [1])) > 1 for part in parts)


def _build(conv: Convolution, m: Pair, main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    to = Emitter(node)
    return to.done(winograd_form.emit(to, conv.at(node), m))
