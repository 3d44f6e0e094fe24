"""Spend one budget over several techniques: each layer gets the one, at the strength, that loses least.

For every layer and technique a curve strength -> error and cost is fitted, and what some of its points do to the
outputs is measured with that layer alone compressed. Of a layer's points only those that no cheaper one beats are
candidates; cuts of channel groups shrink the layers on both sides, whether these are split or not. The set of choices
with the least sum of impacts within the budget is found by Lagrangian descent and local moves on the joint cost, then
priced on the real graph. Cuts are made first; then, in topological order, each layer is split, coded or refitted,

    min E|Y - What X - b|^2   with the inputs X that the compressed graph makes and the outputs Y of the graph before.

Fires:  where a technique of `among` does.
Error:  measured on calibration data, per site and at the outputs.
Cost:   the budget, of the source's macs, params, stored_bytes or seconds (estimated on the target). What codes weights
        (cluster-weights, quantize-weights, ...) has its part in stored_bytes: mixed precision, layer by layer.
Source: Shoham and Gersho 1988; Chen et al. 2023 (BALF-like budgets over ranks); Frantar and Alistarh 2022,
        arXiv:2201.13096 (SPDY); Zhang et al. 2015, arXiv:1505.06798 (sequential asymmetric fits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile import coding, fitting, graph, split_prices, storage, surgery
from ccompile.analysis import linear
from ccompile.coding import Coding
from ccompile.core import Array, Budget, Candidate, Chain, Choice, Compression, Kind, Pass, Site, Skip, View
from ccompile.errors import PassError
from ccompile.fitting import Was
from ccompile.joint import Cutter, JointCost, Option, Slot, candidates, frontier
from ccompile.moments import Layer
from ccompile.numerics import allocation
from ccompile.splitting import Split

OURS = {"keep", "layers", "statistics", "refit", "ridge", "tolerance", "on_violation"}


class Allocate(Compression):
    """Options of allocate: a budget, and the techniques to spend it on."""

    kind: ClassVar[Kind] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)

    budget: Budget = Field(description="share of the source's macs, params, stored_bytes or seconds")
    among: tuple[str | dict[str, dict[str, Any]], ...] = Field(
        min_length=1,
        description="techniques, by name or with options: prune-channels, splits; for bytes what codes weights",
    )
    ridge: float | None = Field(
        None, ge=0, le=1, description="ridge of all fits, relative to each column's variance; by default as samples ask"
    )

    def members(self, find: Callable[[str], type[Pass]]) -> tuple[Compression, ...]:
        """Return the techniques, each ready to spend the budget. Raises ValueError for what is none."""
        found: list[Compression] = []
        for entry in self.among:
            name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            kind = find(name)
            if not (issubclass(kind, Compression) and issubclass(kind, (Split, Coding, Cutter))):
                raise ValueError(f"`{name}` cannot share a budget: prune-channels, splits and what codes weights can")
            if issubclass(kind, Coding) and self.budget.stored_bytes is None:
                raise ValueError(f"`{name}` spends `stored_bytes`: it leaves parameters and multiply-adds as they are")
            if taken := OURS & set(options or {}):
                raise ValueError(f"`{name}` in `among` takes no `{min(taken)}`: that is said once, for all techniques")
            common = {"keep": self.budget, "only": self.only, "skip": self.skip, "ridge": self.ridge}
            found.append(kind.model_validate({k: v for k, v in common.items() if v is not None} | dict(options or {})))
        if len({member.pass_name() for member in found}) < len(found):
            raise ValueError("`among` names a technique twice")
        return tuple(found)

    def _members(self, view: View) -> dict[str, Compression]:
        """Return the techniques by name: the note of a site says which it is of."""
        find = view.find
        assert find is not None
        return view.once("members", lambda: {member.pass_name(): member for member in self.members(find)})

    def _member(self, site: Site, view: View) -> tuple[Compression, View]:
        """Return the technique that a site is of, and the view as it has it: with its own options."""
        member = self._members(view)[site.note]
        return member, replace(view, options=member)

    def sites(self, view: View) -> list[Site | Skip]:
        """Return where any technique may act; a node that none can touch is left alone for the reason of the first."""
        found: list[Site | Skip] = []
        if view.find is None:  # inspection: the techniques speak for themselves
            return found
        skips: dict[str, Skip] = {}
        for name, member in self._members(view).items():
            for site in member.sites(replace(view, options=member)):
                if isinstance(site, Skip):
                    skips.setdefault(site.node, replace(site, reason=f"{name}: {site.reason}"))
                else:
                    found.append(replace(site, note=name))
        taken = {site.nodes[0] for site in found if isinstance(site, Site)}
        return found + [skip for node, skip in skips.items() if node not in taken]

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Fit the curves of all techniques. Raises PassError without calibration data."""
        if sites:
            view.calibration()
        for name, member in self._members(view).items():
            member.prepare([site for site in sites if site.note == name], replace(view, options=member))

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return the curve of the technique that the site is of."""
        member, own = self._member(site, view)
        return member.choices(site, own)

    # -------------------------------------------------------------------------------- the plan

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Return what to do at each site of each technique."""
        if not curves:
            return []
        assert view.costs is not None
        ((what, share),) = self.budget.given
        slots = self._slots(curves, what, view)
        chosen = self._spend(slots, what, share * float(getattr(view.costs.source, what)), view)
        taken = {id(option.site): option.choice for option in chosen}
        pairs = list(zip(slots, chosen, strict=True))
        view.remember("weighed", {slot.name: candidates(slot, option, what) for slot, option in pairs})
        left = {slot.name for slot, option in pairs if option is slot.options[0]}
        found: list[Choice | Skip] = []
        seen: set[str] = set()
        for site, _ in curves:
            name = self._slot_of(site, view)
            if name in left or id(site) not in taken:
                reason = "the budget leaves it whole" if name in left else "another technique loses less"
                told = self._weighed(site, view) if name in left and name not in seen else ()
                found.append(Skip(site.nodes[0], f"{site.note}: {reason}", told))
                seen.add(name)
            else:
                found.append(taken[id(site)])
        return found

    def _weighed(self, site: Site, view: View) -> tuple[Candidate, ...]:
        """Return what the plan weighed where a site is."""
        nothing: dict[str, tuple[Candidate, ...]] = {}
        return view.once("weighed", lambda: nothing).get(self._slot_of(site, view), ())

    def _slot_of(self, site: Site, view: View) -> str:
        """Return what a site decides on: a group of channels, or a layer."""
        kind = "layer" if isinstance(self._members(view)[site.note], (Split, Coding)) else "channels"
        return f"{kind} {site.nodes[0]}"

    def _slots(self, curves: Sequence[tuple[Site, Sequence[Choice]]], what: str, view: View) -> list[Slot]:
        options: dict[str, list[Option]] = {}
        slots: dict[str, Slot] = {}
        for number, (site, choices) in enumerate(curves):
            view.tell(f"sensitivity {number + 1}/{len(curves)} curves")
            (member, own), name = self._member(site, view), self._slot_of(site, view)
            impacts = member.impacts(site, choices, own)
            mine = options.setdefault(name, [Option(site.note, site, choices[0], 0.0)])
            if isinstance(member, Split):
                form = linear.layer(graph.node_named(view.graph, site.nodes[0]))
                assert isinstance(form, Layer)
                slots[name], sides = Slot(name, (), layer=form), member.scales_with(form)
                costs = [member.stage_costs(site, choice, what, own) for choice in choices[1:]]
            elif isinstance(member, Coding):
                form = linear.layer(graph.node_named(view.graph, site.nodes[0]))
                assert isinstance(form, Layer)
                slots[name], sides = Slot(name, (), layer=form), ((True, True),)
                costs = [(choice.stored_bytes,) for choice in choices[1:]]
            else:
                assert isinstance(member, Cutter)
                group, order = member.removal(site, own)
                slots[name], sides = Slot(name, (), group=group, order=order), ()
                costs = [()] * (len(choices) - 1)
            rest = zip(choices[1:], impacts[1:], costs, strict=True)
            mine += [Option(site.note, site, choice, float(impact), cost, sides) for choice, impact, cost in rest]
        return [replace(slot, options=frontier(options[name])) for name, slot in slots.items()]

    def _spend(self, slots: Sequence[Slot], what: str, limit: float, view: View) -> list[Option]:
        """Return the option of each slot; the real graph, cut and split so, keeps the limit."""
        cost = JointCost(slots, what, view)
        errors = [np.array([option.impact for option in slot.options]) for slot in slots]
        left = limit - fitting.biases(view.model, fitting.forms(view.model), what)

        def solve(left: float) -> list[Option]:
            options = allocation.allocate_interacting(errors, cost, left)
            return [slot.options[option] for slot, option in zip(slots, options, strict=True)]

        try:
            return allocation.within(solve, lambda chosen: self._priced(slots, chosen, what, view), limit, left)
        except ValueError as error:
            raise PassError(f"the budget cannot be met: {error}", hint="Raise it, or allow more.") from error

    def _priced(self, slots: Sequence[Slot], chosen: Sequence[Option], what: str, view: View) -> float:
        """Return what the graph costs when it is cut and split so."""
        assert view.costs is not None
        trial, members = graph.copy(view.model), self._members(view)
        done = [o for slot, o in zip(slots, chosen, strict=True) if o is not slot.options[0]]
        for name, cutter in members.items():
            if isinstance(cutter, Cutter):
                plan = [(o.site, o.choice) for o in done if o.technique == name]
                surgery.remove(trial, cutter.keeps(plan, view))
        for option in done:
            if isinstance(member := members[option.technique], Split):
                node = graph.node_named(trial.graph, option.site.nodes[0])
                was = linear.layer(graph.node_named(view.graph, option.site.nodes[0]))
                assert isinstance(was, Layer)
                if rank := member.rank_left(option.choice, was, node, view):
                    split_prices.hollow(member, node, rank)
        coded = [option for option in done if isinstance(members[option.technique], Coding)]
        return float(getattr(view.costs.report(trial), what)) - sum(_saved(option, trial, view) for option in coded)

    # -------------------------------------------------------------------------------- the fit

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Cut, then split and refit in topological order."""
        if not plan:
            return []
        members = self._members(view)
        layers = {site.nodes[0]: (site, choice) for site, choice in plan if not isinstance(members[site.note], Cutter)}
        if any(isinstance(members[site.note], Coding) for site, _ in layers.values()):
            coding.begin(view)
        was, before = fitting.forms(view.model), graph.copy(view.model)
        found, rows, touched = self._cut([pair for pair in plan if isinstance(members[pair[0].note], Cutter)], view)
        chain, started = view.calibration().chain(view.model, before), False
        nodes = [node for node in view.graph if node.name in was]
        for index, node in enumerate(nodes):
            name = str(node.name)
            started = started or name in layers or name in touched
            if not started:
                continue
            view.tell(f"fit {index + 1}/{len(nodes)} layers")
            goal_of = Was(was[name].layer, rows.get(name))
            made = self._made(node, *layers[name], (goal_of, chain), view) if name in layers else None
            if made is not None:
                found.append(made)
            else:
                fitting.refit_node(node, goal_of, chain, self.ridge)
        graph.remove_dead(view.graph)
        view.changed()
        return found

    def _cut(self, plan: Sequence[tuple[Site, Choice]], view: View) -> tuple[list[Site], dict[str, Array], set[str]]:
        """Cut; return what now stands there, which output channels stay by layer, and the layers that read a cut."""
        if not plan:
            return [], {}, set()
        cutter, own = self._member(plan[0][0], view)
        assert isinstance(cutter, Cutter)
        found = [self._told(site, cutter.left(site, choice, own), view) for site, choice in plan]
        return found, *cutter.cut(plan, own)

    def _told(self, site: Site, made: Site, view: View) -> Site:
        """Return what a technique made of a site, with its name and what was weighed."""
        return replace(made, note=f"{site.note}: {made.note}", candidates=self._weighed(site, view))

    def _made(self, node: ir.Node, site: Site, choice: Choice, data: tuple[Was, Chain], view: View) -> Site | None:
        """Code or split a layer; None where cuts have shrunk it so far that it costs no more whole."""
        member = self._members(view)[site.note]
        if isinstance(member, Coding):
            return self._told(site, member.code(node, site, choice, data, view), view)
        assert isinstance(member, Split)
        rank = member.rank_left(choice, data[0].layer, node, view)
        if not rank:
            return None
        return self._told(site, member.split(node, site, replace(choice, strength=float(rank)), data), view)


def _saved(option: Option, trial: ir.Model, view: View) -> float:
    """Return the bytes that coding a layer saves of what cuts have left of it."""
    name = option.site.nodes[0]
    was, now = (graph.node_named(model.graph, name) for model in (view.model, trial))
    form = linear.layer(now)
    assert isinstance(form, Layer)
    before, left = (storage.stored_bytes(node.inputs[form.weight]) for node in (was, now))
    return left - option.choice.stored_bytes * left / before
