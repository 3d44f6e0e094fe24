"""Leave of each weight its sign, or its sign and whether it is there, or a power of two; the rest is a scale.

y = W x + b  becomes  y = (s p[code]) x + b',  p one of {-1, 1}, {-1, 0, 1}, {0, +-1, +-1/2, +-1/4, ...}, s a scale per
weight or output channel. On calibration data signs and scales lose the least output: codes come from error feedback
through the inputs' covariance, scales from least squares, then both are bettered in turn; the mean goes into the bias.
With `inputs: sign` the layer reads sign(x) |x|_mean, the mean over channels at each place, and is fitted to that.
Without data the scale of {-1, 1} is the mean of |w|, and that of {-1, 0, 1} maximises (sum of the k largest |w|)^2 / k.
The runtime makes floats of the codes once, when it opens a session: the file shrinks, the speed stays.

Fires:  Conv, ConvTranspose, Gemm, MatMul with one constant float weight.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance. Without
        training whole networks of signs lose most of their accuracy: name layers with `only`, and look at the errors.
Cost:   1 or 2 bits per weight, 2 to 4 for powers of two, and the scales; multiply-adds as before.
Source: Courbariaux et al. 2015, arXiv:1511.00363; Rastegari et al. 2016, arXiv:1603.05279 (scales
        of weights and inputs); Hou et al. 2017, arXiv:1611.01600 (weighted); Li et al. 2016, arXiv:1605.04711
        (ternary); Lin et al. 2015, arXiv:1510.03009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import decoding
from ccompile.coding import Coding, Fitted, scaled, sliced
from ccompile.core import Array, Budget
from ccompile.decoding import Sliced
from ccompile.emitting import Emitter
from ccompile.fitting import Metric
from ccompile.moments import Layer
from ccompile.numerics import codebooks

Values = Literal["binary", "ternary", "powers-2", "powers-3", "powers-4"]
PATTERNS: dict[str, tuple[float, ...]] = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)} | {
    f"powers-{bits}": codebooks.powers(bits) for bits in (2, 3, 4)
}


class BinarizeWeights(Coding):
    """Options of binarize-weights."""

    values: Values = Field(
        "binary", description="what is left of a weight: -1 and 1; and 0; or powers of two in so many bits"
    )
    scope: Literal["tensor", "channel"] = Field("channel", description="what has a scale of its own")
    error: float | None = Field(None, gt=0, lt=1, description="leave layers alone that would lose more of their power")
    keep: Budget | None = Field(None, description="a share of the source's cost to spend: `stored_bytes`")
    inputs: Literal["float", "sign"] = Field(
        "float", description="what a layer reads: all of x, or sign(x) times the mean of |x| over channels"
    )
    scales: Literal["best", "power-of-two"] = Field("best", description="scales that lose least, or powers of two")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.error is not None and self.keep is not None:
            raise ValueError("give `error` or `keep`, not both: without either all layers are coded")
        if self.keep is not None and self.keep.stored_bytes is None:
            raise ValueError("`keep` spends `stored_bytes`: codes leave parameters and multiply-adds as they are")
        if self.inputs == "sign" and (self.error is not None or self.keep is not None):
            raise ValueError("with `inputs: sign` all layers are coded: give neither `error` nor `keep`, but `only`")
        return self

    def feed(self, node: ir.Node, form: Layer) -> None:
        """Let the layer read signs, scaled at each place by the mean size over channels, where the options say so."""
        if self.inputs == "float":
            return
        emitter, index = Emitter(node), 1 - form.weight
        x, axis = node.inputs[index], 1 if form.kernel else -2 if form.weight == 0 else -1
        size = emitter.op("Abs", x)
        if emitter.opset < 18:
            size = emitter.op("ReduceMean", size, axes=[axis], keepdims=1)
        else:
            size = emitter.op("ReduceMean", size, emitter.integers(axis), keepdims=1)
        node.replace_input_with(index, emitter.op("Mul", emitter.op("Sign", x), size))

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend."""
        return self.keep

    def strengths(self, form: Layer) -> list[float]:
        """Return the number of values."""
        return [float(len(PATTERNS[self.values]))]

    def wanted(self, name: str) -> float | None:
        """Return the number of values, unless an error bound or a budget decides."""
        return None if self.error is not None or self.keep is not None else float(len(PATTERNS[self.values]))

    def label(self, strength: float) -> str:
        """Return the name of the values."""
        return self.values

    def unfit(self, form: Layer) -> str:
        """Return why the layer cannot have scales of that scope, or nothing."""
        part = sliced(form, self.scope)
        return part if isinstance(part, str) else ""

    def slices(self, form: Layer) -> Sliced:
        """Return the parts that have scales of their own."""
        part = sliced(form, self.scope)
        assert isinstance(part, Sliced)
        return part

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return codes and scales."""
        layout = codebooks.Layout(self.scope)
        plan = codebooks.Grid(
            PATTERNS[self.values], layout, power=self.scales == "power-of-two", half=self.scope != "tensor", rough=rough
        )
        W, H = [metric.W for metric in metrics], [metric.H for metric in metrics]
        return scaled(codebooks.quantise(W, H, plan), metrics, form)

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of codes and scales."""
        part = self.slices(form)
        held = decoding.code_bytes(math.prod(part.shape), decoding.bits_of(int(strength))) + strength * itemsize
        return held + part.a * part.c * (2 if part.a * part.c > 1 else itemsize) + decoding.overhead(5, 3)
