"""Discrete Fourier transforms as matrices: of short lengths at once, of long ones in four steps.

    X[f] = sum_t x[t] w^(f t),   w = exp(-2 pi i / n);    x real: X[n - f] = conj X[f], so f = 0 .. n // 2 are enough

`forward` gives real parts above imaginary parts; `inverse` weighs the frequencies that stand for two. With n = n1 n2,
t = n2 a + b and f = c + n1 d (Bailey's four steps):

    X[c + n1 d] = sum_b w2^(b d) ( w^(b c) sum_a x[n2 a + b] w1^(a c) ),     w1 = w^n2, w2 = w^n1,

and for real x the half c <= n1 // 2 is enough. Circular correlation with a kernel is a product of spectra; of length
n >= max(size + max(pads), outputs) it is the padded one.

Source: Mathieu et al. 2014, arXiv:1312.5851; Bailey 1990, FFTs in external or hierarchical memory; Gauss's product with
three multiplications: Knuth, The Art of Computer Programming 2, section 4.6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def roots(rows: int, columns: int, n: int) -> Array:
    """Return exp(-2 pi i r c / n), [rows, columns], accurate for any size.

    >>> roots(2, 2, 2).round(12).real.tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    return np.asarray(np.exp(-2j * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % n) / n))


def halved(n: int) -> int:
    """Return how many frequencies of a real signal of length n are enough.

    >>> halved(8), halved(7)
    (5, 4)
    """
    return n // 2 + 1


def doubled(n: int) -> Array:
    """Return how many frequencies each of the half spectrum stands for: 1 or 2, [halved(n)].

    >>> doubled(4).tolist(), doubled(5).tolist()
    ([1.0, 2.0, 1.0], [1.0, 2.0, 2.0])
    """
    times = np.full(halved(n), 2.0)
    times[0] = 1.0
    if n % 2 == 0:
        times[-1] = 1.0
    return times


def forward(n: int, size: int) -> Array:
    """Return the half spectrum of `size` real entries, then zeros: [2 halved(n), size], real parts first."""
    F = roots(halved(n), size, n)
    return np.concatenate([F.real, F.imag])


def inverse(n: int, count: int) -> Array:
    """Return the first `count` entries of a real signal from its half spectrum: [count, 2 halved(n)]."""
    F = np.conj(roots(count, halved(n), n)) * doubled(n) / n
    return np.concatenate([F.real, -F.imag], axis=1)


def planes(F: Array) -> Array:
    """Return a complex matrix [r, c] as the real one [2 r, 2 c] that takes real parts above imaginary ones."""
    return np.block([[F.real, -F.imag], [F.imag, F.real]])


def length(size: int, before: int, after: int, taps: int) -> int:
    """Return the least length of a circular correlation that is the padded one.

    >>> length(56, 15, 15, 31), length(1024, 1023, 0, 1024)
    (71, 2047)
    """
    return max(size + max(before, after), size + before + after - taps + 1)


def placed(w: Array, before: int, n: int) -> Array:
    """Return the signal k[..., n] whose circular convolution with x is y[t] = sum_j w[..., j] x[t + j - before].

    >>> placed(np.array([1.0, 2.0, 3.0]), 1, 4).tolist()
    [2.0, 1.0, 0.0, 3.0]
    """
    found = np.zeros((*w.shape[:-1], n))
    for start in range(0, w.shape[-1], n):  # taps n apart meet
        part = w[..., start : start + n]
        found[..., (before - start - np.arange(part.shape[-1])) % n] += part
    return found


def error(*lengths: int) -> float:
    """Return what the relative L2 error of products of spectra in float32 stays below, for white data.

    lengths: of the sums that transforms make, one after the other, forth; back makes as many.
    """
    return 2 * 2.0**-24 * sum(math.sqrt(n) for n in lengths)


# ---------------------------------------------------------------------------------------------- products of spectra


@dataclass(frozen=True, eq=False)
class Bilinear:
    """A circular correlation of length n by real products: y = A [ (G g) o (B d) ], A[n, p], G[p, r], B[p, n].

    y[i] = sum_k g[k] d[(i + k) % n]; three products for each pair of conjugate frequencies, one for the real ones.
    """

    A: Array
    G: Array
    B: Array


def bilinear(n: int, taps: int) -> Bilinear:
    """Return the circular correlation of length n with a kernel of at most n taps.

    With X = a + b i and K = c + d i: p1 = c (a + b), p2 = (d - c) a, p3 = (c + d) b, X K = (p1 - p3) + (p1 + p2) i.

    >>> form = bilinear(4, 2)
    >>> (form.A @ ((form.G @ [1.0, 10.0]) * (form.B @ [1.0, 2.0, 3.0, 4.0]))).round(9).tolist()
    [21.0, 32.0, 43.0, 14.0]
    """
    F, K = roots(halved(n), n, n), np.conj(roots(halved(n), taps, n))
    back = np.conj(F) * (doubled(n) / n)[:, None]
    A: list[Array] = []
    G: list[Array] = []
    B: list[Array] = []
    for f, once in enumerate(doubled(n) == 1):
        data, kernel, y = F[f], K[f], back[f]
        if once:
            B, G, A = [*B, data.real], [*G, kernel.real], [*A, y.real]
            continue
        B += [data.real + data.imag, data.real, data.imag]
        G += [kernel.real, kernel.imag - kernel.real, kernel.real + kernel.imag]
        A += [y.real - y.imag, -y.imag, -y.real]
    return Bilinear(np.array(A).T, np.array(G), np.array(B))


