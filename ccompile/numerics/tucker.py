"""Tucker splits: a k x k convolution between few channels, with 1 x 1 convolutions before and after it.

    Tucker-2:  What[o, c, i, j] = sum_sr A[o, s] G[s, r, i, j] B[r, c]        (1 x 1 with B, k x k with G, 1 x 1 with A)
    Tucker-1:  the same without A (input side only); the output side only is `weighted.truncate`.

Without data: HOSVD, then HOOI. With the Gram matrix of the inputs: see bottleneck.py.
Parameters: r c + s r kh kw + o s.

Source: Tucker 1966; De Lathauwer et al. 2000; Kim et al. 2015, arXiv:1511.06530.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import bottleneck, weighted

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tucker:
    """`B`[r, c] with orthonormal rows, `G`[s, r, kh, kw], `A`[o, s] with orthonormal columns or None (Tucker-1).

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    A: Array | None
    G: Array
    B: Array
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return _compose(self.A, self.G, self.B)

    def kernels(self) -> tuple[Array, ...]:
        """Return the convolutions' weights in order: [r, c, 1, 1], [s, r, kh, kw] and, with A, [o, s, 1, 1]."""
        last = () if self.A is None else (self.A[..., None, None],)
        return self.B[..., None, None], self.G, *last


def fit(
    W: Array,
    H: Array | None,
    rank: int,
    output_rank: int | None = None,
    sweeps: int = bottleneck.SWEEPS,
    steps: int = bottleneck.STEPS,
) -> Tucker:
    """Return the split of W[o, c, kh, kw] to `rank` input and `output_rank` output channels (None: input side only).

    H[d, d], d = c kh kw, or None: without data. With data the loss is never above that of the split without. Raises
    ValueError where shapes do not fit, an entry is not finite, or a rank is above what the other can use:
    rank <= min(c, output_rank kh kw), output_rank <= min(o, rank kh kw).

    >>> split = fit(np.ones((4, 3, 2, 2)), None, 1, 1)
    >>> split.error < 1e-12, [kernel.shape for kernel in split.kernels()]
    (True, [(1, 3, 1, 1), (1, 1, 2, 2), (4, 1, 1, 1)])
    """
    _, H = weighted.checked(W, H)
    o, c, kh, kw = W.shape
    found = bottleneck.fit(W.reshape(o, c, kh * kw), H, rank, output_rank, sweeps, steps)
    G = found.core.reshape(-1, rank, kh, kw)
    What = _compose(found.A, G, found.B)
    return Tucker(found.A, G, found.B, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def rank_max(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the input and the output rank at which the split of a weight [o, c, kh, kw] is exact.

    >>> rank_max((8, 64, 1, 3)), rank_max((64, 4, 3, 3))
    ((24, 8), (4, 36))
    """
    o, c, kh, kw = shape
    return min(c, o * kh * kw), min(o, c * kh * kw)


def parameters(shape: tuple[int, ...], rank: int, output_rank: int | None = None) -> tuple[int, ...]:
    """Return how many weights the convolutions have, in order.

    >>> parameters((8, 6, 3, 3), 2, 4), parameters((8, 6, 3, 3), 2)
    ((12, 72, 32), (12, 144))
    """
    o, c, kh, kw = shape
    if output_rank is None:
        return rank * c, o * rank * kh * kw
    return rank * c, output_rank * rank * kh * kw, o * output_rank


def _compose(A: Array | None, G: Array, B: Array) -> Array:
    inner = np.ascontiguousarray(np.moveaxis(np.tensordot(G, B, (1, 0)), 3, 1))
    return inner if A is None else np.tensordot(A, inner, 1)
