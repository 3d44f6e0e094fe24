"""Split a k x k convolution into a k x 1 and a 1 x k one through few channels.

W[o, c, i, j] ~= sum_r U[o, r, j] V[r, c, i]:  first V along the height, then U along the width, or the other way
round: by `order: best` whichever loses less at the cost. Each takes the stride, pads and dilation of its axis. As a
strength, rank r in the horizontal order is told as r + 1000000. On calibration data U and V are found by alternating
least squares in the metric of the inputs' covariance, from the closed-form optimum without data.

Fires:  Conv in two dimensions with a kernel > 1 along both, any stride, pads, dilation and groups (a rank per group);
        weight plain and read once; r (c kh + o kw) < o c kh kw.
Error:  measured on calibration data; without data |W - What|_2 is the discarded spectrum of W[(c, i), (o, j)].
Cost:   o c kh kw -> r (c kh + o kw) parameters; multiply-adds likewise, the first stage at the stride of its axis only.
Source: Jaderberg et al. 2014, arXiv:1405.3866 (scheme 2); Tai et al. 2016, arXiv:1511.06067 (closed form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ccompile import split_prices
from ccompile.core import Array, View
from ccompile.moments import Layer
from ccompile.numerics import spatial
from ccompile.split_prices import LayerPrice
from ccompile.splitting import Factors, Point, Split, Task
from ccompile.stages import Stage

TIE = 1e-12  # what a dearer or horizontal rank must lose less, as a share of power
TURNED = 1_000_000  # what is added to a rank of the horizontal order, where both are tried


class SplitSpatial(Split):
    """Options of split-spatial: exactly one of keep, error and rank."""

    order: Literal["best", "vertical", "horizontal"] = Field(
        "best", description="which axis the first convolution runs along, or whichever loses less"
    )

    def unfit(self, form: Layer) -> str:
        """Return why a layer cannot be split, or nothing."""
        if len(form.kernel) != 2 or min(form.kernel) == 1:
            return f"kernel {'x'.join(map(str, form.kernel))}: it has not two axes to part"
        return ""

    def most(self, form: Layer) -> int:
        """Return the rank at which the split is exact."""
        return spatial.rank_max(self._shape(form), self._order(1))

    def _shape(self, form: Layer) -> tuple[int, ...]:
        return (form.out, form.channels, *form.kernel)

    def _order(self, rank: int) -> spatial.Order:
        """Return the order of a rank."""
        if self.order == "best":
            return "horizontal" if rank > TURNED else "vertical"
        return self.order

    def named(self, rank: int) -> int:
        """Return the rank in its order."""
        return rank - TURNED if rank > TURNED else rank

    def label(self, rank: int) -> str:
        """Return what a rank is called."""
        return f"rank {self.named(rank)}"

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of V and U."""
        (kh, kw), order, rank = form.kernel, self._order(rank), self.named(rank)
        if order == "vertical":
            return [(rank, form.channels, kh, 1), (form.out, rank, 1, kw)]
        return [(rank, form.channels, 1, kw), (form.out, rank, kh, 1)]

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return V, then U."""
        return Stage("V", weights[0]), Stage("U", weights[1])

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d]."""
        order = self._order(rank)
        found = spatial.fit(W.reshape(self._shape(form)), H, self.named(rank), order)
        note = "1 x k first" if self.order == "best" and order == "horizontal" else ""
        return Factors(self.stages(form, found.kernels()), found.compose().reshape(W.shape), found.loss, note)

    def losses(self, W: Array, H: Array | None, form: Layer, ranks: Sequence[int]) -> list[float]:
        """Return the loss at each rank: one chain of fits an order tells them all."""
        found: dict[int, float] = {}
        for order in ("vertical", "horizontal"):
            mine = [rank for rank in ranks if self._order(rank) == order]
            named = [self.named(rank) for rank in mine]
            if mine:
                found |= zip(mine, spatial.losses(W.reshape(self._shape(form)), H, named, order), strict=True)
        return [found[rank] for rank in ranks]

    # -------------------------------------------------------------------------------- both orders

    def _in(self, order: spatial.Order) -> SplitSpatial:
        return self.model_copy(update={"order": order})

    def like(self, rank: int, form: Layer) -> Sequence[int]:
        """Return the ranks of a layer that was cut, in the same order."""
        turned = rank - self.named(rank)
        return [turned + r for r in super(SplitSpatial, self._in(self._order(rank))).like(self.named(rank), form)]

    def _prices(self, view: View) -> Mapping[str, LayerPrice]:
        """Return what layers cost, whole and split in the orders that are tried."""
        if self.order != "best":
            return super()._prices(view)

        def both() -> Mapping[str, LayerPrice]:
            forms = self._forms(view)
            first, other = (split_prices.prices(self._in(order), forms, view) for order in ("vertical", "horizontal"))
            return {name: replace(price, turned=other[name]) for name, price in first.items()}

        return view.once(("prices", self.pass_name(), "both"), both)

    def price_of(self, price: LayerPrice, rank: int) -> LayerPrice:
        """Return what a layer costs in the order of a rank."""
        return price.turned if rank > TURNED and price.turned is not None else price

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return the ranks that a curve tells, of both orders where both are tried."""
        if self.order != "best":
            return super().ranks(form, price)
        turned = self._in("horizontal").ranks(form, price.turned or price)
        return [*self._in("vertical").ranks(form, price), *(TURNED + rank for rank in turned)]

    def points(self, task: Task) -> list[Point]:
        """Return the ranks that lose less than all cheaper ones, mildest first."""
        form, price = task[1:]

        def order(point: Point) -> tuple[int, float, int]:
            return self.costs(form, point[0], price)[1], round(point[1], 12), point[0]

        found: list[Point] = []
        for rank, lost in sorted(super().points(task), key=order):
            if not found or lost < found[-1][1] - TIE:
                found.append((rank, lost))
        return found[::-1]
