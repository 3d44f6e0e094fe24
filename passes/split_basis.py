"""Split a convolution into a few fixed kernels, the same for all channels, and a 1 x 1 convolution that mixes them.

W[o, c, i, j] ~= sum_m P[o, c, m] atom[m, i, j]:  every input channel passes through the same m kernels, low
frequencies of the discrete cosine transform, coarse Haar wavelets or smooth bumps (`basis`), or learned separable ones,
outer products of one column and one row each. Which of a fixed basis stay is chosen by what they carry; P is an exact
regression on calibration data. The rank is m; all kh kw atoms of a fixed basis are exact.

Fires:  Conv in two dimensions with a kernel of more than one tap, one group, any stride, pads and dilation; weight
        plain and read once; m (c k + o c) < o c k.
Error:  measured on calibration data; without data the energy of the atoms that go (Parseval).
Cost:   o c k -> m (c k + o c) multiply-adds per position.
Source: Rigamonti et al. 2013 (CVPR, separable filters); Denil et al. 2013, arXiv:1306.0543 (fixed dictionaries);
        Ulicny et al. 2019, arXiv:1905.00135 (harmonic networks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import atoms, dictionary
from ccompile.splitting import Factors, LayerPrice, Split, of_taps
from ccompile.stages import Sides, Stage


class SplitBasis(Split):
    """Options of split-basis: exactly one of keep, error and rank."""

    basis: Literal["dct", "haar", "smooth", "learned"] = Field("dct", description="the kernels that all channels share")
    length: float = Field(1.0, gt=0, le=100, description="width of `smooth` kernels, in taps")

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        return of_taps(form, axes=2)

    def most(self, form: Layer) -> int:
        """Return the number of atoms of a whole basis."""
        return form.taps

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return all numbers of atoms."""
        return list(range(form.taps, 0, -1))

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of the atoms, one copy per channel, and P."""
        return [(form.channels * rank, 1, *form.kernel), (form.out, form.channels * rank, 1, 1)]

    def scales_with(self, form: Layer) -> tuple[Sides, ...]:
        """Return what the cost goes with: of D, and also of P, with the inputs."""
        return (True, False), (True, True)

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the atoms as a depthwise convolution, and what mixes them."""
        return Stage("D", weights[0], form.channels), Stage("P", weights[1])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the best mixture of `rank` atoms."""
        kh, kw = form.kernel
        tensor = W.reshape(form.out, form.channels, kh, kw)
        if self.basis == "learned":
            found = atoms.learn(tensor, H, rank)
        elif self.basis == "smooth":
            found = atoms.fit(tensor, H, dictionary.smooth_atoms(kh, kw, rank, self.length))
        else:
            whole = atoms.dct_atoms(kh, kw) if self.basis == "dct" else atoms.haar_atoms(kh, kw)
            found = atoms.fit(tensor, H, whole[atoms.select(tensor, H, whole, rank)])
        first, second = self.shapes(form, rank)
        copies = np.broadcast_to(found.atoms, (form.channels, *found.atoms.shape)).reshape(first)
        parts = self.stages(form, [np.ascontiguousarray(copies), found.P.reshape(second)])
        return Factors(parts, found.compose().reshape(W.shape), found.loss)
