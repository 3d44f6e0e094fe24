"""Store the weights of a layer as small integers and scales; the layer computes in floats as before.

y = W x + b  becomes  y = (s q) x + b',  q[o, d] integers of so many bits, s a scale per weight, channel or block. On
calibration data integers and scales lose the least output: scales start as the best clipping, integers come from error
feedback through the inputs' covariance, then both are bettered in turn, each integer towards the vertex of its parabola
(rounding as the data asks, not to the nearest); the mean goes into the bias. `scales: power-of-two` is fixed point. The
runtime makes floats of the integers once, when it opens a session: the file shrinks, the speed and the arithmetic of
the layers stay (no DequantizeLinear, which would run at every inference or turn activations into integers too).

Fires:  Conv, ConvTranspose, Gemm, MatMul with one constant float weight, where integers and scales store less.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance.
Cost:   bits per weight, and the scales; multiply-adds as before.
Source: Vanhoucke et al. 2011 (8 bits); Gupta et al. 2015, arXiv:1502.02551 (fixed point, stochastic rounding); Frantar
        et al. 2022, arXiv:2210.17323 (feedback); Nagel et al. 2020, arXiv:2004.10568 (rounding as the data asks).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ccompile import decoding
from ccompile.coding import Coding, Fitted, scaled, sliced
from ccompile.core import Array, Budget
from ccompile.decoding import Sliced
from ccompile.fitting import Metric
from ccompile.moments import Layer
from ccompile.numerics import codebooks


def _width(bits: int) -> int:
    if bits not in range(2, 9) and bits != 16:
        raise ValueError("integers have 2 to 8 bits, or 16")
    return bits


Bits = Annotated[int, AfterValidator(_width), Field(ge=2, le=16)]


class QuantizeWeights(Coding):
    """Options of quantize-weights: exactly one of bits, error and keep."""

    bits: Bits | None = Field(None, description="bits of an integer: 2 to 8, or 16")
    keep: Budget | None = Field(None, description="a share of the source's cost to spend: `stored_bytes`")
    layers: dict[str, Bits] = Field({}, description="bits where a node's name fits the glob, instead of the others")
    scope: Literal["tensor", "channel", "group"] = Field(
        "channel", description="what has a scale of its own: a weight, each output channel, or blocks of its columns"
    )
    columns: int = Field(64, ge=8, le=65_536, description="columns of a block, for `scope: group`")
    scales: Literal["best", "largest", "power-of-two"] = Field(
        "best", description="scales that lose least, that hold the largest weight, or powers of two (fixed point)"
    )
    rounding: Literal["feedback", "nearest", "stochastic"] = Field(
        "feedback", description="as the data asks, to the nearest, or at random with the weight as expectation"
    )
    seed: int = Field(0, ge=0, le=2**32, description="seed of stochastic rounding")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if sum(value is not None for value in (self.bits, self.error, self.keep)) != 1:
            raise ValueError("give exactly one of `bits`, `error` and `keep`")
        if self.keep is not None and self.keep.stored_bytes is None:
            raise ValueError("`keep` spends `stored_bytes`: integers leave parameters and multiply-adds as they are")
        if self.rounding == "feedback" and self.statistics == "weights" and "rounding" in self.model_fields_set:
            raise ValueError("`rounding: feedback` needs data: it cannot go with `statistics: weights`")
        return self

    @property
    def keeps_zeros(self) -> bool:
        """Return whether weights that are zero stay so: 0 is an integer."""
        return True

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend."""
        return self.keep

    def strengths(self, form: Layer) -> list[float]:
        """Return bits."""
        return [float(bits) for bits in (8, 6, 5, 4, 3, 2)]

    def wanted(self, name: str) -> float | None:
        """Return the bits that the options give a layer."""
        for glob, bits in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return float(bits)
        return None if self.bits is None else float(self.bits)

    def label(self, strength: float) -> str:
        """Return the bits."""
        return f"{strength:g} bits"

    def unfit(self, form: Layer) -> str:
        """Return why the layer cannot have scales of that scope, or nothing."""
        part = sliced(form, self.scope, self.columns)
        return part if isinstance(part, str) else ""

    def slices(self, form: Layer) -> Sliced:
        """Return the parts that have scales of their own."""
        part = sliced(form, self.scope, self.columns)
        assert isinstance(part, Sliced)
        return part

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return integers and scales."""
        plan = codebooks.Grid(
            codebooks.integers(int(strength)),
            codebooks.Layout(self.scope, self.columns),
            search=self.scales != "largest",
            power=self.scales == "power-of-two",
            rounding=self.rounding,
            half=self.scope != "tensor",
            seed=self.seed,
            rough=rough,
        )
        W, H = [metric.W for metric in metrics], [metric.H for metric in metrics]
        return scaled(codebooks.quantise(W, H, plan, None if held is None else list(held)), metrics, form)

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of integers and scales."""
        part, bits = self.slices(form), int(strength)
        scales, count = part.a * part.c * (2 if part.a * part.c > 1 else itemsize), math.prod(part.shape)
        if bits in (8, 16):
            return count * bits // 8 + scales + decoding.overhead(4, 3)
        return decoding.code_bytes(count, bits) + (1 << bits) * itemsize + scales + decoding.overhead(5, 3)
