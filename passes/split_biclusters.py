"""Split a convolution into blocks of low rank between groups of its input and of its output channels.

W[O_g, C_k] ~= A[g, k] B[g, k]:  the channels are parted into `inputs` groups C_k and `outputs` groups O_g of equal
sizes, filters that read alike together; each pair of groups has a rank r weight. A grouped convolution with the
layer's kernel, stride, pads and dilation makes r channels for each pair, a second one (1 x 1, a group per O_g) adds
them up; Gathers put channels into the order of the groups and back. On calibration data the groups and the blocks are
found in the metric of the inputs' covariance.

Fires:  Conv with one group whose channels the groups divide; weight plain and read once; r (K o + G c k) < o c k.
Error:  measured on calibration data.
Cost:   o c k -> r (K o + G c k) multiply-adds per position, and parameters.
Source: Denton et al. 2014, arXiv:1404.0736, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import bicluster
from ccompile.splitting import Factors, Split
from ccompile.stages import Stage


class SplitBiclusters(Split):
    """Options of split-biclusters: exactly one of keep, error and rank."""

    inputs: int = Field(2, ge=1, le=1024, description="groups of input channels")
    outputs: int = Field(2, ge=1, le=1024, description="groups of output channels")
    seed: int = Field(0, ge=0, le=2**31, description="of the clustering's start")

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        if form.groups > 1:
            return f"it has {form.groups} groups"
        if form.out % self.outputs or form.channels % self.inputs:
            return f"{self.outputs} x {self.inputs} groups do not divide its {form.out} x {form.channels} channels"
        return ""

    def most(self, form: Layer) -> int:
        """Return the rank at which each block is exact."""
        return min(form.out // self.outputs, form.columns // self.inputs)

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of all B and all A."""
        ones = (1,) * len(form.kernel)
        first = (self.inputs * self.outputs * rank, form.channels // self.inputs, *form.kernel)
        return [first, (form.out, self.inputs * rank, *ones)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return B, a group per group of inputs, and A, one per group of outputs."""
        return Stage("B", weights[0], self.inputs), Stage("A", weights[1], self.outputs)

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return blocks of this rank."""
        tensor = W.reshape(form.out, form.channels, 1, form.taps)
        found = bicluster.fit(tensor, H, (self.outputs, self.inputs), rank, self.seed)
        first, second = self.shapes(form, rank)
        B = found.B.transpose(1, 0, 2, 3, 4, 5).reshape(first)  # [K, G, r, ...]: made group of inputs by group
        A = found.A.transpose(0, 2, 1, 3).reshape(second)  # [G, o / G, K, r]
        made = np.arange(self.inputs * self.outputs * rank).reshape(self.inputs, self.outputs, rank)
        parts = (
            Stage("B", B, self.inputs, reads=found.inputs.reshape(-1)),
            Stage(
                "A",
                A,
                self.outputs,
                reads=made.transpose(1, 0, 2).reshape(-1),
                makes=np.argsort(found.outputs.reshape(-1)),
            ),
        )
        return Factors(parts, found.compose().reshape(W.shape), found.loss)
