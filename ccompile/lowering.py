"""Lowerings: the same function in other ops, where a machine runs them faster.

A pass says which formulations fit a site. Which of them is taken, if any, is decided here: in context, for what stands
around a site takes part in what it costs (an activation that a convolution absorbs, a layout that an op breaks).
Sites are decided one after the other, in topological order, each on the graph as it then is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ccompile import graph
from ccompile.core import Candidate, Kind, PassResult, Rewrite, Site, Skip, View
from ccompile.errors import PassError
from ccompile.tolerance import EXACT_RELATIVE_L2

AS_IS = "as is"  # the decision to leave a site alone
_HOPS = 4  # nodes between a site and the end of its excerpt, at most


@dataclass(frozen=True)
class Formulation:
    """One way to compute what a node computes.

    `bound`: relative L2 error of its output; 0 for float reordering. `build` puts new nodes in the node's place and
    returns them; it is called on excerpts, too, and so takes everything that is part of a graph from the node it is
    given (node.graph, node.inputs). `nodes`: what else it replaces, by name.
    """

    label: str
    bound: float
    build: Callable[[ir.Graph, ir.Node], Sequence[ir.Node]]
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Weighed:
    """What a formulation takes, in context and by the part of it that the site itself was, in seconds."""

    label: str
    seconds: float
    bound: float = 0.0


class Lowering(Rewrite):
    """A rewrite that has several formulations of a site and takes the fastest."""

    kind: ClassVar[Kind] = "exact"

    select: Literal["target", "measured", "always"] = Field(
        "target",
        description="take what is fastest by the target's estimate, or in runs on this machine; or the fastest other "
        "formulation by the estimate even where it is slower",
    )
    margin: float = Field(
        0.15, ge=0, lt=1, description="share of a site's time that another formulation must save to be taken"
    )

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        """Return what else could compute this node: nothing for another kind of node, a Skip for one that is refused.

        The graph is not changed.
        """
        raise NotImplementedError

    def run(self, view: View) -> PassResult:
        """Decide and rewrite site by site."""
        applied: list[Site] = []
        skipped: list[Skip] = []
        for node in [*view.graph]:
            if node.graph is not view.graph:
                continue  # part of an earlier site
            found = self._fitting(node, view)
            result = found if isinstance(found, Skip) else self._lowered(node, found, view) if found else None
            if isinstance(result, Skip):
                skipped.append(result)
            elif result is not None:
                applied.append(result)
        return PassResult(tuple(applied), tuple(skipped))

    def _fitting(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        found = self.formulations(node, view)
        if isinstance(found, Skip) or not found:
            return found
        if (excluded := view.excluded(node)) is not None:
            return excluded
        limit = self._limit()
        fitting = [form for form in found if form.bound <= limit]
        if fitting:
            return fitting
        least = min(found, key=lambda form: form.bound)
        return Skip(str(node.name), f"`{least.label}` may err by {least.bound:.2g}, more than the {limit:g} allowed")

    def _limit(self) -> float:
        """Return the relative L2 error that the step allows."""
        limit = EXACT_RELATIVE_L2["float32"] if self.kind == "exact" else 1.0
        asked = self.tolerance.relative_l2 if self.tolerance is not None else None
        return limit if asked is None else min(limit, asked)

    def _lowered(self, node: ir.Node, found: Sequence[Formulation], view: View) -> Site | Skip:
        """Decide on a site and, where another formulation is taken, write it."""
        name, labels = str(node.name), {form.label: form for form in found}
        weighed: list[_Weighed] = []
        label = view.decide(name, lambda: self._fastest(node, found, view, weighed))
        if label not in (*labels, AS_IS):
            there = f"The formulations that fit are: {', '.join(labels)}."
            raise PassError(f"the decision `{label}` is none that fits node `{name}`", hint=there)
        candidates = _candidates(weighed, label)
        if label == AS_IS:
            return Skip(name, _refusal(weighed), candidates)
        if view.costs is None:  # nothing is compiled: the question is where the pass could act
            return Site((name,), f"could be {', '.join(labels)}")
        form = labels[label]
        value = next((v for v in node.inputs if v is not None and not graph.is_constant(v)), None)
        site = Site((name, *form.nodes), _note(weighed, label), "" if value is None else str(value.name))
        output = str(node.outputs[0].name) if not form.nodes else ""
        form.build(view.graph, node)
        view.changed()
        return replace(site, output=output, candidates=candidates)

    def _fastest(self, node: ir.Node, found: Sequence[Formulation], view: View, weighed: list[_Weighed]) -> str:
        """Return the label of what is taken; what was weighed is added to `weighed`, as it is first."""
        costs = view.costs
        if costs is None:
            return found[0].label
        chosen = around(node, found)
        base = costs.excerpt(view.model, chosen)
        parts = [base, *(_rebuilt(base, node, form) for form in found)]
        rows = [costs.weigh(part) for part in parts]
        totals = [sum(row.values()) for row in rows]
        if math.isinf(totals[0]):
            weighed.append(_Weighed(AS_IS, totals[0]))
            return AS_IS
        site = {str(node.name), *(name for form in found for name in form.nodes)}
        share = sum(seconds for name, seconds in rows[0].items() if name in site) / totals[0] if totals[0] else 1.0
        if self.select == "measured":
            totals = list(costs.timed(view.model, parts))
        context = totals[0] * (1 - share)  # what the neighbourhood takes by itself
        labels, bounds = [AS_IS, *(form.label for form in found)], [0.0, *(form.bound for form in found)]
        weighed += [_Weighed(label, t - context, b) for label, t, b in zip(labels, totals, bounds, strict=True)]
        best = min(weighed[1:], key=lambda entry: entry.seconds)
        worth = best.seconds <= (1 - self.margin) * weighed[0].seconds and best.seconds < weighed[0].seconds
        return best.label if worth or self.select == "always" else AS_IS


def around(node: ir.Node, found: Sequence[Formulation] = ()) -> list[str]:
    """Return the names of a site's nodes and of their neighbourhood, in the graph's order.

    It reaches to the nearest linear ops on every path, which absorb what is around them, and at most four nodes far.
    """
    main = node.graph
    assert isinstance(main, ir.Graph)
    taken = {name for form in found for name in form.nodes}
    site = [other for other in main if other is node or other.name in taken]
    reached: set[ir.Node] = set(site)
    for step in (_producers, _readers):
        edge = site
        for _ in range(_HOPS):
            near = dict.fromkeys(other for last in edge for other in step(last) if other.graph is main)
            edge = [other for other in near if other not in site and other.op_type not in graph.LINEAR]
            reached |= near.keys()
    return [str(other.name) for other in main if other in reached]


def _producers(node: ir.Node) -> list[ir.Node]:
    made = (value.producer() for value in node.inputs if value is not None and not graph.is_constant(value))
    return [other for other in made if other is not None]


def _readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for value in node.outputs for use in value.uses()]


def _rebuilt(base: ir.Model, node: ir.Node, form: Formulation) -> ir.Model:
    """Return a copy of an excerpt with a formulation in the node's place."""
    part = graph.copy(base)
    form.build(part.graph, graph.node_named(part.graph, str(node.name)))
    graph.remove_dead(part.graph)
    graph.name_nodes(part.graph)
    return part


