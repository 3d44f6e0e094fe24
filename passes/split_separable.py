"""Split a convolution into a few depthwise kernels per channel and a 1 x 1 convolution that mixes them.

W[o, c, t] ~= sum_m P[o, c, m] D[m, c, t]:  each input channel passes through m kernels of its own with the layer's
stride, pads and dilation, and P mixes all of them: a sum of m depthwise-separable convolutions. The rank is m; full, at
m = min(o, taps), it is exact. With `kernels: separable` each of the m is itself a k x 1 and a 1 x k one, m = taps is
exact, and two depthwise convolutions come before P. On calibration data P is an exact regression given the kernels, and
they descend given P.

Fires:  Conv with a kernel of more than one tap (`separable`: in two dimensions, more than one along both), one group,
        any stride, pads and dilation; weight plain and read once; m (c k + o c) < o c k.
Error:  measured on calibration data.
Cost:   o c k -> m (c k + o c) multiply-adds per position, and parameters; `separable`: m (c kh + c kw + o c), the k x 1
        kernels at the stride of their axis only.
Source: Guo et al. 2018, arXiv:1808.05517 (network decoupling); Howard et al. 2017, arXiv:1704.04861; Jaderberg et al.
        2014, arXiv:1405.3866 (scheme 1: `separable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import separable, separable_basis
from ccompile.splitting import Factors, LayerPrice, Split, of_taps
from ccompile.stages import Sides, Stage


class SplitSeparable(Split):
    """Options of split-separable: exactly one of keep, error and rank."""

    kernels: Literal["whole", "separable"] = Field(
        "whole", description="depthwise kernels as they come, or each a product of a column and a row"
    )

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        if self.kernels == "whole":
            return of_taps(form)
        if len(form.kernel) == 2 and min(form.kernel) == 1 < form.taps:
            return f"kernel {form.kernel[0]}x{form.kernel[1]}: it has not two axes to part"
        return of_taps(form, axes=2)

    def _shape(self, form: Layer) -> tuple[int, int, int, int]:
        return (form.out, form.channels, 1, form.taps)

    def most(self, form: Layer) -> int:
        """Return the number of terms at which the split is exact."""
        return separable.terms_max(self._shape(form)) if self.kernels == "whole" else form.taps

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return all numbers of terms."""
        return list(range(self.most(form), 0, -1))

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of D and P, or of V, U and P."""
        wide = rank * form.channels
        mixing = (form.out, wide, *(1,) * len(form.kernel))
        if self.kernels == "whole":
            return [(wide, 1, *form.kernel), mixing]
        return [(wide, 1, form.kernel[0], 1), (wide, 1, 1, form.kernel[1]), mixing]

    def scales_with(self, form: Layer) -> tuple[Sides, ...]:
        """Return what the cost goes with: of kernels, and also of P, with the inputs."""
        reading = ((True, False),) * (1 if self.kernels == "whole" else 2)
        return (*reading, (True, True))

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the depthwise kernels, and what mixes them."""
        if self.kernels == "whole":
            return Stage("D", weights[0], form.channels), Stage("P", weights[1])
        return Stage("V", weights[0], form.channels), Stage("U", weights[1], len(weights[1])), Stage("P", weights[2])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the sum of `rank` depthwise-separable convolutions."""
        found: separable.Separable | separable_basis.Basis
        if self.kernels == "whole":
            found = separable.fit(W.reshape(self._shape(form)), H, rank)
        else:
            found = separable_basis.fit(W.reshape(form.out, form.channels, *form.kernel), H, rank)
        shaped = [kernel.reshape(shape) for kernel, shape in zip(found.kernels(), self.shapes(form, rank), strict=True)]
        return Factors(self.stages(form, shaped), found.compose().reshape(W.shape), found.loss)
