"""Convolutions with long kernels, and circulant matrices, as products of spectra; transforms are matrix products.

form        for                               how
planes_2d   depthwise, two axes               half spectrum along the columns, whole along the rows, times, and back
rows        any groups, tall kernels          spectra of tiles along the rows; per frequency, a 1 x kw convolution
long_1d     depthwise, one axis               four steps, in one piece or in blocks whose tails are added (overlap-add)
circulant   circulant matrices                spectra along one factor of n; per frequency, a small matrix
blocks      matrices of circulant blocks      the blocks' spectra; per frequency, a small matrix

`planes_2d` and `long_1d` keep real and imaginary parts in planes; `rows` multiplies complex numbers by three real
products, whose sums are in the transforms.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ccompile.convolution import Convolution
from ccompile.core import Array
from ccompile.emitting import Emitter
from ccompile.numerics import dft
from ccompile.numerics.dft import FourStep

Planes = tuple[ir.Value, ir.Value]


def _times(to: Emitter, value: Planes, factor: Array) -> Planes:
    """Return the complex product with a constant."""
    (re, im), (c, d) = value, (to.weight(factor.real, "re"), to.weight(factor.imag, "im"))
    real = to.op("Sub", to.op("Mul", re, c), to.op("Mul", im, d))
    return real, to.op("Add", to.op("Mul", re, d), to.op("Mul", im, c))


def _biased(to: Emitter, value: ir.Value, conv: Convolution) -> ir.Value:
    if conv.bias is None:
        return value
    return to.op("Add", value, to.weight(conv.bias.reshape(-1, *[1] * len(conv.kernel)), "bias"))


# ---------------------------------------------------------------------------------------------- depthwise, two axes


def refusal_2d(conv: Convolution) -> str:
    """Return why `planes_2d` does not fit, or nothing."""
    if len(conv.kernel) != 2 or not conv.depthwise:
        return "it is not depthwise along two axes"
    return "the size of its input is open" if None in conv.sizes else ""


def planes_2d(to: Emitter, conv: Convolution) -> ir.Value:
    """Write a depthwise convolution by its spectra along both axes and return its output."""
    (h, top, bottom, kh, out_h), (w, left, right, kw, out_w) = conv.along(0), conv.along(1)
    n, m = dft.length(h, top, bottom, kh), dft.length(w, left, right, kw)
    half, c = dft.halved(m), conv.ins
    z = to.op("MatMul", conv.x, to.weight(dft.forward(m, w).T, "F"))
    z = to.transpose(to.reshape(z, 0, c, h, 2, half), 0, 1, 3, 2, 4)
    z = to.op("MatMul", to.weight(dft.planes(dft.roots(n, h, n)), "F"), to.reshape(z, 0, c, 2 * h, half))
    kernel = dft.placed(conv.weight[:, 0].astype(np.float64), left, m).swapaxes(-1, -2)
    K = np.fft.fft(np.fft.rfft(dft.placed(kernel, top, n), axis=-2).swapaxes(-1, -2), axis=-2)
    z = to.op("Concat", *_times(to, to.halves(z, 2, n), K), axis=2)
    back = np.conj(dft.roots(out_h, n, n)) / n
    z = to.op("MatMul", to.weight(dft.planes(back), "F"), z)
    z = to.transpose(to.reshape(z, 0, c, 2, out_h, half), 0, 1, 3, 2, 4)
    z = to.reshape(z, 0, c, out_h, 2 * half)
    return _biased(to, to.op("MatMul", z, to.weight(dft.inverse(m, out_w).T, "F")), conv)


# ---------------------------------------------------------------------------------------------- tall kernels


def refusal_rows(conv: Convolution, tiles: int) -> str:
    """Return why `rows` does not fit, or nothing."""
    if len(conv.kernel) != 2 or conv.kernel[0] < 2:
        return "it has no rows of taps"
    if conv.weight.shape[1] == 1 and conv.groups > 1:
        return "it has one channel per group"
    if conv.sizes[0] is None:
        return "the height of its input is open"
    return "" if tiles <= conv.along(0)[4] else f"it has fewer than {tiles} rows"


def rows(to: Emitter, conv: Convolution, tiles: int = 1) -> ir.Value:
    """Write a convolution in `tiles` tiles of rows, each by its spectrum along the rows; return its output."""
    h, top, bottom, kh, out = conv.along(0)
    kw, m = conv.kernel[1], -(-out // tiles)
    least = dft.length(h, top, bottom, kh) if tiles == 1 else m + kh - 1
    n = max(least + least % 2, kh)
    form = dft.bilinear(n, kh)
    p = len(form.B)
    z = to.op("MatMul", to.weight(_tiled(form.B, h, top, m, tiles), "B"), conv.x)
    z = to.transpose(to.reshape(z, 0, conv.ins, p, tiles, -1), 0, 2, 1, 3, 4)
    z = to.reshape(z, 0, p * conv.ins, tiles, -1)
    U = np.einsum("pi,ocij->pocj", form.G, conv.weight.astype(np.float64))
    operands = [z, to.weight(U.reshape(p * conv.outs, -1, 1, kw), "U")]
    if conv.bias is not None:  # frequency 0 comes first, and every output weighs it alike
        bias = np.zeros((p, conv.outs))
        bias[0] = conv.bias.astype(np.float64) / form.A[0, 0]
        operands.append(to.weight(bias.reshape(-1), "bias"))
    pads = [0, conv.before[1], 0, conv.after[1]]
    z = to.op("Conv", *operands, kernel_shape=[1, kw], group=p * conv.groups, pads=pads)
    z = to.op("MatMul", to.weight(form.A[:m], "A"), to.reshape(z, 0, p, -1))
    width = conv.out_sizes[1] or -1
    z = to.transpose(to.reshape(z, 0, m, conv.outs, tiles, width), 0, 2, 3, 1, 4)
    y = to.reshape(z, 0, conv.outs, tiles * m, width)
    return y if tiles * m == out else to.crop(y, [0], [out], [2])


def _tiled(B: Array, size: int, before: int, m: int, tiles: int) -> Array:
    """Return B[p, n] on every tile: [p tiles, size]; tile t reads n entries from t m - before on, one tile all."""
    p, n = B.shape
    found = np.zeros((p, tiles, size))
    for t in range(tiles):
        at = np.arange(size) - t * m + before
        inside = np.full(size, True) if tiles == 1 else (at >= 0) & (at < n)
        found[:, t, inside] = B[:, at[inside] % n]
    return found.reshape(p * tiles, size)


# ---------------------------------------------------------------------------------------------- long signals


def _forth(to: Emitter, z: ir.Value, plan: FourStep, axis: int) -> Planes:
    """Return the half spectrum of z[..., rows, n2], whose rows are axis `axis`: planes [..., h, n2]."""
    z = to.op("MatMul", to.weight(dft.forward(plan.n1, plan.rows), "F"), z)
    z = to.op("Concat", *_times(to, to.halves(z, axis, plan.h), plan.twiddles), axis=axis + 1)
    z = to.op("MatMul", z, to.weight(dft.planes(dft.roots(plan.n2, plan.n2, plan.n2)).T, "F"))
    return to.halves(z, axis + 1, plan.n2)


def _back(to: Emitter, value: Planes, plan: FourStep, count: int, axis: int) -> ir.Value:
    """Return the first `count` rows of the signal of a half spectrum: [..., count, n2]."""
    z = to.op("Concat", *value, axis=axis + 1)
    whole = np.conj(dft.roots(plan.n2, plan.n2, plan.n2)) / plan.n2
    z = to.op("MatMul", z, to.weight(dft.planes(whole).T, "F"))
    value = _times(to, to.halves(z, axis + 1, plan.n2), np.conj(plan.twiddles))
    return to.op("MatMul", to.weight(dft.inverse(plan.n1, count), "F"), to.op("Concat", *value, axis=axis))


def refusal_1d(conv: Convolution, block: int | None = None) -> str:
    """Return why `long_1d` does not fit, or nothing."""
    if len(conv.kernel) != 1 or not conv.depthwise:
        return "it is not depthwise along one axis"
    if conv.sizes[0] is None:
        return "the size of its input is open"
    if block is not None and max(conv.before[0], conv.after[0]) >= conv.kernel[0]:
        return "its pads are as wide as its kernel"
    return ""


def long_1d(to: Emitter, conv: Convolution, block: int | None = None) -> ir.Value:
    """Write a depthwise convolution along one axis by its spectrum, in one piece or in blocks of about `block`."""
    size, before, after, taps, out = conv.along(0)
    if block is not None:
        return _biased(to, _overlap_add(to, conv, block), conv)
    plan = dft.four_step(dft.length(size, before, after, taps), size)
    x = to.pad(conv.x, [0, 0, 0], [0, 0, plan.rows * plan.n2 - size])
    K = plan.spectrum(dft.placed(conv.weight[:, 0].astype(np.float64), before, plan.n))
    value = _forth(to, to.reshape(x, 0, conv.ins, plan.rows, plan.n2), plan, 2)
    count = -(-out // plan.n2)
    y = to.reshape(_back(to, _times(to, value, K), plan, count, 2), 0, conv.ins, count * plan.n2)
    return _biased(to, to.crop(y, [0], [out], [2]) if out != count * plan.n2 else y, conv)


def _overlap_add(to: Emitter, conv: Convolution, block: int) -> ir.Value:
    """Blocks of L make 2 L outputs of the full convolution each: the second half is added to the next one's first."""
    size, before, _, taps, out = conv.along(0)
    block = max(block, taps - 1)
    n2 = max(8, round(math.sqrt(block / 2) / 8) * 8)
    half = -(-block // n2)
    plan = FourStep(2 * half, n2, half)
    length, c = half * n2, conv.ins
    count = -(-size // length)
    x = to.reshape(to.pad(conv.x, [0, 0, 0], [0, 0, count * length - size]), 0, c, count, half, n2)
    K = plan.spectrum(dft.placed(conv.weight[:, 0].astype(np.float64), taps - 1, plan.n))
    y = _back(to, _times(to, _forth(to, x, plan, 3), K[:, None]), plan, 2 * half, 3)
    first, second = to.halves(y, 3, half)
    nothing, one = [0] * 5, [0, 0, 1, 0, 0]
    y = to.op("Add", to.pad(first, nothing, one), to.pad(second, one, nothing))
    start = taps - 1 - before
    return to.crop(to.reshape(y, 0, c, (count + 1) * length), [start], [start + out], [2])


# ---------------------------------------------------------------------------------------------- circulant matrices


def circulant(to: Emitter, x: ir.Value, column: Array, n1: int, one: bool = False) -> ir.Value:
    """Write the product of x[rows, n] with a circulant matrix by its first column and return it.

    n = n1 n2; with t = n2 a + b, the spectra along a are mixed by a matrix of n2 x n2 at each frequency. `one`: x has
    one row.
    """
    (n,) = column.shape
    n2, h = n // n1, dft.halved(n1)
    z = to.op("MatMul", to.weight(_side_by_side(dft.forward(n1, n1).T).T, "F"), to.reshape(x, -1, n1, n2))
    z = to.reshape(z, h, 1, 2 * n2) if one else to.transpose(to.reshape(z, -1, h, 2 * n2), 1, 0, 2)
    z = to.op("MatMul", z, to.weight(_mixing(dft.polyphase(column.astype(np.float64), n1)), "K"))
    z = to.reshape(z if one else to.transpose(z, 1, 0, 2), -1, 2 * h, n2)
    return to.reshape(to.op("MatMul", to.weight(_side_by_side(dft.inverse(n1, n1)), "F"), z), -1, n)


def _mixing(K: Array) -> Array:
    """Return the real form [f, 2 q, 2 p] of complex matrices K[f, p, q], rows times columns: real parts first."""
    turned = K.swapaxes(-1, -2)
    upper, lower = (np.concatenate(pair, -1) for pair in ((turned.real, turned.imag), (-turned.imag, turned.real)))
    return np.concatenate([upper, lower], -2)


def blocks(to: Emitter, x: ir.Value, C: Array) -> ir.Value:
    """Write y = circulant(C[p, q, b]) x for x[rows, q b]; return y.

    Per frequency, real and imaginary parts side by side: [q 2] to [p 2].
    """
    p, q, b = C.shape
    half = dft.halved(b)
    z = to.op("MatMul", to.reshape(x, -1, b), to.weight(_side_by_side(dft.forward(b, b).T), "F"))
    z = to.transpose(to.reshape(z, -1, q, half, 2), 2, 0, 1, 3)
    K = np.fft.rfft(C.astype(np.float64)).transpose(2, 0, 1)
    W = _mixing(K).reshape(half, 2, q, 2, p).transpose(0, 2, 1, 4, 3)
    z = to.op("MatMul", to.reshape(z, half, -1, 2 * q), to.weight(W.reshape(half, 2 * q, 2 * p), "K"))
    z = to.transpose(to.reshape(z, half, -1, p, 2), 1, 2, 0, 3)
    y = to.op("MatMul", to.reshape(z, -1, 2 * half), to.weight(_side_by_side(dft.inverse(b, b)).T, "F"))
    return to.reshape(y, -1, p * b)


def _side_by_side(matrix: Array) -> Array:
    """Return a matrix [r, 2 h], real parts first, with each frequency's imaginary part beside its real part."""
    r, twice = matrix.shape
    return np.ascontiguousarray(matrix.reshape(r, 2, twice // 2).transpose(0, 2, 1)).reshape(r, twice)
