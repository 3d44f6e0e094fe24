"""Splits that can take a layer's rank from the noise in its weight (EVBMF), without being told how strong to be.

The weight is taken for a matrix of low rank with independent noise of equal variance in its entries; what stands out of
that is kept (see numerics/evbmf.py). The rank is of the weight alone; the fit at that rank goes by data as any other.
Source: Kim et al. 2016, arXiv:1511.06530, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ccompile import graph
from ccompile.analysis import linear
from ccompile.core import Array, Choice, Site, Skip, View
from ccompile.moments import Layer
from ccompile.splitting import Point, Split, Task

NOTHING = "EVBMF finds nothing in its weight that stands out of the noise"


class NoiseRanked(Split):
    """A split whose `rank` may be `evbmf`."""

    rank: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["evbmf"] | None = Field(  # type: ignore[assignment]
        None, description="rank kept at every site, or `evbmf`: what stands out of the noise in each layer's weight"
    )

    def noise_rank(self, W: Array, form: Layer) -> int:
        """Return the rank of W[g, o, d] that stands out of the noise; 0 when nothing does."""
        raise NotImplementedError

    def _by_noise(self, name: str) -> bool:
        return self.rank == "evbmf" and self.wanted(name) is None

    def sites(self, view: View) -> list[Site | Skip]:
        """Return the layers that may be split, and why others are left alone, by what `evbmf` finds too."""
        return [site if isinstance(site, Skip) else self._worth(site, view) for site in super().sites(view)]

    def _worth(self, site: Site, view: View) -> Site | Skip:
        name = site.nodes[0]
        if not self._by_noise(name):
            return site
        node = graph.node_named(view.graph, name)
        form = linear.layer(node)
        assert isinstance(form, Layer)
        rank = view.once(("evbmf", self.pass_name(), name), lambda: self.noise_rank(linear.matrix(node, form), form))
        if not rank:
            return Skip(name, NOTHING)
        if sum(math.prod(shape) for shape in self.shapes(form, rank)) >= form.out * form.columns:
            return Skip(name, f"{self.label(rank)}, which EVBMF finds, would cost no less than the layer does")
        return site

    def curve(self, task: Task) -> list[Point]:
        """Return the points of a curve; by `evbmf` that one, behind milder ones where the step may go back."""
        metrics, form, price = task
        if not self._by_noise(form.name):
            return self.points(task)
        rank = self.noise_rank(np.stack([metric.W for metric in metrics]), form)
        if not self.pays(form, rank, price):
            return []
        macs = self.costs(form, rank, price)[1]
        milder = self.points(task) if self.on_violation == "weaken" else []
        found = [point for point in milder if self.costs(form, point[0], price)[1] > macs]
        return [*found, (rank, self.shares_lost((metrics, form, [rank]))[0])]

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return what `evbmf` or the other strengths ask for."""
        if not self._by_noise(site.nodes[0]):
            return super().pick(site, choices)
        if len(choices) > 1:
            return choices[-1]
        return Skip(site.nodes[0], "the rank that EVBMF finds would cost more multiply-adds than the layer does")
