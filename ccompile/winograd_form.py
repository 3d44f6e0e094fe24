"""Convolutions as F(m, r): tiles of the input are transformed, multiplied at n points, and transformed back.

In the form that ONNX Runtime's blocked layout takes best: one depthwise convolution with stride m for each row of B^T
(and, nested, for each of them one for each row of the other axis), their Concat, one grouped convolution with one
group for each point (times those that the layer has) whose 1 x 1 kernels (or r x 1, along an axis without tiles) are
the transformed filters, and A^T as a MatMul on the points; then rows (Transpose) or pixels (DepthToSpace) interleave.
The bias rides at the point 1, which every output weighs alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.convolution import Convolution
from ccompile.core import Array
from ccompile.emitting import Emitter
from ccompile.numerics import winograd
from ccompile.numerics.winograd import Pair


def refusal(conv: Convolution, m: Pair) -> str:
    """Return why a convolution cannot be put into tiles of that size, or nothing."""
    kernel, sizes = plane(conv)
    if len(conv.kernel) > 2:
        return f"its kernel has {len(conv.kernel)} axes"
    if conv.weight.shape[1] == 1 and conv.groups > 1:
        return "it has one channel per group"
    for tile, taps, size in zip(m, kernel, sizes, strict=True):
        if tile > 1 and size is None:
            return "the size of its input is open"
        if tile > 1 and (taps < 2 or tile + taps - 1 > winograd.LARGEST):
            return f"F({tile}, {taps}) is not to be had"
    return "" if max(m) > 1 else "no axis is tiled"


def plane(conv: Convolution) -> tuple[Pair, tuple[int | None, int | None]]:
    """Return the kernel and the input's sizes as those of two axes; a 1-D convolution runs along the last."""
    (kh, kw), (h, w) = (1, *conv.kernel)[-2:], (1, *conv.sizes)[-2:]
    return (kh, kw), (h, w)


def emit(to: Emitter, conv: Convolution, m: Pair) -> ir.Value:
    """Write the convolution in tiles m and return its output; `refusal` must have nothing against it.

    Raises FloatingPointError when a transformed filter is not finite.
    """
    if len(conv.kernel) == 1:
        flat = Convolution(
            to.reshape(conv.x, 0, 0, 1, -1),
            conv.weight[:, :, None],
            conv.bias,
            conv.groups,
            (0, *conv.before),
            (0, *conv.after),
            conv.batch,
            (1, *conv.sizes),
        )
        return to.reshape(emit(to, flat, m), 0, conv.outs, -1)
    tiles = [None if tile == 1 else -(-conv.along(axis)[4] // tile) for axis, tile in enumerate(m)]
    transformed = [conv.x]
    for axis, tile in enumerate(m):
        if tile > 1:
            transformed = _rows(to, conv, transformed, axis, tile)
    z = _products(to, conv, m, to.op("Concat", *transformed, axis=1))
    z = to.reshape(z, 0, len(transformed), -1)
    z = to.op("MatMul", to.weight(_inverse(conv, m), "A"), z)
    counts = [tiles[axis] or conv.out_sizes[axis] or -1 for axis in (0, 1)]
    y = _interleaved(to, z, conv.outs, m, counts)
    ends = {2 + axis: conv.along(axis)[4] for axis in (0, 1) if m[axis] > 1 and conv.along(axis)[4] % m[axis]}
    return to.crop(y, [0] * len(ends), list(ends.values()), list(ends)) if ends else y


def _rows(to: Emitter, conv: Convolution, values: Sequence[ir.Value], axis: int, tile: int) -> list[ir.Value]:
    """Return each value's tiles along an axis under each row of B^T, as depthwise convolutions with stride `tile`."""
    size, before, _, taps, out = conv.along(axis)
    n = tile + taps - 1
    shape, pads, strides = [1, 1], [0, 0, 0, 0], [1, 1]
    shape[axis], strides[axis] = n, tile
    pads[axis], pads[2 + axis] = before, -(-out // tile) * tile + taps - 1 - size - before
    rows = winograd.transform(tile, taps).arrays[2].reshape(n, 1, 1, *shape)
    weights = [to.weight(np.broadcast_to(row, (conv.ins, 1, *shape)), "B") for row in rows]
    given: dict[str, graph.Attribute] = {"kernel_shape": shape, "strides": strides, "group": conv.ins, "pads": pads}
    return [to.op("Conv", value, weight, **given) for value in values for weight in weights]


def _products(to: Emitter, conv: Convolution, m: Pair, tiles: ir.Value) -> ir.Value:
    """Return the products at all points, [batch, points x out channels, rows, columns]."""
    U = winograd.filters(conv.weight, m)
    points = U.shape[0] * U.shape[1]
    operands = [tiles, to.weight(U.reshape(points * conv.outs, *U.shape[3:]), "U")]
    if conv.bias is not None:
        operands.append(to.weight(_bias(conv, m), "bias"))
    pads = [conv.before[a] if m[a] == 1 else 0 for a in (0, 1)] + [conv.after[a] if m[a] == 1 else 0 for a in (0, 1)]
    kernel = list(U.shape[4:])
    return to.op("Conv", *operands, kernel_shape=kernel, group=points * conv.groups, pads=pads)


def _bias(conv: Convolution, m: Pair) -> Array:
    """Return the bias at the point 1 of each tiled axis, over the weight that outputs give it; 0 at all others."""
    assert conv.bias is not None
    at, weigh = [0, 0], 1.0
    for axis, tile in enumerate(m):
        if tile > 1:
            at[axis] = winograd.ONE
            weigh *= winograd.transform(tile, conv.kernel[axis]).arrays[0][0, winograd.ONE]
    counts = [tile + taps - 1 if tile > 1 else 1 for tile, taps in zip(m, conv.kernel, strict=True)]
    found = np.zeros((*counts, conv.outs))
    found[at[0], at[1]] = conv.bias.astype(np.float64) / weigh
    return found.reshape(-1)


def _inverse(conv: Convolution, m: Pair) -> Array:
    """Return A^T of all points: [outputs of a tile, points]."""
    parts = [
        winograd.transform(tile, taps).arrays[0] if tile > 1 else np.ones((1, 1))
        for tile, taps in zip(m, conv.kernel, strict=True)
    ]
    return np.kron(*parts)


def _interleaved(to: Emitter, z: ir.Value, outs: int, m: Pair, counts: list[int]) -> ir.Value:
    """Return [batch, outs, rows, columns] of z[batch, outputs of a tile, outs x tiles]; a count is -1 if open."""
    down, right = counts
    if m[0] == m[1]:
        return to.op("DepthToSpace", to.reshape(z, 0, math.prod(m) * outs, down, right), blocksize=m[0])
    if m[1] == 1:
        z = to.transpose(to.reshape(z, 0, m[0], outs, down, right), 0, 2, 3, 1, 4)
    elif m[0] == 1:
        z = to.transpose(to.reshape(z, 0, m[1], outs, down, right), 0, 2, 3, 4, 1)
    else:
        z = to.transpose(to.reshape(z, 0, *m, outs, down, right), 0, 3, 4, 1, 5, 2)
    return to.reshape(z, 0, outs, *(tile * count if count > 0 else -1 for tile, count in zip(m, counts, strict=True)))
