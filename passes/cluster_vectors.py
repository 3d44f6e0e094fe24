"""Let blocks of a layer's weights share a few vectors, and store a short code for each block.

y = W x + b  becomes  y = What x + b',  What[o, j v : (j + 1) v] = C[code[o, j]]:  C[k] are vectors of v weights that
all rows and blocks share, so that log2 k bits say v weights. On calibration data codes and vectors lose the least
output: k-means of the blocks, each in its own metric; codes by error feedback through the inputs' covariance; then
vectors and codes bettered in turn; the mean goes into the bias. Between 1 and 2 bits a weight that loses less than a
code per weight. Weights that are zero do not stay so. The runtime looks the codes up once, when it opens a session.

Fires:  Conv, Gemm, MatMul with one constant float weight whose rows (inputs of an output) fall into such blocks, where
        codes and vectors store less.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance.
Cost:   bits / v per weight for codes, and k v for the vectors; multiply-adds as before.
Source: Wu et al. 2016, arXiv:1512.06473 (Q-CNN: fitted to responses); Gong et al. 2014, arXiv:1412.6115; Stock et al.
        2020, arXiv:1907.05686; van Baalen et al. 2024, arXiv:2402.15319.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from ccompile import decoding, storage
from ccompile.coding import Coding, Fitted
from ccompile.core import Array, Budget
from ccompile.decoding import Form, Means
from ccompile.fitting import Metric
from ccompile.moments import Layer
from ccompile.numerics import vectors

Bits = Annotated[int, Field(ge=1, le=8)]


class ClusterVectors(Coding):
    """Options of cluster-vectors: exactly one of bits, error and keep."""

    bits: Bits | None = Field(None, description="bits of a block's code: 2^bits vectors")
    size: int = Field(4, ge=2, le=64, description="weights of a block")
    keep: Budget | None = Field(None, description="a share of the source's cost to spend: `stored_bytes`")
    layers: dict[str, Bits] = Field({}, description="bits where a node's name fits the glob, instead of the others")
    seed: int = Field(0, ge=0, le=2**32, description="seed of the first vectors")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if sum(value is not None for value in (self.bits, self.error, self.keep)) != 1:
            raise ValueError("give exactly one of `bits`, `error` and `keep`")
        if self.keep is not None and self.keep.stored_bytes is None:
            raise ValueError("`keep` spends `stored_bytes`: vectors leave parameters and multiply-adds as they are")
        return self

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend."""
        return self.keep

    def strengths(self, form: Layer) -> list[float]:
        """Return bits of a code."""
        return [float(bits) for bits in range(8, 0, -1)]

    def wanted(self, name: str) -> float | None:
        """Return the bits that the options give a layer."""
        for glob, bits in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return float(bits)
        return None if self.bits is None else float(self.bits)

    def label(self, strength: float) -> str:
        """Return the number of vectors."""
        return f"{2**strength:g} vectors of {self.size}"

    def unfit(self, form: Layer) -> str:
        """Return why rows of the layer do not fall into blocks, or nothing."""
        if form.op == "ConvTranspose":
            return "the weights of an output channel of a ConvTranspose do not lie together"
        if form.columns % self.size:
            return f"its rows of {form.columns} weights do not fall into blocks of {self.size}"
        return ""

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return codes and vectors."""
        W, H = [metric.W for metric in metrics], [metric.H for metric in metrics]
        parts = vectors.fit(W, H, int(2**strength), self.size, rough, self.seed)
        return Fitted(np.stack([part.values for part in parts]), vectors.lost(parts, W, H))

    def form_of(self, form: Layer, strength: float, plain: Array, means: Means) -> Form | None:
        """Return the weight as codes and vectors; None where rounding made more vectors than codes can name."""
        found = storage.blocks(plain, means, self.size, turned=not form.kernel and not form.wide)
        return found if found is not None and all(map(means.runs, found.ops)) else None

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of codes and vectors."""
        count = form.groups * form.out * form.columns // self.size
        tables = min(2**strength, count) * self.size * 2
        return decoding.code_bytes(count, int(strength)) + tables + decoding.overhead(4, 2)
