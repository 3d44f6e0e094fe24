"""Slices, Gathers and Pads of codes as one convolution with a kernel of 1 x 1, where the target's estimate is lower.

y[n, o, i, j] = x[n, c(o), s i, t j], or 0 for a channel that is padding, is the convolution of x with W[o, c(o)] = 1
and strides s, t: what a subsampled shortcut of a residual net is (He et al. 2016, arXiv:1512.03385, section 4.2, option
A). On codes it is exact, as both sides have one grid. Runtimes have images of codes channels last between their integer
convolutions; a Slice or Pad keeps that from going through, and every layer up to the input then changes its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channel_reshape import paddings, slices
from ccompile.analysis.shapes import UNKNOWN, Shapes
from ccompile.core import Array

_IMAGE = 4  # dimensions: N, C, H, W
_PADDING = -1  # in place of a channel
_MOST_WEIGHTS = 1 << 24  # no convolution with more is faster than to move codes


@dataclass(frozen=True, eq=False)
class _Chain:
    """Moves in a row that pick channels [out], among _PADDING, and every stride-th position, and the grid of codes."""

    nodes: tuple[ir.Node, ...]
    picked: Array
    width: int
    strides: tuple[int, int]
    grid: tuple[ir.Value, ir.Value]


def convolve(
    model: ir.Model, among: Collection[str], types: Shapes, price: Callable[[ir.Model], Mapping[str, tuple[int, float]]]
) -> list[tuple[str, ...]]:
    """Replace chains of the named nodes in place where that is estimated to be faster; return the nodes of each.

    among: nodes that move codes, as qdq.encode writes them: their pads have the zero of the grid. types: of all values.
    price: the MACs and seconds of a graph's nodes, by name (see core.Costs.nodes).
    """
    chains = _chains(model.graph, among, types)
    if not chains:
        return []
    trial = graph.copy(model)
    written = [_write(chain) for chain in _chains(trial.graph, among, types)]
    now, then = ({name: cost[1] for name, cost in price(m).items()} for m in (model, trial))
    done = []
    for chain, new in zip(chains, written, strict=True):
        old = tuple(str(node.name) for node in chain.nodes)
        if sum(then[name] for name in new) < sum(now[name] for name in old):
            _write(chain)
            done.append(old)
    return done


def _chains(main: ir.Graph, among: Collection[str], types: Shapes) -> list[_Chain]:
    """Return the longest chains, none of which is a part of another."""
    found: list[_Chain] = []
    for node in reversed([node for node in main if node.name in among]):
        if any(node in chain.nodes for chain in found):
            continue
        chain = _chain(node, among, types)
        if chain is not None:
            found.append(chain)
    return found


def _chain(last: ir.Node, among: Collection[str], types: Shapes) -> _Chain | None:
    """Return the longest chain that ends in a node, if there is one and what reads it tells its grid."""
    grid = next((use.node.inputs[1:3] for use in last.outputs[0].uses() if use.node.op_type == "DequantizeLinear"), ())
    if len(grid) != 2 or grid[0] is None or grid[1] is None:
        return None
    found: _Chain | None = None
    node: ir.Node | None = last
    while node is not None and node.name in among and (width := _width(node, types)):
        move = _move(node, width, types)
        if move is None:
            break
        picked, strides = move
        nodes: tuple[ir.Node, ...] = (node,)
        if found is not None:
            nodes = (node, *found.nodes)
            picked = np.where(found.picked == _PADDING, _PADDING, picked[found.picked])
            strides = strides[0] * found.strides[0], strides[1] * found.strides[1]
        found = _Chain(nodes, picked, width, strides, (grid[0], grid[1]))
        value = node.inputs[0]
        node = value.producer() if value is not None and graph.only_use(value) is node else None
    return found if found is not None and 0 < found.width * len(found.picked) <= _MOST_WEIGHTS else None


def _width(node: ir.Node, types: Shapes) -> int:
    """Return the channels of the image of codes that a node reads; 0 if it reads none, or their number is not known."""
    value = node.inputs[0] if node.inputs else None
    known = types.get(str(value.name), UNKNOWN) if value is not None else UNKNOWN
    if known.dtype != ir.DataType.UINT8 or known.shape is None or len(known.shape) != _IMAGE:
        return 0
    return known.shape[1] if isinstance(known.shape[1], int) else 0


def _move(node: ir.Node, width: int, types: Shapes) -> tuple[Array, tuple[int, int]] | None:
    """Return which of `width` channels a node picks, and its strides; None for what no convolution of 1 x 1 does."""
    if node.domain not in ("", "ai.onnx"):
        return None
    channels: Array = np.arange(width)
    if node.op_type == "Slice":
        return _sliced(node, channels, types)
    if node.op_type == "Gather":
        index = graph.constant(node.inputs[1])
        whole = graph.attribute(node, "axis", 0) in (1, 1 - _IMAGE) and index is not None and index.ndim == 1
        return (channels[index], (1, 1)) if whole else None
    pads = paddings(node, _IMAGE) if node.op_type == "Pad" else None
    if pads is None or any(ends != (0, 0) for axis, ends in pads.items() if axis != 1):
        return None
    begin, end = pads.get(1, (0, 0))
    return (np.pad(channels, (begin, end), constant_values=_PADDING), (1, 1)) if min(begin, end) >= 0 else None


def _sliced(node: ir.Node, channels: Array, types: Shapes) -> tuple[Array, tuple[int, int]] | None:
    value, parts = node.inputs[0], slices(node, _IMAGE)
    shape = types.get(str(value.name), UNKNOWN).shape if value is not None else None
    if parts is None or shape is None:
        return None
    strides = {0: 1, 2: 1, 3: 1}
    for axis, part in parts.items():
        if part is None or part.step < 1:
            return None
        if axis == 1:
            channels = channels[part]
            continue
        size = shape[axis]
        if part.start != 0 or part.stop < (size if isinstance(size, int) else np.iinfo(np.int32).max):
            return None
        strides[axis] = part.step
    return (channels, (strides[2], strides[3])) if strides[0] == 1 else None


def _write(chain: _Chain) -> list[str]:
    """Put the convolution in the place of a chain; return the names of the new nodes."""
    last, source = chain.nodes[-1], chain.nodes[0].inputs[0]
    main, base = last.graph, str(last.name)
    assert isinstance(main, ir.Graph)
    W = (chain.picked[:, None] == np.arange(chain.width)).astype(np.int8)[:, :, None, None]
    one, zero = np.ones((), np.float32), np.zeros((), np.int8)
    stored = [graph.add_constant(main, f"{base}_{n}", a) for n, a in (("codes", W), ("one", one), ("none", zero))]
    weight = graph.add_node("DequantizeLinear", stored, before=last, base=f"{base}_weight")
    image = graph.add_node("DequantizeLinear", [source, *chain.grid], before=last, base=f"{base}_dequantize")
    inputs = [image.outputs[0], weight.outputs[0]]
    conv = graph.add_node("Conv", inputs, {"strides": list(chain.strides)}, before=last, base=f"{base}_convolution")
    coder = graph.add_node("QuantizeLinear", [conv.outputs[0], *chain.grid], before=last, base=f"{base}_quantize")
    graph.replace_node(last, coder)
    graph.remove_dead(main)
    return [str(node.name) for node in (image, weight, conv, coder)]