# ---------------------------------------------------------------------------------------------- long signals


@dataclass(frozen=True)
class FourStep:
    """A length n1 n2; a signal is `rows` rows of n2, then zeros."""

    n1: int
    n2: int
    rows: int

    @property
    def n(self) -> int:
        """Return the length."""
        return self.n1 * self.n2

    @property
    def h(self) -> int:
        """Return the rows of the half spectrum."""
        return halved(self.n1)

    @property
    def twiddles(self) -> Array:
        """Return w^(b c), [h, n2]."""
        return roots(self.h, self.n2, self.n)

    def spectrum(self, k: Array) -> Array:
        """Return the spectrum of k[..., n] as X[..., c, d], [..., h, n2], f = c + n1 d."""
        full = np.fft.fft(k).reshape(*k.shape[:-1], self.n2, self.n1)
        return np.asarray(full.swapaxes(-1, -2)[..., : self.h, :])

    @property
    def work(self) -> float:
        """Return the multiply-adds of a transform forth and back, with what passes over memory cost beside."""
        return self.n * (2 * self.rows + 4 * self.n2 + _PASSES)


_PASSES = 100.0  # multiply-adds that take as long as the elementwise steps of one entry
_STEP = 8  # n2 is a multiple: matrix products have no use for less


def four_step(least: int, size: int) -> FourStep:
    """Return the quickest length >= least for a signal of `size` entries.

    >>> 2047 <= four_step(2047, 1024).n < 2100
    True
    """
    last = max(math.isqrt(least), _STEP)
    plans = [FourStep(max(2, -(-least // n2)), n2, -(-size // n2)) for n2 in range(_STEP, 2 * last + 1, _STEP)]
    return min(plans, key=lambda plan: plan.work)


# ---------------------------------------------------------------------------------------------- circulant matrices


def circulant_block(W: Array) -> int | None:
    """Return the largest b > 1 such that all blocks W[b i:, b j:] of b x b are circulant, exactly; None without one.

    Circulant: W[(r + 1) % b, (c + 1) % b] = W[r, c]. A wholly circulant matrix is one block.

    >>> circulant_block(np.array([[1, 3, 2], [2, 1, 3], [3, 2, 1]])), circulant_block(np.ones((2, 3)))
    (3, None)
    """
    o, i = W.shape
    common = math.gcd(o, i)
    for b in range(common, 1, -1):
        if common % b == 0 and _is_circulant(W, b):
            return b
    return None


def _is_circulant(W: Array, b: int) -> bool:
    blocks = W.reshape(W.shape[0] // b, b, W.shape[1] // b, b)
    first = blocks[:, 0]
    return all(np.array_equal(blocks[:, r], np.roll(first, r, axis=-1)) for r in range(1, b))


def first_columns(W: Array, b: int) -> Array:
    """Return the first columns C[p, q, b] of the blocks of a block-circulant W[p b, q b]: they determine it."""
    return np.ascontiguousarray(W.reshape(W.shape[0] // b, b, W.shape[1] // b, b)[..., 0].transpose(0, 2, 1))


def circulant(C: Array) -> Array:
    """Return W[p b, q b] of the first columns C[p, q, b].

    >>> circulant(np.array([[[1, 2, 3]]])).tolist()
    [[1, 3, 2], [2, 1, 3], [3, 2, 1]]
    """
    p, q, b = C.shape
    index = (np.arange(b)[:, None] - np.arange(b)) % b
    return np.ascontiguousarray(C[:, :, index].transpose(0, 2, 1, 3)).reshape(p * b, q * b)


def polyphase(column: Array, n1: int) -> Array:
    """Return the matrices K[f, n2, n2], f = 0 .. n1 // 2, that circulant(column) is along the factor n1 of n = n1 n2.

    x[n2 a + b] has the spectra X[f, b] over a; those of the product are Y[f, b'] = sum_b K[f, b', b] X[f, b]. Entry
    (b', b) is the spectrum of c[n2 a + b' - b]: of the phase (b' - b) mod n2 of c, one step late where b' < b.
    """
    phases = column.reshape(n1, -1).T  # [n2, n1]
    n2 = len(phases)
    F = np.fft.rfft(phases)
    step = np.arange(n2)[:, None] - np.arange(n2)
    late = np.exp(-2j * np.pi * np.arange(halved(n1)) / n1)
    return np.asarray(np.where(step < 0, late[:, None, None], 1) * F.T[:, step % n2])


def factor(n: int) -> int | None:
    """Return the factor n1 of n by which a circulant matrix of n x n is the quickest; None if n has none.

    Transforms take 2 n1 multiply-adds per entry forth and back; the matrices 2 n2, read once each.

    >>> factor(4096), factor(97)
    (128, None)
    """
    found = [n1 for n1 in range(2, n // 2 + 1) if n % n1 == 0]
    return min(found, key=lambda n1: (n1 + _READ * n // n1, n1), default=None)


_READ = 4  # multiply-adds on cached numbers that take as long as one with a number that is read from memory
