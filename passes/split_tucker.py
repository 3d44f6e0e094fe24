"""Split a convolution into a thin one between two 1 x 1 convolutions.

W[o, c, i, j] ~= sum_sr A[o, s] G[s, r, i, j] B[r, c]:  1 x 1 from c to r channels, k x k from r to s with the layer's
stride, pads and dilation, 1 x 1 to o. The rank is that of the input side, the output side's is in proportion
(`sides: both`), or there is no A (`sides: input`). On calibration data the factors are found by alternating least
squares in the metric of the inputs' covariance, from HOSVD without data.

Fires:  Conv with a kernel of more than one tap, any stride, pads, dilation and groups (ranks per group); weight plain
        and read once; r c + r s k + s o < o c k.
Error:  measured on calibration data.
Cost:   o c k -> r c + r s k + s o parameters; multiply-adds likewise, the first stage before the stride.
Source: Kim et al. 2016, arXiv:1511.06530 (Tucker-2); Tucker 1966; De Lathauwer et al. 2000 (HOSVD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import tucker
from ccompile.splitting import ONE_TAP, Factors, Split
from ccompile.stages import Stage


class SplitTucker(Split):
    """Options of split-tucker: exactly one of keep, error and rank."""

    sides: Literal["both", "input"] = Field(
        "both", description="which channels become fewer: of both sides, or the input's"
    )

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        return "" if form.taps > 1 else ONE_TAP

    def most(self, form: Layer) -> int:
        """Return the input rank at which the split is exact."""
        return tucker.rank_max(self._shape(form))[0]

    def _shape(self, form: Layer) -> tuple[int, int, int, int]:
        return (form.out, form.channels, 1, form.taps)

    def _output_rank(self, form: Layer, rank: int) -> int | None:
        if self.sides == "input":
            return None
        inputs, outputs = tucker.rank_max(self._shape(form))
        least = -(-rank // form.taps)  # what the rank needs of outputs to be of use
        return max(least, min(outputs, round(rank * outputs / inputs), rank * form.taps))

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of B, G and, with both sides, A."""
        ones, output = (1,) * len(form.kernel), self._output_rank(form, rank)
        middle = form.out if output is None else output
        last = [] if output is None else [(form.out, output, *ones)]
        return [(rank, form.channels, *ones), (middle, rank, *form.kernel), *last]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return B, G and A."""
        return tuple(Stage(letter, weight) for letter, weight in zip("BGA", weights, strict=False))

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d]."""
        found = tucker.fit(W.reshape(self._shape(form)), H, rank, self._output_rank(form, rank))
        kernels = found.kernels()
        shaped = [kernel.reshape(shape) for kernel, shape in zip(kernels, self.shapes(form, rank), strict=True)]
        return Factors(self.stages(form, shaped), found.compose().reshape(W.shape), found.loss)
