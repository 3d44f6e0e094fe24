"""What all splits share: where they fit, what each rank loses and costs, budgets, and the sequential fit.

A linear layer y = W x + b becomes several thinner ones with the composed weight What of some structure. With the
calibration inputs' centred Gram matrix H and the outputs of the graph before the step as targets, the least squares
weight W* = C H^-1 splits the loss into a part that no weight can avoid and the part that the structure costs,

    E|Y - What X - b|^2  =  least  +  tr( (What - W*) H (What - W*)^T ),      b = E[Y] - What E[X],

so every structure is fitted to W* in the metric H (the mean goes into the bias). Layers are fitted in topological
order, on the inputs that the graph so far makes; layers that are not split are refitted on the way.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import fitting, graph, impacts, split_fits, split_prices, stages
from ccompile.analysis import linear
from ccompile.core import Array, Budget, Choice, Share, Site, Skip, View
from ccompile.errors import PassError
from ccompile.fitting import Metric
from ccompile.layerwise import Data, Layerwise, spared
from ccompile.moments import Layer
from ccompile.numerics import allocation
from ccompile.split_fits import Factors
from ccompile.split_prices import LEVELS, LayerPrice, cost_of
from ccompile.stages import Sides, Stage

__all__ = ["LEVELS", "Factors", "LayerPrice", "Split", "cost_of"]

Task = tuple[Sequence[Metric], Layer, LayerPrice]  # of one layer, by group: what its curve needs
Point = tuple[int, float]  # a rank, and the share of power that it loses
ONE_TAP = "its kernel has one tap: split-svd splits it"
NO_RANK = "no rank costs less than the layer does"
BEYOND = " would cost more than the layer does; it pays up to rank"


def of_taps(form: Layer, axes: int | None = None) -> str:
    """Return why a layer is no convolution in one group with several taps (and so many axes), or nothing."""
    if form.groups > 1:
        return f"it has {form.groups} groups"
    if axes is not None and len(form.kernel) != axes:
        return f"kernel {'x'.join(map(str, form.kernel))}: it has {len(form.kernel)} axes, not {axes}"
    return "" if form.taps > 1 else ONE_TAP


class Split(Layerwise):
    """Options that all splits share: exactly one strength."""

    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)
    ops: ClassVar[tuple[str, ...]] = ("Conv",)

    keep: Share | Budget | None = Field(
        None, description="share of each layer's multiply-adds kept, or a share of the source's cost to spend"
    )
    error: float | None = Field(None, ge=0, lt=1, description="share of a layer's output power that may be lost")
    rank: int | None = Field(None, ge=1, le=1_000_000, description="rank kept at every site")
    layers: dict[str, Share] = Field(
        {}, description="share of multiply-adds kept where a node's name fits the glob, instead of `keep`"
    )

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        given = [name for name in self.strengths() if getattr(self, name) is not None]
        if len(given) != 1:
            names = [f"`{name}`" for name in self.strengths()]
            raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}")
        return self

    @classmethod
    def strengths(cls) -> tuple[str, ...]:
        """Return the options of which one says how strong."""
        return ("keep", "error", "rank")

    # -------------------------------------------------------------------------------- what a scheme is

    def unfit(self, form: Layer) -> str:
        """Return why this scheme cannot split a layer of that form, or nothing."""
        raise NotImplementedError

    def most(self, form: Layer) -> int:
        """Return the greatest rank that is worth a thought: the one at which the split is exact."""
        raise NotImplementedError

    def has(self, form: Layer, rank: int) -> bool:
        """Say whether a rank from 1 to the greatest is one; 1 is."""
        return True

    def like(self, rank: int, form: Layer) -> Sequence[int]:
        """Return the ranks that a layer may have instead of one that was planned before it was cut, mildest first."""
        return [r for r in range(min(2 * rank, self.most(form)), 0, -1) if self.has(form, r)]

    def shapes(self, form: Layer, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of one group's stages at a rank, in order."""
        raise NotImplementedError

    def stages(self, form: Layer, weights: Sequence[Array]) -> tuple[Stage, ...]:
        """Return one group's stages from their weights, in order."""
        raise NotImplementedError

    def label(self, rank: int) -> str:
        """Return what a rank is called."""
        return f"rank {rank}"

    def named(self, rank: int) -> int:
        """Return the rank that `rank` asks for by its number."""
        return rank

    def price_of(self, price: LayerPrice, rank: int) -> LayerPrice:
        """Return what a layer costs by the stages of a rank."""
        return price

    def whole(self, form: Layer) -> str:
        """Return what the rank is called at which the split is exact."""
        return str(self.most(form))

    def scales_with(self, form: Layer) -> tuple[Sides, ...]:
        """Return what each stage's cost goes with: the first reads what the layer does, the last makes it."""
        last = len(self.shapes(form, 1)) - 1
        return tuple((index == 0, index == last) for index in range(last + 1))

    def fit(self, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        """Return the split of one group's W[o, d] with H[d, d], or without data."""
        raise NotImplementedError

    def bound(self, node: ir.Node, form: Layer, rank: int) -> float | None:
        """Return a bound on |dy| / |x| of a split without data, if one is known."""
        return None

    # -------------------------------------------------------------------------------- where

    def sites(self, view: View) -> list[Site | Skip]:
        """Return the layers that may be split, and why others are left alone."""
        found: list[Site | Skip] = []
        for node in view.graph:
            if node.op_type not in self.ops or node.domain not in ("", "ai.onnx"):
                continue
            name = str(node.name)
            form = linear.layer(node)
            if excluded := view.excluded(node):
                found.append(excluded)
            elif reason := form if isinstance(form, str) else self._refusal(node, form):
                found.append(Skip(name, reason))
            else:
                assert isinstance(form, Layer)
                found.append(Site((name,), input=form.input, output=form.output))
        return found

    def _refusal(self, node: ir.Node, form: Layer) -> str:
        if reason := graph.weight_refusal(node.inputs[form.weight]):
            return reason
        weight = graph.constant(node.inputs[form.weight])
        if weight is None or weight.dtype.kind in "iub":
            return "its weight holds integers"
        if not graph.is_finite(weight):
            return "its weight is not finite"
        if self.statistics == "calibration" and (reason := fitting.refusal(node, form)):
            return f"{reason}: `statistics: weights` splits it"
        if reason := self.unfit(form):
            return reason
        least = sum(math.prod(shape) for shape in self.shapes(form, 1))
        if least >= form.out * form.columns:
            size = f"{form.out} x {form.columns}"
            return f"{size} is too small: already rank 1 costs {least} for {form.out * form.columns}"
        return ""

    # -------------------------------------------------------------------------------- what it loses and costs

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Fit all sites at all ranks that may be asked for."""
        forms = [self._form(view, site) for site in sites]
        items = ((self._metrics(view, form), form, self._prices(view)[form.name]) for form in forms)
        for form, points in zip(forms, view.map(self.curve, items), strict=True):
            view.remember(self._key(form), points)

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return the layer as it is (strength 0), then ranks that cost less; error is the share of power lost."""
        form = self._form(view, site)
        price = self._prices(view)[form.name]
        found = [Choice(0.0, 0.0, form.groups * form.out * form.columns, price.macs, price.seconds)]
        item = (self._metrics(view, form), form, price)
        for rank, error in view.once(self._key(form), lambda: view.map(self.curve, [item])[0]):
            params, macs = self.costs(form, rank, price)
            found.append(Choice(float(rank), error, params, macs, self.price_of(price, rank).seconds_of(macs)))
        return found

    def _key(self, form: Layer) -> tuple[object, ...]:
        return ("curve", self.pass_name(), self.model_dump_json(), form.name)

    def curve(self, task: Task) -> list[Point]:
        """Return the ranks that may be asked for and cost less than the whole layer, mildest first."""
        return self.points(task)

    def points(self, task: Task) -> list[Point]:
        """Return the ranks of `ranks` that cost less than the whole layer, and what they lose."""
        metrics, form, price = task
        ranks = [rank for rank in self.ranks(form, price) if self.pays(form, rank, price)]
        return list(zip(ranks, self.shares_lost((metrics, form, ranks)), strict=True))

    def costs(self, form: Layer, rank: int, price: LayerPrice) -> tuple[int, int]:
        """Return the parameters and multiply-adds of a layer at a rank."""
        shapes, price = self.shapes(form, rank), self.price_of(price, rank)
        return form.groups * sum(math.prod(shape) for shape in shapes), price.macs_of(form.groups, shapes)

    def pays(self, form: Layer, rank: int, price: LayerPrice) -> bool:
        """Say whether a rank costs less than the whole layer in both."""
        params, macs = self.costs(form, rank, price)
        return params < form.groups * form.out * form.columns and macs < price.macs

    def ranks(self, form: Layer, price: LayerPrice) -> list[int]:
        """Return the ranks that a curve tells, mildest first: all that may be asked for."""
        ranks = {split_prices.rank_of(self, share, form, price) for share in self.levels(form)}
        if isinstance(self.rank, int) and self.wanted(form.name) is None:
            ranks.add(min(self.rank, self._break_even(form, price)))
        return sorted(ranks - {0}, reverse=True) or [1]

    def levels(self, form: Layer) -> list[float]:
        """Return the shares of a layer's multiply-adds that may be asked for."""
        wanted = self.wanted(form.name)
        given = [] if wanted is None else [wanted]
        return given if (given or self.rank) and self.on_violation != "weaken" else [*LEVELS, *given]

    def _break_even(self, form: Layer, price: LayerPrice) -> int:
        """Return the greatest rank that costs less than the layer does, in multiply-adds and parameters."""
        rank = split_prices.rank_of(self, 1 - 0.5 / max(price.macs, 1), form, price)
        while rank and sum(math.prod(shape) for shape in self.shapes(form, rank)) >= form.out * form.columns:
            rank -= 1
        return rank

    def wanted(self, name: str) -> float | None:
        """Return the share of its multiply-adds that a layer is asked to keep, if any."""
        for glob, share in self.layers.items():
            if fnmatch.fnmatchcase(name, glob):
                return share
        return self.keep if isinstance(self.keep, float) else None

    def losses(self, W: Array, H: Array | None, form: Layer, ranks: Sequence[int]) -> list[float]:
        """Return what each rank loses of one group: tr((What - W) H (What - W)^T)."""
        return [self.fit(W, H, form, rank).loss for rank in ranks]

    def shares_lost(self, item: tuple[Sequence[Metric], Layer, Sequence[int]]) -> list[float]:
        """Return the share of a layer's output power that each rank loses, or of its weight's without data."""
        metrics, form, ranks = item
        power = sum(metric.power for metric in metrics)
        total = np.sum([self.losses(metric.W, metric.H, form, ranks) for metric in metrics], axis=0)
        return [min(float(loss) / power, 1.0) if power > 0 else 0.0 for loss in total]

    def _factors(self, view: View, form: Layer, rank: int) -> list[Factors]:
        """Return the splits of a layer's groups as the graph came in."""
        return [self.fit(metric.W, metric.H, form, rank) for metric in self._metrics(view, form)]

    def _prices(self, view: View) -> Mapping[str, LayerPrice]:
        """Return what layers cost, whole and split."""
        key = ("prices", self.pass_name())
        return view.once(key, lambda: split_prices.prices(self, self._forms(view), view))

    # -------------------------------------------------------------------------------- how strong

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return what loses least of what costs as the options ask, or the strongest that loses as little."""
        whole, rest = choices[0], choices[1:]
        name, wanted = site.nodes[0], self.wanted(site.nodes[0])
        if wanted == 1:
            return Skip(name, "all of it stays")
        if not rest:
            return Skip(name, NO_RANK)
        if wanted is not None:
            fitting_ = [choice for choice in rest if choice.macs <= wanted * whole.macs]
            return (
                min(fitting_, key=lambda choice: choice.error)
                if fitting_
                else Skip(name, f"no rank costs only {wanted:.3g} of the layer")
            )
        if self.rank is not None:
            fitting_ = [choice for choice in rest if self.named(int(choice.strength)) == self.rank]
            most = self.named(int(rest[0].strength))
            return fitting_[0] if fitting_ else Skip(name, f"rank {self.rank}{BEYOND} {most}")
        return self.within(site, choices, self.error or 0.0)

    def within(self, site: Site, choices: Sequence[Choice], error: float) -> Choice | Skip:
        """Return the cheapest choice that loses at most `error`, if the target gains from it."""
        whole, rest = choices[0], choices[1:]
        if not rest:
            return Skip(site.nodes[0], NO_RANK)
        fitting_ = [choice for choice in rest if choice.error <= error * (1 + 1e-9) + 1e-14]
        if not fitting_:
            mildest = rest[0]
            return Skip(
                site.nodes[0], f"{self.label(int(mildest.strength))}, the mildest that pays, loses {mildest.error:.3g}"
            )
        chosen = fitting_[-1]
        if whole.seconds and chosen.seconds >= whole.seconds:
            times = f"{chosen.seconds * 1e6:.3g} us for {whole.seconds * 1e6:.3g}"
            return Skip(site.nodes[0], f"{self.label(int(chosen.strength))} would take {times} on the target")
        return chosen

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Spend a budget over all layers, or pick layer by layer."""
        if not isinstance(self.keep, Budget) or not curves:
            return super().plan(curves, view)
        assert view.costs is not None
        sites, ((what, share),) = [site for site, _ in curves], self.keep.given
        allowed = [self._allowed(site, choices) for site, choices in curves]
        found = []
        for site, choices in zip(sites, allowed, strict=True):
            size = linear.matrix_dtype(graph.node_named(view.graph, site.nodes[0]), self._form(view, site)).itemsize
            costs = np.array([cost_of(choice, what, size) for choice in choices])
            found.append(allocation.Curve(self.impacts(site, choices, view), costs))
        limit = share * float(getattr(view.costs.source, what)) - self._reserve(sites, what, view)
        chosen = split_prices.spend(self, [site.nodes[0] for site in sites], allowed, found, (what, limit), view)
        return [spared(site, choice) for site, choice in zip(sites, chosen, strict=True)]

    def impacts(self, site: Site, choices: Sequence[Choice], view: View) -> Array:
        """Return what each choice does to the outputs, measured by splitting this layer alone at some levels."""
        errors = np.array([choice.error for choice in choices])
        if not self.sensitivity or view.stats is None:
            return errors
        stats, form = view.stats, self._form(view, site)
        points: dict[float, float] = {}
        for level in impacts.LEVELS:
            choice = min(choices, key=lambda c: abs(c.macs - level * choices[0].macs))
            if choice.strength and choice.error > 0 and choice.error not in points:
                trial = graph.copy(view.model)
                composed = [group.composed for group in self._factors(view, form, int(choice.strength))]
                self._impose(trial, form, np.stack(composed), view)
                points[choice.error] = stats.impact(trial, view.model)
        return impacts.interpolated(points, errors)

    # -------------------------------------------------------------------------------- the fit

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Split layer by layer in topological order, each fitted to what the graph so far makes of the data."""
        if not plan:
            return []
        found = self._walk(plan, self.split, view)
        view.changed()
        return found

    def stage_costs(self, site: Site, choice: Choice, what: str, view: View) -> tuple[float, ...]:
        """Return what each stage of a choice costs in a budget's measure; seconds go by multiply-adds."""
        form = self._form(view, site)
        rank = int(choice.strength)
        shapes, price = self.shapes(form, rank), self.price_of(self._prices(view)[form.name], rank)
        params = [form.groups * math.prod(shape) for shape in shapes]
        macs = [n * size for n, size in zip(price.positions, params, strict=True)]
        if what == "macs":
            return tuple(macs)
        if what == "seconds":
            return tuple(choice.seconds * part / max(sum(macs), 1e-30) for part in macs)
        dtype = linear.matrix_dtype(graph.node_named(view.graph, form.name), form)
        return tuple(float(count * (dtype.itemsize if what == "stored_bytes" else 1)) for count in params)

    def rank_left(self, choice: Choice, was: Layer, node: ir.Node, view: View) -> int:
        """Return the rank that a choice comes to where cuts have shrunk the layer; 0 where whole it costs no more.

        See split_prices.rank_left; costs are in the budget's measure: parameters, or multiply-adds.
        """
        form, rank = linear.layer(node), int(choice.strength)
        positions = self.price_of(self._prices(view)[was.name], rank).positions
        assert isinstance(form, Layer)
        if isinstance(self.keep, Budget) and self.keep.given[0][0] in ("params", "stored_bytes"):
            positions = (1.0,) * len(positions)
        return 0 if self.unfit(form) else split_prices.rank_left(self, rank, was, form, positions)

    def split(self, node: ir.Node, site: Site, choice: Choice, data: Data | None) -> Site:
        """Put the stages in the layer's place, fitted on a walk through the data, or without data to its weight.

        data: what the layer was in the graph before, and the walk, which has come to it.
        """
        form, rank = linear.layer(node), int(choice.strength)
        assert isinstance(form, Layer)
        if data is None:
            fitted = split_fits.to_weight(self, node, form, rank)
            note = f"{choice.error:.3g} of the weight's power lost"
        else:
            fitted = split_fits.to_outputs(self, node, form, rank, data, self.ridge)
            note = f"{fitted.lost:.3g} of the output's power lost, {choice.error:.3g} predicted"
        label = f"{self.label(rank)} of {self.whole(form)}, {note}"
        label = "; ".join([label, *dict.fromkeys(group.note for group in fitted.groups if group.note)])
        bound = self.bound(node, form, rank) if data is None else None
        try:
            nodes = stages.put(node, form, stages.merged([group.stages for group in fitted.groups]), fitted.bias)
        except FloatingPointError as error:
            raise PassError(str(error), hint="Leave the layer alone with `skip`.") from error
        return Site(tuple(str(made.name) for made in nodes), label, site.input, site.output, bound)
