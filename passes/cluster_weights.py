"""Let the weights of a layer share a few values, and store a short code for each.

y = W x + b  becomes  y = C[code] x + b',  C[k] a table of levels, code[o, d] of log2 k bits. On calibration data codes
and levels lose the least output: levels start as the exact k-means of the weights in one dimension, each weighted by
what its error costs; codes come from error feedback through the inputs' covariance; then levels and codes are bettered
in turn; the mean goes into the bias. Weights that are zero stay so; with `outliers` the few that levels serve worst
keep values of their own. The runtime looks the codes up once, when it opens a session: the file shrinks, the speed
stays.

Fires:  Conv, ConvTranspose, Gemm, MatMul with one constant float weight, where codes and levels store less.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance.
Cost:   bits per weight for its code, and the tables; multiply-adds as before.
Source: Gong et al. 2014, arXiv:1412.6115; Han et al. 2016, arXiv:1510.00149; Choi et al. 2017, arXiv:1612.01543;
        Ullrich et al. 2017, arXiv:1702.04008 (mixture); Frantar et al. 2022, arXiv:2210.17323 (feedback); Kim et al.
        2023, arXiv:2306.07629 (outliers).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ccompile import decoding, storage
from ccompile.coding import Coding, Fitted, sliced
from ccompile.core import Array, Budget
from ccompile.decoding import Form, Means, Sliced
from ccompile.fitting import Metric
from ccompile.moments import Layer
from ccompile.numerics import codebooks, levels

Bits = Annotated[int, Field(ge=1, le=8)]
MOST = 6  # bits at the mild end of a curve: beyond, hardly anything is lost


class ClusterWeights(Coding):
    """Options of cluster-weights: exactly one of bits, levels, error and keep."""

    bits: Bits | None = Field(None, description="bits of a code: 2^bits levels")
    levels: int | None = Field(None, ge=2, le=256, description="number of levels of a table")
    keep: Budget | None = Field(None, description="a share of the source's cost to spend: `stored_bytes`")
    layers: dict[str, Bits] = Field({}, description="bits where a node's name fits the glob, instead of the others")
    scope: Literal["tensor", "channel", "group"] = Field(
        "tensor", description="what has a table of its own: a weight, each output channel, or blocks of its columns"
    )
    columns: int = Field(64, ge=8, le=65_536, description="columns of a block, for `scope: group`")
    start: Literal["optimal", "lloyd", "mixture"] = Field(
        "optimal", description="levels start as the exact k-means, as Lloyd's from even ones, or as a Gaussian mixture"
    )
    weighted: bool = Field(True, description="start from k-means that counts each weight by its input's power")
    feedback: bool = Field(True, description="let later columns make up for the errors of earlier ones")
    zeros: bool = Field(True, description="weights that are zero stay zero")
    outliers: float = Field(
        0.0,
        ge=0,
        le=0.1,
        description="share of the weights, those that levels serve worst, with values of their own",
    )

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if sum(value is not None for value in (self.bits, self.levels, self.error, self.keep)) != 1:
            raise ValueError("give exactly one of `bits`, `levels`, `error` and `keep`")
        if self.keep is not None and self.keep.stored_bytes is None:
            raise ValueError("`keep` spends `stored_bytes`: clusters leave parameters and multiply-adds as they are")
        if self.outliers and self.scope != "tensor":
            raise ValueError("`outliers` go with one table: `scope: tensor`")
        return self

    @property
    def keeps_zeros(self) -> bool:
        """Return whether weights that are zero stay so."""
        return self.zeros

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend."""
        return self.keep

    def strengths(self, form: Layer) -> list[float]:
        """Return numbers of levels."""
        return [float(2**bits) for bits in range(MOST, 0, -1)]

    def wanted(self, name: str) -> float | None:
        """Return the number of levels that the options give a layer."""
        for glob, bits in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return float(2**bits)
        if self.bits is not None:
            return float(2**self.bits)
        return None if self.levels is None else float(self.levels)

    def label(self, strength: float) -> str:
        """Return the number of levels."""
        return f"{strength:g} levels" + (f" but for {self.outliers:.3g} of the weights" if self.outliers else "")

    def unfit(self, form: Layer) -> str:
        """Return why the layer cannot have tables of that scope, or nothing."""
        part = sliced(form, self.scope, self.columns)
        return part if isinstance(part, str) else ""

    def slices(self, form: Layer) -> Sliced:
        """Return the parts that have tables of their own."""
        part = sliced(form, self.scope, self.columns)
        assert isinstance(part, Sliced)
        return part

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return codes and levels."""
        layout = codebooks.Layout(self.scope, self.columns)
        plan = codebooks.Levels(
            int(strength), layout, self.start, self.weighted, self.feedback, self.scope != "tensor", rough
        )
        W, H = [metric.W for metric in metrics], [metric.H for metric in metrics]
        masks = None if held is None else list(held)
        if self.outliers:
            found = codebooks.fit_with_outliers(W, H, plan, self.outliers, masks)
            return Fitted(np.stack(found), sum(map(levels.loss, W, H, found)))
        parts = codebooks.fit(W, H, plan, masks)
        return Fitted(np.stack([part.values for part in parts]), codebooks.lost(parts, W, H))

    def form_of(self, form: Layer, strength: float, plain: Array, means: Means) -> Form | None:
        """Return codes with outliers by place."""
        found = storage.outliers(plain, means, int(strength)) if self.outliers else None
        return found if found is not None and all(map(means.runs, found.ops)) else None

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of codes and tables."""
        part = self.slices(form)
        count, bits = math.prod(part.shape), decoding.bits_of(int(strength))
        several = part.a * part.c > 1
        tables = part.a * part.c * strength * (2 if several else itemsize)
        plain = decoding.code_bytes(count, bits) + tables + decoding.overhead(3 if several else 1, 2 if several else 1)
        if self.outliers:
            plain += 4 * round(self.outliers * count) + decoding.overhead(6, 3)
        if not zeros or several:  # behind a mask the tables of slices would no longer fit
            return plain
        left = decoding.code_bytes(round(count * (1 - zeros)) + 1, bits) + decoding.overhead(1, 1)
        return min(plain, decoding.code_bytes(count, 1) + left + tables + decoding.overhead(3, 1))
