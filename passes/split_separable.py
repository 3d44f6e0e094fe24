"""Split a convolution into a few depthwise kernels per channel and a 1 x 1 convolution that mixes them.

W[o, c, t] ~= sum_m P[o, c, m] D[m, c, t]:  each input channel passes through m kernels of its own with the layer's
stride, pads and dilation, and P mixes all of them: a sum of m depthwise-separable convolutions. The rank is m; full, at
m = min(o, taps), it is exact. On calibration data P is an exact regression given D, and D descends given P.

Fires:  Conv with a kernel of more than one tap, one group, any stride, pads and dilation; weight plain and read once;
        m (c k + o c) < o c k.
Error:  measured on calibration data.
Cost:   o c k -> m (c k + o c) multiply-adds per position, and parameters.
Source: Guo et al. 2018, arXiv:1808.05517 (network decoupling); Howard et al. 2017, arXiv:1704.04861.
"""

from __future__ import annotations

from collections.abc import Sequence

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import separable
from ccompile.splitting import Factors, LayerPrice, Split, of_taps
from ccompile.stages import Sides, Stage


class SplitSeparable(Split):
    """Options of split-separable: exactly one of keep, error and rank."""

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        return of_taps(form)

    def _shape(self, form: Layer) -> tuple[int, int, int, int]:
        return (form.out, form.channels, 1, form.taps)

    def most(self, form: Layer) -> int:
        """Return the number of terms at which the split is exact."""
        return separable.terms_max(self._shape(form))

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return all numbers of terms."""
        return list(range(self.most(form), 0, -1))

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of D and P."""
        wide = rank * form.channels
        return [(wide, 1, *form.kernel), (form.out, wide, *(1,) * len(form.kernel))]

    def scales_with(self, form: Layer) -> tuple[Sides, ...]:
        """Return what the cost goes with: of D, and also of P, with the inputs."""
        return (True, False), (True, True)

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the depthwise kernels, and what mixes them."""
        return Stage("D", weights[0], form.channels), Stage("P", weights[1])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the sum of `rank` depthwise-separable convolutions."""
        found = separable.fit(W.reshape(self._shape(form)), H, rank)
        shaped = [kernel.reshape(shape) for kernel, shape in zip(found.kernels(), self.shapes(form, rank), strict=True)]
        return Factors(self.stages(form, shaped), found.compose().reshape(W.shape), found.loss)
