"""Split a first layer into a projection of its input channels to few colours, and filters that read one colour each.

W[o, c, i, j] ~= s[o, i, j] p[g(o), c]:  a 1 x 1 convolution with p makes the colours, then each filter reads the one
of its group, in a grouped convolution with the layer's stride, pads and dilation; a Gather brings the filters back
into their order. The rank is the number of colours. On calibration data s, p and g are each exact given the others.

Fires:  Conv in two dimensions with a kernel of more than one tap and one group, whose filters the colours divide;
        weight plain and read once; colours c + o k < o c k. Meant for the layer that reads an image (`only`).
Error:  measured on calibration data.
Cost:   o c k -> colours c + o k parameters; multiply-adds likewise, the projection before the stride.
Source: Denton et al. 2014, arXiv:1404.0736, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics import colour
from ccompile.splitting import Factors, LayerPrice, Split, of_taps
from ccompile.stages import Stage


class SplitColour(Split):
    """Options of split-colour: exactly one of keep, error and rank."""

    seed: int = Field(0, ge=0, le=2**31, description="of the clustering's start")

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        return of_taps(form, axes=2)

    def most(self, form: Layer) -> int:
        """Return the number of filters: a colour for each."""
        return form.out

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return the numbers of colours that divide the filters."""
        return [rank for rank in range(form.out, 0, -1) if self.has(form, rank)]

    def has(self, form: Layer, rank: int) -> bool:
        """Say whether that many colours divide the filters."""
        return form.out % rank == 0

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of p and s."""
        return [(rank, form.channels, 1, 1), (form.out, 1, *form.kernel)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return the projection and the filters, in the order of their colours."""
        return Stage("P", weights[0]), Stage("S", weights[1], len(weights[0]))

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return filters of one colour each."""
        found = colour.fit(W.reshape(form.out, form.channels, *form.kernel), H, rank, balanced=True, seed=self.seed)
        by_colour = np.argsort(found.group, kind="stable")
        filters = Stage("S", found.s[by_colour][:, None], rank, makes=np.argsort(by_colour))
        parts = (Stage("P", found.p.reshape(rank, -1, 1, 1)), filters)
        return Factors(parts, found.compose().reshape(W.shape), found.loss)
