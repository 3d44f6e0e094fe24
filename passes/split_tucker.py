"""Split a convolution into a thin one between two 1 x 1 convolutions.

W[o, c, i, j] ~= sum_sr A[o, s] G[s, r, i, j] B[r, c]:  1 x 1 from c to r channels, k x k from r to s with the layer's
stride, pads and dilation, 1 x 1 to o; or there is no A (`sides: input`). Of the pairs of ranks that cost as much, the
one that loses least is taken, as a chain of truncated fits tells (the strength of the pair r, s is r + 100000 s);
a `rank` that is given is the input side's, and the output side's is in proportion; `rank: evbmf` finds both, each in
its unfolding of the weight. On calibration data the factors are found by alternating least squares in the metric of the
inputs' covariance, from HOSVD without data.

Fires:  Conv with a kernel of more than one tap, any stride, pads, dilation and groups (ranks per group); weight plain
        and read once; r c + r s k + s o < o c k.
Error:  measured on calibration data.
Cost:   o c k -> r c + r s k + s o parameters; multiply-adds likewise, the first stage before the stride.
Source: Kim et al. 2016, arXiv:1511.06530 (Tucker-2); Tucker 1966; De Lathauwer et al. 2000 (HOSVD).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.noise_ranks import NoiseRanked
from ccompile.numerics import bottleneck_losses, evbmf, tucker
from ccompile.splitting import LEVELS, ONE_TAP, Factors, LayerPrice, Point, Task
from ccompile.stages import Stage

PAIR = 100_000  # a rank of r + PAIR s is the pair of the input rank r and the output rank s
WIDE = 64  # up to so many input channels the pairs of a curve are refined; above the chain is as near and dear
FINER = tuple((a + b) / 2 for a, b in pairwise(LEVELS))  # levels that a chain tells besides


class SplitTucker(NoiseRanked):
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

    def ranks_of(self, form: Layer, rank: int) -> tuple[int, int | None]:
        """Return the input rank and the output rank that a rank means: a pair, or one rank and another in proportion.

        None: the output side stays as it is.
        """
        if self.sides == "input":
            return rank, None
        output, rank = divmod(rank, PAIR)
        if output:
            return rank, output
        inputs, outputs = tucker.rank_max(self._shape(form))
        least = -(-rank // form.taps)  # what the rank needs of outputs to be of use
        return rank, max(least, min(outputs, round(rank * outputs / inputs), rank * form.taps))

    def label(self, rank: int) -> str:
        """Return what a rank is called: a pair by both."""
        output, rank = divmod(rank, PAIR)
        return f"ranks {rank} and {output}" if output else f"rank {rank}"

    def whole(self, form: Layer) -> str:
        """Return what the ranks are called at which the split is exact."""
        return " and ".join(map(str, tucker.rank_max(self._shape(form))))

    def like(self, rank: int, form: Layer) -> Sequence[int]:
        """Return the ranks of a layer that was cut: pairs in the same proportion, as far as sides go."""
        output, rank = divmod(rank, PAIR)
        if not output:
            return super().like(rank, form)
        found = []
        for r in range(min(2 * rank, self.most(form)), 0, -1):
            s = min(max(round(r * output / rank), -(-r // form.taps)), form.out, r * form.taps)
            found.append(r + PAIR * s)
        return found

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of B, G and, with both sides, A."""
        ones, (rank, output) = (1,) * len(form.kernel), self.ranks_of(form, rank)
        middle = form.out if output is None else output
        last = [] if output is None else [(form.out, output, *ones)]
        return [(rank, form.channels, *ones), (middle, rank, *form.kernel), *last]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return B, G and A."""
        return tuple(Stage(letter, weight) for letter, weight in zip("BGA", weights, strict=False))

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d]."""
        found = tucker.fit(W.reshape(self._shape(form)), H, *self.ranks_of(form, rank))
        kernels = found.kernels()
        shaped = [kernel.reshape(shape) for kernel, shape in zip(kernels, self.shapes(form, rank), strict=True)]
        return Factors(self.stages(form, shaped), found.compose().reshape(W.shape), found.loss)

    def noise_rank(self, W: Array, form: Layer) -> int:
        """Return the ranks of both unfoldings that stand out of the noise in W[g, o, d], the greatest of all groups."""
        kernels = W.reshape(-1, form.out, form.channels, form.taps)
        inputs = max(evbmf.rank(kernel.transpose(1, 0, 2).reshape(form.channels, -1)) for kernel in kernels)
        if self.sides == "input" or not inputs:
            return inputs
        outputs = max(evbmf.rank(kernel.reshape(form.out, -1)) for kernel in kernels)
        outputs = min(outputs, inputs * form.taps)
        return _code((min(inputs, outputs * form.taps), outputs)) if outputs else 0

    # -------------------------------------------------------------------------------- pairs

    def levels(self, form: Layer) -> list[float]:
        """Return the shares of a layer's multiply-adds that may be asked for: one chain tells many."""
        found = super().levels(form)
        return sorted({*found, *FINER}, reverse=True) if len(found) > 1 else found

    def points(self, task: Task) -> list[Point]:
        """Return the pairs that lose least at their cost, mildest first."""
        metrics, form, price = task
        if self.sides == "input" or (isinstance(self.rank, int) and self.wanted(form.name) is None):
            return super().points(task)
        ranks = bottleneck_losses.grid(self.most(form))
        weights = [metric.W.reshape(form.out, form.channels, form.taps) for metric in metrics]
        chains = [bottleneck_losses.chain(W, m.H, ranks) for W, m in zip(weights, metrics, strict=True)]
        losses, power = np.sum([chain.losses for chain in chains], axis=0), sum(metric.power for metric in metrics)
        pairs = {self._best(losses, ranks, share, form, price) for share in self.levels(form)} - {(0, 0)}
        found: list[Point] = []
        for r, s in sorted(pairs, key=lambda pair: self.costs(form, _code(pair), price)[::-1]):
            told = losses[ranks.index(r), s]
            loss = told if ranks[0] > WIDE else sum(chain.refined(r, s) for chain in chains)
            share = min(loss / power, 1.0) if power > 0 else 0.0
            if not found or share < found[-1][1] or share == 0:
                found.append((_code((r, s)), share))
        return found[::-1]

    def _best(
        self, losses: Array, ranks: Sequence[int], share: float, form: Layer, price: LayerPrice
    ) -> tuple[int, int]:
        """Return the pair of least loss within a share of the layer's multiply-adds; (0, 0) when there is none."""
        best, least = (0, 0), np.inf
        for row, r in zip(losses, ranks, strict=True):
            s = self._output_within(r, share * price.macs, form, price)
            if s and row[s] < least:
                best, least = (r, s), row[s]
        return best

    def _output_within(self, rank: int, macs: float, form: Layer, price: LayerPrice) -> int:
        """Return the greatest output rank that goes with an input rank within so many multiply-adds; 0 when none."""
        low, high = -(-rank // form.taps) - 1, min(form.out, rank * form.taps)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.costs(form, _code((rank, middle)), price)[1] <= macs
            low, high = (middle, high) if fits else (low, middle - 1)
        code = _code((rank, low))
        return low if low * form.taps >= rank and self.pays(form, code, price) else 0


def _code(pair: tuple[int, int]) -> int:
    return pair[0] + PAIR * pair[1]
