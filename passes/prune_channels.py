"""Remove whole channels, and refit the layers that read them so that they lose the least output.

A group of coupled channels (everything that must shrink together: producers, normalisation, residual and concatenated
paths, consumers) loses units one by one. Dropping the columns u of y = W x costs, after the best repair of the rest,

    tr( W_u ([H^-1]_uu)^-1 W_u^T ),   H = E[x x^T] centred (the mean goes into the bias),

summed over all consumers, each relative to its own output power. H is shrunk as its sample size asks (OAS). A budget
is spent over all groups by what each does to the outputs, measured on calibration inputs that the fit has not seen. At
the end the layers are refitted in topological order, W' = argmin |Y - W' X'|^2, with the inputs X' that the pruned
graph really makes and the outputs Y of the graph before the step.

Fires:  groups that nothing pins (graph outputs, unknown ops, ... do), whose readers are plain linear layers.
Error:  measured on calibration data per group: the share of the consumers' output power that is lost.
Cost:   parameters and multiply-adds fall with the product of the channels kept on both sides.
Source: He et al. 2017, arXiv:1707.06168; Kurtic et al. 2023 (ZipLM), arXiv:2302.04089; Li et al. 2017, arXiv:1608.08710
        (l1); He et al. 2019, arXiv:1811.00250 (geometric median); Molchanov et al. 2017, arXiv:1611.06440 (activation).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import cutting, fitting, graph, impacts, importance
from ccompile.analysis import cuts
from ccompile.analysis.channels import Group, channels
from ccompile.analysis.cuts import Reader
from ccompile.core import Array, Budget, Choice, Compression, Kind, Share, Site, Skip, Statistics, View
from ccompile.errors import PassError
from ccompile.fitting import WIDEST, Was
from ccompile.moments import Layer, Moments
from ccompile.numerics import allocation, obs, saliency, swaps
from ccompile.numerics.obs import Consumer, Trace


class PruneChannels(Compression):
    """Options of prune-channels: exactly one of keep and error."""

    kind: ClassVar[Kind] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)

    keep: Share | Annotated[int, Field(ge=2)] | Budget | None = Field(
        None, description="share or number of units kept in every group, or a share of the source's cost to spend"
    )
    error: float | None = Field(None, ge=0, lt=1, description="share of the consumers' output power lost per group")
    layers: dict[str, Share | Annotated[int, Field(ge=2)]] = Field(
        {}, description="share or number kept where a producer's name fits the glob, instead of `keep`"
    )
    criterion: Literal["reconstruction", "activation", "l1", "l2", "geometric-median", "random"] = Field(
        "reconstruction",
        description="which units go first; but for reconstruction, errors are shares of the summed squared scores",
    )
    swaps: int = Field(
        0, ge=0, le=10_000, description="exchanges of a kept with a removed unit per group that may better the choice"
    )
    coupled: bool = Field(True, description="prune groups of several producers or consumers too (residual spines)")
    align: int = Field(1, ge=1, le=1024, description="keep a multiple of this many units")
    refit: Literal["none", "readers", "all"] = Field(
        "all", description="layers refitted to calibration data in topological order: those that read a cut, or all"
    )
    ridge: float | None = Field(
        None, ge=0, le=1, description="ridge of all fits, relative to each column's variance; by default as samples ask"
    )
    sensitivity: bool = Field(True, description="for a budget, measure what each group does to the outputs")
    statistics: Literal["calibration", "weights"] = Field(
        "calibration",
        description="fit to calibration data, or, without any, in the metric of the weights alone; for random inputs "
        "give `data.calibration: {synthetic: {}}`",
    )

    @model_validator(mode="after")
    def _one_strength(self) -> PruneChannels:
        if (self.keep is None) == (self.error is None):
            raise ValueError("give exactly one of `keep` and `error`")
        if self.criterion == "activation" and self.statistics == "weights":
            raise ValueError("`criterion: activation` is measured on data: it cannot go with `statistics: weights`")
        if self.swaps and self.criterion != "reconstruction":
            raise ValueError("`swaps` better what `criterion: reconstruction` chose, not other criteria")
        return self

    def sites(self, view: View) -> list[Site | Skip]:
        """Return the groups that may shrink, and why the others may not."""
        found: list[Site | Skip] = [
            Skip(str(node.name), f"linear layers in its subgraphs are left alone: {inner}")
            for node in view.graph
            if (inner := sum(n.op_type in graph.LINEAR for g in graph.subgraphs(node) for n in g.all_nodes()))
        ]
        for group in view.ask(channels).groups:
            if group.pinned:
                found += [Skip(skip.node, f"group `{group.name}`: {skip.reason}") for skip in group.pinned[:1]]
                continue
            producers = [member.node for member in group.by_role("producer")]
            excluded = [skip for name in producers if (skip := view.excluded(graph.node_named(view.graph, name)))]
            layers = cuts.readers(view.model, group)
            if excluded:
                found.append(excluded[0])
            elif isinstance(layers, str):
                found.append(Skip(group.name, layers))
            elif reason := self._refusal(group, layers):
                found.append(Skip(group.name, reason))
            else:
                found.append(Site(_names(group), f"{group.size} units", output=layers[0].layer.output))
        return found

    def _refusal(self, group: Group, layers: Sequence[Reader]) -> str:
        if group.size < 2:
            return "it has one unit only"
        if any(reader.layer.columns > WIDEST for reader in layers):
            return f"a layer with more than {WIDEST} columns per group reads it"
        producers = {m.node for m in group.by_role("producer")}
        if not self.coupled and (len(producers) > 1 or len({reader.layer.name for reader in layers}) > 1):
            return "it is shared by several layers (coupled: false)"
        return ""

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Find the order in which the units of each group go. Raises PassError when that needs data and has none."""
        if sites and view.stats is None:
            self._require_data()
        groups = [view.ask(channels).named(site.nodes[0]) for site in sites]
        for group, trace in zip(groups, self._traces(groups, view), strict=True):
            view.remember(("trace", group.name), trace)

    def _require_data(self) -> None:
        if self.statistics == "weights":
            return
        without = {"reconstruction": "statistics: weights", "activation": "criterion: l1"}
        wanted = {f"criterion: {self.criterion}": without[self.criterion]} if self.criterion in without else {}
        if self.refit != "none":
            wanted[f"refit: {self.refit}"] = "refit: none"
        if isinstance(self.keep, Budget) and self.sensitivity:
            wanted["sensitivity: true"] = "sensitivity: false"
        if wanted:
            uses = " and ".join(f"`{option}`" for option in wanted)
            ways = wanted.values() if self.criterion != "reconstruction" else ["statistics: weights"]
            raise PassError(
                f"prune-channels needs calibration data for {uses}, and the spec gives none",
                hint="Give `data.calibration`, or the step " + " and ".join(f"`{way}`" for way in ways) + ".",
            )

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return every number of units that may stay; error is the share of the consumers' output power lost."""
        group = view.ask(channels).named(site.nodes[0])
        order, loss = self._order(group, view)
        base = cutting.curve(view.model, group, order, loss)
        return [c for c in base if c.strength == group.size or int(c.strength) % self.align == 0]

    def _order(self, group: Group, view: View) -> tuple[Array, Array]:
        """Return the removal order of the units and the loss after each removal."""
        trace = view.once(("trace", group.name), lambda: self._traces([group], view)[0])
        return view.once(("order", group.name), lambda: cutting.sparing(group, trace.order, trace.loss))

    def _traces(self, groups: Sequence[Group], view: View) -> list[Trace]:
        if self.criterion == "reconstruction":
            limits = [group.size - max(1, self._fewest(group) - len(group.parts())) for group in groups]
            tasks = ((self._consumers(group, view), limit) for group, limit in zip(groups, limits, strict=True))
            return view.map(obs.traced, tasks)
        return [saliency.ranked(self._scores(group, view)) for group in groups]

    def _scores(self, group: Group, view: View) -> Array:
        """Return the importance of each unit."""
        if self.criterion == "activation":
            layers = cutting.readers(view.model, group)
            return importance.of_activations(layers, self._moments(view), group.size, partial(self._absorbs, view))
        if self.criterion == "random":
            return saliency.random_scores(group.size, view.rng)
        assert self.criterion != "reconstruction"
        return importance.of_weights(view.model, group, self.criterion)

    def _absorbs(self, view: View, reader: Reader) -> bool:
        """Return whether a reader's bias will make up for the mean of what it loses."""
        node = graph.node_named(view.graph, reader.layer.name)
        return self.refit != "none" and reader.layer.op != "MatMul" and fitting.is_fittable(node, reader.layer)

    def _consumers(self, group: Group, view: View) -> list[Consumer]:
        found = []
        for reader in cutting.readers(view.model, group):
            moments = self._moments(view)[reader.layer.name] if self.statistics == "calibration" else None
            node = graph.node_named(view.graph, reader.layer.name)
            found += cutting.consumers(node, reader, moments, self.ridge)
        return found

    def _moments(self, view: View) -> Mapping[str, Moments]:
        """Return the moments of all layers that read any group, observed once."""

        def forms() -> list[Layer]:
            readers = (cuts.readers(view.model, group) for group in view.ask(channels).free)
            found = [reader.layer for layers in readers if not isinstance(layers, str) for reader in layers]
            return [form for form in found if form.columns <= WIDEST]

        return view.observe(view.once("readers", forms))

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return the choice that `layers`, `keep` or `error` ask for."""
        size = int(choices[0].strength)
        chosen = self._asked(site, choices) or [choice for choice in choices if choice.error <= (self.error or 0.0)][-1]
        return chosen if chosen.strength < size else Skip(site.nodes[0], f"all {size} units stay")

    def _asked(self, site: Site, choices: Sequence[Choice]) -> Choice | None:
        """Return the choice that `layers` or `keep` ask for by a number of units, if they do."""
        count = self._count(site.nodes, int(choices[0].strength))
        return None if count is None else [choice for choice in choices if choice.strength >= count][-1]

    def _fewest(self, group: Group) -> int:
        """Return how many units the end of a group's curve keeps; sensitivity is measured along the whole curve."""
        return 1 if isinstance(self.keep, Budget) else self._count(_names(group), group.size) or 1

    def _count(self, names: Sequence[str], size: int) -> int | None:
        """Return how many units are asked for of a group of producers `names`; None: what a budget or error takes."""
        globs = (value for glob, value in self.layers.items() if any(fnmatch.fnmatchcase(n, glob) for n in names))
        wanted = next(globs, self.keep)
        if wanted is None or isinstance(wanted, Budget):
            return None
        return min(size, wanted if isinstance(wanted, int) and wanted > 1 else max(1, round(size * wanted)))

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Spend a budget over all groups, or pick group by group."""
        if not isinstance(self.keep, Budget) or not curves:
            return super().plan(curves, view)
        groups = [view.ask(channels).named(site.nodes[0]) for site, _ in curves]
        allowed = [[asked] if (asked := self._asked(*curve)) else list(curve[1]) for curve in curves]
        cost, limit = self._cost(groups, view)
        kept = [np.array([choice.strength for choice in choices]) for choices in allowed]
        errors = [np.array([choice.error for choice in choices]) for choices in allowed]

        def price(options: Array) -> Array:
            return cost(np.stack([kept[site][options[:, site]] for site in range(len(kept))], axis=1))

        if self.sensitivity and view.stats is not None:
            errors = []
            for index, ((_, choices), group, rest) in enumerate(zip(curves, groups, allowed, strict=True)):
                view.tell(f"sensitivity {index + 1}/{len(groups)} groups")
                errors.append(self._impacts(choices, group, rest, view.stats, view))
        try:
            options = allocation.allocate_interacting(errors, price, limit)
        except ValueError as error:
            raise PassError(f"the budget cannot be met: {error}", hint="Raise it, or allow more groups.") from error
        chosen = [choices[option] for choices, option in zip(allowed, options, strict=True)]
        return [
            Skip(site.nodes[0], "the budget leaves all its units") if c.strength == group.size else c
            for (site, _), group, c in zip(curves, groups, chosen, strict=True)
        ]

    def _cost(self, groups: Sequence[Group], view: View) -> tuple[cuts.Price, float]:
        """Return the cost of kept[m, site] units in the budget's measure, and its limit."""
        assert isinstance(self.keep, Budget)
        assert view.costs is not None
        ((what, share),), orders = self.keep.given, [self._order(group, view)[0] for group in groups]
        refits = self.refit != "none" and self.statistics == "calibration"
        reserve = fitting.biases(view.model, fitting.forms(view.model), what) if refits else 0.0
        return cutting.price(groups, orders, what, reserve, view), share * float(getattr(view.costs.source, what))

    def _impacts(
        self, choices: Sequence[Choice], group: Group, wanted: Sequence[Choice], stats: Statistics, view: View
    ) -> Array:
        """Return what each wanted choice does to the outputs, measured by cutting this group alone at LEVELS.

        Between the measured levels, log impact runs linearly over log error; outside, in proportion to the error.
        """
        points: dict[float, float] = {}
        for level in impacts.LEVELS:
            choice = min(choices, key=lambda c: abs(c.strength - level * group.size))
            if choice.error > 0 and choice.strength < group.size:
                trial = graph.copy(view.model)
                self._cut(trial, {group: self._keep(group, choice, view)}, view)
                points[choice.error] = stats.impact(trial, view.model)
        return impacts.interpolated(points, np.array([choice.error for choice in wanted]))

    def _keep(self, group: Group, choice: Choice, view: View) -> Array:
        order, _ = self._order(group, view)
        count = int(choice.strength)
        keep = np.ones(group.size, bool)
        keep[order[: group.size - count]] = False
        return keep if not self.swaps or keep.all() else self._swapped(group, keep, view)

    def _swapped(self, group: Group, keep: Array, view: View) -> Array:
        """Return as many units that together lose no more, found by exchanges."""

        def search() -> Array:
            fixed = [part[keep[part]][-1] for part in group.parts()]  # no value may lose all that it has
            kept = np.flatnonzero(keep)
            found = swaps.swap_search(self._consumers(group, view), kept, self.swaps, ridge=0.0, fixed=fixed)
            return np.isin(np.arange(group.size), found.keep)

        return view.once(("swapped", group.name, int(keep.sum())), search)

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Cut all groups at once, then refit every layer that reads them in topological order."""
        if not plan:
            return []
        found = [self.left(site, choice, view) for site, choice in plan]
        was, before = fitting.forms(view.model), graph.copy(view.model)
        rows, touched = self.cut(plan, view)
        if self.refit != "none" and self.statistics == "calibration" and view.stats is not None:
            wanted = touched if self.refit == "readers" else _from_first(touched, was)
            goals = {name: Was(known.layer, rows.get(name)) for name, known in was.items()}
            fitting.refit(view.model, wanted, goals, view.stats.chain(view.model, before), self.ridge, view.tell)
        return found

    def left(self, site: Site, choice: Choice, view: View) -> Site:
        """Return what is left of a site that will be cut so."""
        size = view.ask(channels).named(site.nodes[0]).size
        said = "predicted error" if self.criterion == "reconstruction" else f"share of {self.criterion} lost"
        metric = ", in the metric of the weights alone" if self.statistics == "weights" else ""
        return replace(site, note=f"{int(choice.strength)} of {size} units kept, {said} {choice.error:.3g}{metric}")

    def cut(self, plan: Sequence[tuple[Site, Choice]], view: View) -> tuple[dict[str, Array], set[str]]:
        """Cut all groups at once; return which output channels stay by layer, and the layers that read a cut."""
        keeps = self.keeps(plan, view)
        rows = cutting.kept_rows(keeps, fitting.forms(view.model))
        touched = self._cut(view.model, keeps, view)
        view.changed()
        return rows, touched

    def keeps(self, plan: Sequence[tuple[Site, Choice]], view: View) -> dict[Group, Array]:
        """Return which units of each group stay."""
        found = {group.name: group for group in view.ask(channels).groups}
        return {found[site.nodes[0]]: self._keep(found[site.nodes[0]], choice, view) for site, choice in plan}

    def removal(self, site: Site, view: View) -> tuple[Group, Array]:
        """Return the group of a site and the order in which its units go."""
        group = view.ask(channels).named(site.nodes[0])
        return group, self._order(group, view)[0]

    def impacts(self, site: Site, choices: Sequence[Choice], view: View) -> Array:
        """Return what each choice does to the outputs, measured by cutting this group alone at some levels."""
        if not self.sensitivity or view.stats is None:
            return super().impacts(site, choices, view)
        return self._impacts(choices, view.ask(channels).named(site.nodes[0]), choices, view.stats, view)

    def _cut(self, model: ir.Model, keeps: Mapping[Group, Array], view: View) -> set[str]:
        """Repair the readers' weights for what they lose, then remove it; return the readers' names."""

        def repair(node: ir.Node, form: Layer, lost: Array) -> Array | None:
            if self.statistics != "calibration" or self.refit == "none" or not fitting.is_fittable(node, form):
                return None
            return cutting.repaired(node, form, lost, self._moments(view)[form.name], self.ridge)

        return cutting.cut(model, keeps, repair)


def _names(group: Group) -> tuple[str, ...]:
    """Return the names by which `layers` and reports know a group."""
    return tuple(dict.fromkeys((group.name, *(member.node for member in group.by_role("producer")))))


def _from_first(touched: set[str], was: Mapping[str, Was]) -> list[str]:
    """Return all layers from the first touched one on, in topological order."""
    names = list(was)
    return names[min(names.index(name) for name in touched) :]
