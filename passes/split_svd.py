"""Split a dense layer or a convolution into two thinner ones, the best approximation of a rank.

y = W x + b  becomes  y = A (B x) + b',  W[o, d] ~= A[o, r] B[r, d]; a k x k convolution keeps its kernel, stride, pads
and dilation in the first factor (r filters), the second is 1 x 1. On calibration data the rank-r weight that loses the
least output is found in closed form: A the leading eigenvectors of W H W^T, B = A^T W, H the inputs' covariance; the
mean goes into the bias. Without data H is the identity. `rank: evbmf` keeps what stands out of a weight's noise.

Fires:  Gemm, MatMul with one constant matrix, Conv with any kernel and groups (a rank per group); weight plain and read
        once; r (o + d) < o d.
Error:  E|dy|^2 = the discarded eigenvalues of W H W^T; without data |dy|_2 <= (s[r] + 8 eps |s|_2) |x|_2 at dense
        layers and 1 x 1 convolutions, s the singular values from s[0] on, eps the rounding of the weight's type.
Cost:   o d -> r (o + d) multiply-adds per row, and parameters.
Source: Denton et al. 2014, arXiv:1404.0736; Xue et al. 2013 (Interspeech); Izenman 1975; Wang et al. 2024,
        arXiv:2403.07378 (whitening); Nakajima et al. 2013 (EVBMF).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile.analysis import linear
from ccompile.core import Array, Choice, Site, Skip
from ccompile.moments import Layer
from ccompile.noise_ranks import NoiseRanked
from ccompile.numerics import evbmf, svd, weighted
from ccompile.splitting import Factors, LayerPrice
from ccompile.stages import Stage


class SplitSvd(NoiseRanked):
    """Options of split-svd: exactly one of keep, error, rank and energy."""

    ops: ClassVar[tuple[str, ...]] = ("Gemm", "MatMul", "Conv")

    energy: float | None = Field(None, gt=0, le=1, description="share of the output's power kept at every site")

    @classmethod
    def strengths(cls) -> tuple[str, ...]:
        """Return the options of which one says how strong."""
        return ("keep", "error", "rank", "energy")

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        return ""

    def most(self, form: Layer) -> int:
        """Return full rank."""
        return min(form.out, form.columns)

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of B and A."""
        ones = (1,) * len(form.kernel)
        first = (rank, form.channels, *form.kernel) if form.kernel else (rank, form.columns)
        return [first, (form.out, rank, *ones)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return B, then A."""
        return Stage("V", weights[0]), Stage("U", weights[1])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the rank's best factors, of balanced size without data."""
        if H is None:
            A, B = svd.best(W, rank)
            lost = float(np.square(W - A @ B).sum())
        else:
            U, s, V = weighted.decompose(W, H)
            A, B = U[:, :rank], V[:rank]
            lost = float(np.square(s[rank:]).sum())
        first, second = self.shapes(form, rank)
        parts = self.stages(form, [B.reshape(first), A.reshape(second)])
        return Factors(parts, A @ B, lost)

    def losses(self, W: Array, H: Array | None, form: Layer, ranks: Sequence[int]) -> list[float]:
        """Return the loss at each rank: one decomposition tells them all."""
        s = svd.spectrum(W) if H is None else weighted.spectrum(W, H)
        tail = np.concatenate([np.cumsum(np.square(s[::-1]))[::-1], [0.0]])
        return [float(tail[rank]) for rank in ranks]

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return all ranks."""
        return list(range(self.most(form), 0, -1))

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return what `energy` or the other strengths ask for."""
        return super().pick(site, choices) if self.energy is None else self.within(site, choices, 1 - self.energy)

    def noise_rank(self, W: Array, form: Layer) -> int:
        """Return the rank that stands out of the noise in W[g, o, d], the greatest of all groups."""
        return max(evbmf.rank(group) for group in W)

    def bound(self, node: ir.Node, form: Layer, rank: int) -> float | None:
        """Return s[r] and what rounding adds, where rows of the input are read once each."""
        if form.groups > 1 or form.taps > 1:
            return None
        W = linear.matrix(node, form)[0]
        s = svd.spectrum(W)
        eps = float(ml_dtypes.finfo(linear.matrix_dtype(node, form)).eps)  # type: ignore[no-untyped-call]
        return (float(s[rank]) if rank < len(s) else 0.0) + 8 * eps * float(np.linalg.norm(s))