def _candidates(weighed: Sequence[_Weighed], label: str) -> tuple[Candidate, ...]:
    """Return what was weighed, fastest first; strength 0 is the site as it was."""
    pairs = sorted(enumerate(weighed), key=lambda pair: pair[1].seconds)
    return tuple(Candidate(w.label, float(i), w.bound, 0.0, w.seconds, w.label == label) for i, w in pairs)


def _note(weighed: Sequence[_Weighed], label: str) -> str:
    seconds = {entry.label: entry.seconds for entry in weighed}
    return f"{label}, {_times(seconds[label], seconds[AS_IS])}" if seconds else f"{label}, as locked"


def _refusal(weighed: Sequence[_Weighed]) -> str:
    if not weighed:
        return "left alone, as locked"
    if math.isinf(weighed[0].seconds):
        return "what it takes is not known: neither are its shapes"
    best = min(weighed[1:], key=lambda entry: entry.seconds)
    return f"no formulation pays: {best.label} takes {_times(best.seconds, weighed[0].seconds)}"


def _times(seconds: float, before: float) -> str:
    """Return both times in words.

    >>> _times(8e-5, 1e-4)
    '80.0 us for 100.0 us'
    """
    return f"{seconds * 1e6:.1f} us for {before * 1e6:.1f} us"
