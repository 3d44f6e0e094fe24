"""Split a k x k convolution into a k x 1 and a 1 x k one through few channels.

W[o, c, i, j] ~= sum_r U[o, r, j] V[r, c, i]:  first V along the height, then U along the width, or the other way
round; each takes the stride, pads and dilation of its axis. On calibration data U and V are found by alternating
least squares in the metric of the inputs' covariance, from the closed-form optimum without data.

Fires:  Conv in two dimensions with a kernel > 1 along both, any stride, pads, dilation and groups (a rank per group);
        weight plain and read once; r (c kh + o kw) < o c kh kw.
Error:  measured on calibration data; without data |W - What|_2 is the discarded spectrum of W[(c, i), (o, j)].
Cost:   o c kh kw -> r (c kh + o kw) parameters; multiply-adds likewise, the first stage at the stride of its axis only.
Source: Jaderberg et al. 2014, arXiv:1405.3866 (scheme 2); Tai et al. 2016, arXiv:1511.06067 (closed form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import spatial
from ccompile.splitting import Factors, Split
from ccompile.stages import Stage


class SplitSpatial(Split):
    """Options of split-spatial: exactly one of keep, error and rank."""

    order: Literal["vertical", "horizontal"] = Field(
        "vertical", description="which axis the first convolution runs along"
    )

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        if len(form.kernel) != 2 or min(form.kernel) == 1:
            return f"kernel {'x'.join(map(str, form.kernel))}: it has not two axes to part"
        return ""

    def most(self, form: Layer) -> int:
        """Return the rank at which the split is exact."""
        return spatial.rank_max(self._shape(form), self.order)

    def _shape(self, form: Layer) -> tuple[int, ...]:
        return (form.out, form.channels, *form.kernel)

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of V and U."""
        kh, kw = form.kernel
        if self.order == "vertical":
            return [(rank, form.channels, kh, 1), (form.out, rank, 1, kw)]
        return [(rank, form.channels, 1, kw), (form.out, rank, kh, 1)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return V, then U."""
        return Stage("V", weights[0]), Stage("U", weights[1])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d]."""
        found = spatial.fit(W.reshape(self._shape(form)), H, rank, self.order)
        return Factors(self.stages(form, found.kernels()), found.compose().reshape(W.shape), found.loss)
