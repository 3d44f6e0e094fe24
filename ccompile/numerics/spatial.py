"""Spatial splits: a k x k convolution as a k x 1 convolution to few channels followed by a 1 x k one.

    vertical:    What[o, c, i, j] = sum_r U[o, r, j] V[r, c, i]        (kh x 1 with V first, then 1 x kw with U)
    horizontal:  What[o, c, i, j] = sum_r U[o, r, i] V[r, c, j]        (1 x kw with V first, then kh x 1 with U)

Without data the optimum is global: the SVD of W[(c, i), (o, j)], whose discarded spectrum is the error. With the Gram
matrix of the inputs see bottleneck.py. Parameters: r (c kh + o kw), or r (c kw + o kh).

Source: Jaderberg et al. 2014, arXiv:1405.3866 (scheme 2); Tai et al. 2016, arXiv:1511.06067 (closed form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ccompile.numerics import bottleneck, bottleneck_losses, svd, weighted

Array = npt.NDArray[Any]
Order = Literal["vertical", "horizontal"]


@dataclass(frozen=True, eq=False)
class Spatial:
    """`V`[r, c, k] of the first convolution and `U`[o, r, k] of the second; V has orthonormal rows.

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    U: Array
    V: Array
    order: Order
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return _compose(self.U, self.V, self.order)

    def kernels(self) -> tuple[Array, Array]:
        """Return the two convolutions' weights: [r, c, kh, 1] and [o, r, 1, kw], or [r, c, 1, kw] and [o, r, kh, 1]."""
        if self.order == "vertical":
            return self.V[..., None], self.U[:, :, None]
        return self.V[:, :, None], self.U[..., None]


def fit(
    W: Array,
    H: Array | None,
    rank: int,
    order: Order = "vertical",
    sweeps: int = bottleneck.SWEEPS,
    steps: int = bottleneck.STEPS,
) -> Spatial:
    """Return the split of W[o, c, kh, kw] of this rank with H[d, d], d = c kh kw, or the best one without data.

    With data the loss is never above that of the split without. Raises ValueError where shapes do not fit, an entry is
    not finite, or the rank is not in 1 .. `rank_max`.

    >>> split = fit(np.outer([1.0, 2.0, 1.0], [1.0, 0.0, -1.0])[None, None], None, 1)
    >>> split.error < 1e-12, [kernel.shape for kernel in split.kernels()]
    (True, [(1, 1, 3, 1), (1, 1, 1, 3)])
    """
    _, H = weighted.checked(W, H)
    weighted.check_rank(rank, rank_max(W.shape, order))
    o, c, kh, kw = W.shape
    first, last = (kh, kw) if order == "vertical" else (kw, kh)
    G = _gram(H, (c, kh, kw), order)
    found = bottleneck.fit(_turned(W, order).reshape(o, c * first, last), G, rank, None, sweeps, steps)
    U, V = found.core, found.B.reshape(rank, c, first)
    What = _compose(U, V, order)
    return Spatial(U, V, order, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def spectrum(W: Array, order: Order = "vertical") -> Array:
    """Return s[rank_max], descending: without data the loss at rank r is sum(s[r:]**2).

    >>> spectrum(np.ones((1, 1, 2, 2))).round(9).tolist()
    [2.0, 0.0]
    """
    turned = _turned(W, order).transpose(1, 2, 0, 3)
    return svd.spectrum(turned.reshape(turned.shape[0] * turned.shape[1], -1))


def losses(W: Array, H: Array | None, ranks: Sequence[int], order: Order = "vertical") -> list[float]:
    """Return what `fit` loses of W[o, c, kh, kw] at each rank: exactly without data, else about that or a little more.

    Raises ValueError as `fit` does.

    >>> losses(np.eye(2)[None, None], None, [1, 2])
    [1.0, 0.0]
    """
    _, H = weighted.checked(W, H)
    for rank in ranks:
        weighted.check_rank(rank, rank_max(W.shape, order))
    if H is None:
        squares = np.square(spectrum(W, order))
        return [float(squares[rank:].sum()) for rank in ranks]
    o, c, kh, kw = W.shape
    first, last = (kh, kw) if order == "vertical" else (kw, kh)
    flat = _turned(W, order).reshape(o, c * first, last)
    chain = bottleneck_losses.chain(flat, _gram(H, (c, kh, kw), order), sorted(set(ranks), reverse=True))
    return [chain.refined(rank, None) for rank in ranks]


def rank_max(shape: tuple[int, ...], order: Order = "vertical") -> int:
    """Return the rank at which the split of a weight [o, c, kh, kw] is exact.

    >>> rank_max((8, 2, 3, 5)), rank_max((8, 2, 3, 5), "horizontal")
    (6, 10)
    """
    o, c, kh, kw = shape
    return min(c * kh, o * kw) if order == "vertical" else min(c * kw, o * kh)


def parameters(shape: tuple[int, ...], rank: int, order: Order = "vertical") -> tuple[int, int]:
    """Return how many weights the first and the second convolution have.

    >>> parameters((8, 2, 3, 5), 4)
    (24, 160)
    """
    o, c, kh, kw = shape
    return (rank * c * kh, rank * o * kw) if order == "vertical" else (rank * c * kw, rank * o * kh)


def _turned(W: Array, order: Order) -> Array:
    """Return W[o, c, i, j] with the tap of the first convolution before that of the second."""
    return W if order == "vertical" else W.transpose(0, 1, 3, 2)


def _gram(H: Array | None, shape: tuple[int, int, int], order: Order) -> Array | None:
    if H is None or order == "vertical":
        return H
    index = np.arange(len(H)).reshape(shape).transpose(0, 2, 1).ravel()
    return H[np.ix_(index, index)]


def _compose(U: Array, V: Array, order: Order) -> Array:
    What = np.ascontiguousarray(np.einsum("orj,rci->ocij", U, V, optimize=True))
    return What if order == "vertical" else np.ascontiguousarray(What.transpose(0, 1, 3, 2))
