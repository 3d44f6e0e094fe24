"""Split a convolution into channels that never mix: 1 x 1, depthwise along each axis, 1 x 1.

W[o, c, i, j] ~= sum_r a[o, r] b[r, c] v[r, i] h[r, j]  (`way: 4`), or with one depthwise k x k kernel t[r, i, j]
(`way: 3`). On calibration data the factors are found by alternating least squares in the metric of the inputs'
covariance. A best CP approximation need not exist: where terms grow and cancel (summed squared norms above three times
the weight's), the error-preserving correction shrinks them, for ever more error; a split that stays degenerate is
replaced by a Tucker split that costs no more, and the site says so.

Fires:  Conv with a kernel of more than one tap (`way: 4`: along both of two axes), one group, any stride, pads and
        dilation; weight plain and read once; r (o + c + kh + kw) < o c kh kw.
Error:  measured on calibration data.
Cost:   o c k -> r (o + c + kh + kw) parameters, or r (o + c + kh kw); multiply-adds likewise, 1 x 1 before the stride.
Source: Lebedev et al. 2015, arXiv:1412.6553; Phan et al. 2020, arXiv:2008.05441 (correction); de Silva and Lim 2008,
        arXiv:math/0607647 (degeneracy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import cp, tucker
from ccompile.splitting import Factors, Split, of_taps
from ccompile.stages import Stage

SLACKS = (1.02, 1.05, 1.1, 1.2)  # what the correction may make of the error, the first that is enough


class SplitCp(Split):
    """Options of split-cp: exactly one of keep, error and rank."""

    way: Literal[3, 4] = Field(4, description="4: a depthwise convolution per axis; 3: one depthwise k x k")
    seed: int = Field(0, ge=0, le=2**31, description="of the random starts")

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        if reason := of_taps(form):
            return reason
        if self.way == 4 and (len(form.kernel) != 2 or min(form.kernel) == 1):
            return f"kernel {'x'.join(map(str, form.kernel))}: it has not two axes to part, `way: 3` splits it"
        return ""

    def _shape(self, form: Layer) -> tuple[int, int, int, int]:
        kernel = form.kernel if len(form.kernel) == 2 else (1, form.taps)
        return (form.out, form.channels, kernel[0], kernel[1])

    def most(self, form: Layer) -> int:
        """Return the rank at which the split is exact."""
        return cp.rank_max(self._shape(form), self.way)

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of b, v and h, or t, and a."""
        ones = (1,) * len(form.kernel)
        middle = [(rank, 1, *form.kernel)]
        if self.way == 4:
            kh, kw = form.kernel
            middle = [(rank, 1, kh, 1), (rank, 1, 1, kw)]
        return [(rank, form.channels, *ones), *middle, (form.out, rank, *ones)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the 1 x 1, the depthwise and the last 1 x 1 stages."""
        first, *middle, last = weights
        depthwise = (Stage(f"T{number}", weight, len(weight)) for number, weight in enumerate(middle))
        return Stage("B", first), *depthwise, Stage("A", last)

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d], corrected where it is degenerate."""
        tensor = W.reshape(self._shape(form))
        found = cp.fit(tensor, H, rank, self.way, seed=self.seed)
        error = found.error
        for slack in SLACKS:
            if found.degenerate:
                found = cp.correct(found, tensor, H, slack * error)
        note = f"the CP terms cancel, {found.degeneracy:.3g} times the weight's power" if found.degenerate else ""
        if found.degenerate and (pairs := self._tucker_ranks(form, rank)):
            return self._tucker(W, H, form, pairs[-1], f"a Tucker split instead: {note}")
        shaped = [kernel.reshape(shape) for kernel, shape in zip(found.kernels(), self.shapes(form, rank), strict=True)]
        return Factors(self.stages(form, shaped), found.compose().reshape(W.shape), found.loss, note)

    def losses(self, W: Array, H: Array | None, form: Layer, ranks: Sequence[int]) -> list[float]:
        """Return about what each rank loses of one group, each from the one above it."""
        return cp.losses(W.reshape(self._shape(form)), H, ranks, self.way)

    def _tucker_ranks(self, form: Layer, rank: int) -> list[tuple[int, int]]:
        """Return the ranks, in proportion, of Tucker splits that cost no more, smallest first.

        Its first stage costs no more than the CP split's, and the others together no more than the others: they run at
        no more positions, so that holds for multiply-adds as for parameters.
        """
        shape, (_, *rest) = self._shape(form), self.shapes(form, rank)
        most, most_output = tucker.rank_max(shape)
        found = []
        for r in range(1, min(rank, most) + 1):
            least = -(-r // form.taps)  # what the rank needs of outputs to be of use
            s = max(least, min(most_output, round(r * most_output / most), r * form.taps))
            if sum(tucker.parameters(shape, r, s)[1:]) <= sum(math.prod(stage) for stage in rest):
                found.append((r, s))
        return found

    def _tucker(self, W: Array, H: Array | None, form: Layer, ranks: tuple[int, int], note: str) -> Factors:
        """Return the Tucker split of these ranks."""
        found = tucker.fit(W.reshape(self._shape(form)), H, *ranks)
        ones = (1,) * len(form.kernel)
        sizes = [(*k.shape[:2], *(form.kernel if index == 1 else ones)) for index, k in enumerate(found.kernels())]
        weights = [kernel.reshape(size) for kernel, size in zip(found.kernels(), sizes, strict=True)]
        stages = tuple(Stage(letter, weight) for letter, weight in zip("BGA", weights, strict=True))
        return Factors(stages, found.compose().reshape(W.shape), found.loss, note)
