"""Set weights of a layer to zero, and let the others make up for them.

y = W x + b  becomes  y = What x + b',  What zero outside a mask. On calibration data mask and values lose the least
output: the mask by operator splitting between the quadratic loss and the pattern, the values by least squares on what
is left; the mean goes into the bias. Patterns: single weights, n of every m columns, blocks, all taps of a channel in a
filter (`kernel`), a tap of a channel in all filters (`column`), a tap of all channels (`tap`: outer ones that are gone
make the kernel smaller). Zeros make the file smaller, not the model faster: the runtime multiplies by them.

Fires:  Conv, ConvTranspose, Gemm, MatMul with one constant float weight.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance.
Cost:   a bit per weight and the weights that are left, or 12 bytes for each of those; multiply-adds as before, but for
        cropped kernels.
Source: LeCun et al. 1990 (damage); Hassibi and Stork 1993, Frantar and Alistarh 2022, arXiv:2208.11580 (surgeon), 2023,
        arXiv:2301.00774 (sweep); Meng et al. 2024, arXiv:2406.07831 (reconstruction); Han et al. 2015,
        arXiv:1506.02626 (magnitude); Lebedev and Lempitsky 2016, arXiv:1506.02515 (column).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from ccompile import decoding
from ccompile.coding import Coding, Fitted
from ccompile.core import Array, Budget, Choice, Share, Site, Skip, View
from ccompile.fitting import Metric
from ccompile.moments import Layer
from ccompile.numerics import levels, sparsity
from ccompile.numerics.sparsity import Pattern

HEAVIEST = 2e11  # operations of one layer beyond which a surgeon is not asked
SPARSE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99)  # shares of zeros that a curve tells


class PruneWeights(Coding):
    """Options of prune-weights: exactly one of keep, error and an n:m pattern."""

    keep: Share | Budget | None = Field(
        None, description="share of weights left, or a share of the source's cost to spend"
    )
    scope: Literal["layer", "global"] = Field(
        "layer", description="`keep` is of each layer, or of all together: fewer where that loses less"
    )
    layers: dict[str, Share] = Field({}, description="share left where a node's name fits the glob, instead of `keep`")
    pattern: str = Field(
        "single", description="what goes together: single, kernel, column, tap, blocks `4x1`, or n of m columns `2:4`"
    )
    criterion: Literal["reconstruction", "surgeon", "sweep", "damage", "magnitude"] = Field(
        "reconstruction", description="which weights go; all but magnitude look at data"
    )
    repair: bool = Field(True, description="let the weights that are left make up for the others")

    @field_validator("pattern")
    @classmethod
    def _known(cls, text: str) -> str:
        several, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"(\d+)x(\d+)", text)
        if several and 1 <= int(several[1]) < int(several[2]) <= 256:
            return text
        if (block and 1 < int(block[1]) * int(block[2]) <= 4096) or text in ("single", "kernel", "column", "tap"):
            return text
        raise ValueError("give single, kernel, column, tap, blocks as `4x1`, or n of m as `2:4`")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if sum((self.keep is not None, self.error is not None, self.several is not None)) != 1:
            raise ValueError("give exactly one of `keep`, `error` and a pattern n:m")
        if isinstance(self.keep, Budget) and self.keep.stored_bytes is None:
            raise ValueError("`keep` spends `stored_bytes`, or is the share of weights left")
        if self.scope == "global" and not isinstance(self.keep, float):
            raise ValueError("`scope: global` shares out the weights that `keep`, a number, leaves")
        if (
            self.criterion in ("surgeon", "sweep")
            and self.pattern != "single"
            and not (self.criterion == "sweep" and self.several)
        ):
            raise ValueError(
                f"`criterion: {self.criterion}` knows single weights{', and n of m' * (self.criterion == 'sweep')}"
            )
        if self.statistics == "weights" and self.criterion not in ("reconstruction", "magnitude"):
            raise ValueError(f"`criterion: {self.criterion}` needs data: it cannot go with `statistics: weights`")
        return self

    @property
    def several(self) -> tuple[int, int] | None:
        """Return n and m of an n:m pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend."""
        return self.keep if isinstance(self.keep, Budget) else None

    @property
    def crops(self) -> bool:
        """Return whether outer taps of a kernel that are zero go: with a pattern that removes whole ones."""
        return self.pattern == "tap"

    @property
    def keeps_zeros(self) -> bool:
        """Return whether weights that are zero stay so."""
        return True

    def strengths(self, form: Layer) -> list[float]:
        """Return shares of zeros."""
        return list(SPARSE)

    def wanted(self, name: str) -> float | None:
        """Return the share of zeros that the options give a layer."""
        if self.several is not None:
            return 1 - self.several[0] / self.several[1]
        for glob, share in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return 1 - share
        return 1 - self.keep if isinstance(self.keep, float) and self.scope == "layer" else None

    def label(self, strength: float) -> str:
        """Return the share of zeros."""
        return f"{strength:.3g} zeros" if self.several is None else f"{self.pattern} weights left"

    def unfit(self, form: Layer) -> str:
        """Return why the layer cannot lose weights in that pattern, or nothing."""
        if self.pattern in ("kernel", "column", "tap") and form.taps == 1:
            return f"its kernel has one tap: `pattern: {self.pattern}` is of several"
        if self.criterion == "surgeon" and sparsity.effort((form.out, form.columns)) > HEAVIEST:
            size = f"{form.out} x {form.columns}"
            return f"{size} weights are too many for a surgeon: `criterion: reconstruction` takes them"
        return ""

    def units(self, form: Layer) -> Pattern:
        """Return what goes together in a matrix W[o, d] of a group."""
        shape, taps = (form.out, form.columns), form.taps
        column = np.arange(form.columns)[None, :]
        if block := re.fullmatch(r"(\d+)x(\d+)", self.pattern):
            return sparsity.blocks(shape, (int(block[1]), int(block[2])))
        if self.pattern == "kernel":
            return sparsity.blocks(shape, (1, taps))
        if self.pattern in ("column", "tap"):
            return Pattern(np.broadcast_to(column if self.pattern == "column" else column % taps, shape))
        return sparsity.single(shape, self.several)

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return the weights that are left."""
        pattern, found, lost = self.units(form), [], 0.0
        keep = max(1, round(pattern.count * (1 - strength)))
        for index, metric in enumerate(metrics):
            free = None if held is None else held[index]
            mask = self._mask(metric, pattern, keep, 1 - strength, free)
            What = sparsity.solve(metric.W, metric.H, mask) if self.repair else np.where(mask, metric.W, 0.0)
            found.append(What)
            lost += levels.loss(metric.W, metric.H, What)
        return Fitted(np.stack(found), lost)

    def _mask(self, metric: Metric, pattern: Pattern, keep: int, share: float, free: Array | None) -> Array:
        W, H = metric.W, metric.H
        if H is not None and self.criterion == "reconstruction":
            return sparsity.alternate(W, H, pattern, keep, free)
        if H is not None and self.criterion == "surgeon":
            return sparsity.remove(W, H, keep, free)
        if H is not None and self.criterion == "sweep":
            return sparsity.sweep(W, H, pattern, share, free)
        score = sparsity.scores(W, None if self.criterion == "magnitude" else H)
        allowed = np.ones(W.shape, bool) if free is None else free
        return pattern.mask(np.where(allowed, score, 0.0), keep) & allowed

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of a mask and what is left, or of a sparse initializer."""
        count = form.groups * form.out * form.columns
        left = count * (1 - max(strength, zeros))
        mask = decoding.code_bytes(count, 1) + decoding.overhead(3, 2)
        return min(mask + left * itemsize, left * (itemsize + 8) + 2 * decoding.CONSTANT)

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Share weights out over all layers, spend a budget, or pick layer by layer."""
        if self.scope != "global" or not curves:
            return super().plan(curves, view)
        assert isinstance(self.keep, float)
        costs = [np.array([choice.params * (1 - choice.strength) for choice in choices]) for _, choices in curves]
        return self.spend(curves, costs, self.keep * sum(float(cost[0]) for cost in costs), view)
