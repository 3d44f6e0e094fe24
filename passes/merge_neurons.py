"""Merge neurons or filters that do nearly the same, without data.

With w = [weights, bias] of two units of a layer and w[j] ~= s w[i], the activation f gives f(w[j] x) ~= s f(w[i] x):
for s = 1 through any f that treats channels alike, for other s > 0 through positively homogeneous f. Unit j goes, and
every layer that reads the units makes up for it, tap by tap:

    W'[o, i] = W[o, i] + s W[o, j].

Fires:  groups that nothing pins, made by one linear layer and read by linear layers, with nothing in between but ops
        that treat channels alike; units merge whose constants there (BatchNormalization, PRelu) are equal. A scale
        passes Relu, LeakyRelu, PRelu, Identity, pooling, means, changes of shape; Sigmoid, Tanh, a Clip at 6 stop it.
Error:  zero for copies (and scaled copies, where scales pass); else at most about the share of the readers' weights'
        power, sum |a[j]|^2 |w[j] - s w[i]|^2 / sum |a|^2 |w|^2 with a = what readers read, for slopes of at most 1.
Cost:   parameters and multiply-adds fall with the units on both sides.
Source: Srinivas and Babu 2015, arXiv:1507.06149; Kim et al. 2020, arXiv:2010.13160 (scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import graph, surgery
from ccompile.analysis import cuts, linear
from ccompile.analysis.between import Between, between, units
from ccompile.analysis.channels import Group, Member, channels
from ccompile.analysis.cuts import Reader
from ccompile.core import Array, Choice, Compression, Kind, Site, Skip, View
from ccompile.errors import PassError
from ccompile.moments import Layer
from ccompile.numerics.neurons import MergePlan, merge_columns, merge_plan

COSINE = 0.999  # what merges when neither strength is given


@dataclass(frozen=True, eq=False)
class Merger:
    """All that merging a group needs: rows[n, f] and bias[n] that make its units, the readers, what is between."""

    rows: Array
    bias: Array
    readers: tuple[Reader, ...]
    between: Between


class MergeNeurons(Compression):
    """Options of merge-neurons: at most one of amount and cosine."""

    kind: ClassVar[Kind] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)

    amount: float | None = Field(None, gt=0, lt=1, description="share of the units of every group that are merged away")
    cosine: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"merge units at least this similar, by the cosine of [weights, bias] ({COSINE} without `amount`); "
        "where no scale passes, 2 <a, b> / (|a|^2 + |b|^2)",
    )
    scaled: bool = Field(True, description="merge multiples of each other too, where the activation lets a scale pass")

    @model_validator(mode="after")
    def _one_strength(self) -> MergeNeurons:
        if self.amount is not None and self.cosine is not None:
            raise ValueError("give one of `amount` and `cosine`, not both")
        return self

    def sites(self, view: View) -> list[Site | Skip]:
        """Return the groups whose units may merge, and why others may not."""
        found: list[Site | Skip] = []
        for group in view.ask(channels).groups:
            producers = list(dict.fromkeys(member.node for member in group.by_role("producer")))
            if group.pinned:
                found.append(Skip(group.pinned[0].node, f"group `{group.name}`: {group.pinned[0].reason}"))
                continue
            excluded = [skip for name in producers if (skip := view.excluded(graph.node_named(view.graph, name)))]
            if excluded:
                found.append(excluded[0])
                continue
            merger = _merger(group, view)
            if isinstance(merger, str):
                found.append(Skip(producers[0], merger))
                continue
            unscaled = merger.between.unscaled if self.scaled else ""
            note = f"{group.size} units" + (f"; equal ones only: {unscaled}" if unscaled else "")
            found.append(Site((group.name,), note, output=merger.readers[0].layer.output))
        return found

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return every number of units that may stay; error is the share of the readers' power at stake."""
        group = view.ask(channels).named(site.nodes[0])
        merger = _known(group, view)
        a = _columns(merger, group, view)
        saliency = self._plan(merger, a, group.size).saliency
        power = float(np.square(a).sum(1) @ (np.square(merger.rows).sum(1) + np.square(merger.bias)))
        errors = np.append(0.0, np.cumsum(saliency) / max(power, 1e-300))
        kept = group.size - np.arange(len(errors))
        params, macs = (_costs(view, group, what, kept) for what in ("params", "macs"))
        rows = zip(kept, errors, params, macs, strict=True)
        return [Choice(float(k), float(error), round(p), round(m)) for k, error, p, m in rows]

    def _plan(self, merger: Merger, columns: Array, amount: int) -> MergePlan:
        """Return up to `amount` merges, a prefix of the same sequence whatever the amount."""
        least = (self.cosine or COSINE) if self.amount is None else 0.0
        scaled = self.scaled and not merger.between.unscaled
        return merge_plan(merger.rows, merger.bias, columns, amount, least, scaled, merger.between.kind)

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return the choice that `amount` asks for, or all merges that are similar enough."""
        size = choices[0].strength
        least = 0 if self.amount is None else size - round(size * self.amount)
        chosen = [choice for choice in choices if choice.strength >= least][-1]
        if chosen.strength < size:
            return chosen
        if len(choices) > 1:
            return Skip(site.nodes[0], f"all {size:g} units stay at amount {self.amount:g}")
        return Skip(site.nodes[0], f"no two alike among its {site.note}")

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Let the readers of all groups make up for the units that go, then remove these at once."""
        keeps: dict[Group, Array] = {}
        done = []
        for site, choice in plan:
            group = view.ask(channels).named(site.nodes[0])
            merger = _known(group, view)
            merges = self._plan(merger, view.once(("columns", group.name), _never), group.size - int(choice.strength))
            keeps[group] = np.isin(np.arange(group.size), merges.keep)
            for reader in merger.readers:
                _rewrite(view, reader, merges, group)
            units_of, _, limit = site.note.partition("; ")
            gone = f"{len(merges.order)} of {units_of} merged, relative saliency {choice.error:.3g}"
            done.append(Site(site.nodes, "; ".join([gone, *([limit] if limit else [])]), output=site.output))
        if keeps:
            surgery.remove(view.model, keeps)
            view.changed()
        return done


def _never() -> Array:
    raise AssertionError("choices come before apply_all")


def _known(group: Group, view: View) -> Merger:
    merger = _merger(group, view)
    assert not isinstance(merger, str)
    return merger


def _merger(group: Group, view: View) -> Merger | str:
    """Return what merging a group needs, from the graph as it came in, or why its units cannot be merged."""
    return view.once(("merger", group.name), lambda: _found(group, view))


def _found(group: Group, view: View) -> Merger | str:
    if group.size < 2:
        return "it has one unit only"
    made = _producer(group, view)
    if isinstance(made, str):
        return made
    form, order = made
    node = graph.node_named(view.graph, form.name)
    readers = cuts.readers(view.model, group)
    if isinstance(readers, str):
        return readers
    for name, index in ((form.name, form.weight), *((r.layer.name, r.layer.weight) for r in readers)):
        if reason := _weight_refusal(graph.node_named(view.graph, name).inputs[index], alone=name != form.name):
            return f"of `{name}`, {reason}"
    bias, offset = linear.bias(node, form), _offset(node, group)
    if bias is None:
        return "its bias is not one number per unit"
    way = between(view.model, group, frozenset([offset] if offset else []))
    if isinstance(way, str):
        return way
    if any(units(unit, group.size) is None for reader in readers for unit in reader.unit):
        return "a layer reads some of its units more often than others"
    b = bias.reshape(-1)[order]
    if offset is not None:
        added = graph.constant(graph.node_named(view.graph, offset.node).inputs[offset.input])
        positions = units(offset.unit, group.size)
        assert added is not None
        assert positions is not None
        b = b + added.reshape(-1)[positions[:, 0]]
    return Merger(linear.matrix(node, form)[0][order], b, tuple(readers), way)


def _producer(group: Group, view: View) -> tuple[Layer, Array] | str:
    """Return the one layer that makes a group and its output channel of each unit, or why there is none."""
    members = group.by_role("producer")
    names = list(dict.fromkeys(member.node for member in members))
    if len(names) > 1:
        return f"several layers make it: {', '.join(f'`{name}`' for name in names)}"
    form = linear.layer(graph.node_named(view.graph, names[0]))
    if isinstance(form, str):
        return f"no linear layer makes it: of `{names[0]}`, {form}"
    if form.groups > 1:
        return f"grouped convolution ({form.groups} groups): its filters read different inputs"
    weight = next((member for member in members if member.input == form.weight), None)
    order = None if weight is None or (weight.unit < 0).any() else units(weight.unit, group.size)
    if order is None or order.shape[1] != 1:
        return "its units are not the layer's output channels one by one"
    return form, order[:, 0]


def _weight_refusal(value: ir.Value | None, alone: bool) -> str:
    if alone and (reason := graph.weight_refusal(value)):
        return reason
    array = graph.constant(value)
    return "its weight holds integers" if array is not None and array.dtype.kind in "iub" else ""


def _offset(node: ir.Node, group: Group) -> Member | None:
    """Return the member whose Add right behind the producer gives each unit its bias, as exporters write MatMul."""
    after = graph.only_use(node.outputs[0])
    if after is None or after.op_type != "Add" or after.domain not in ("", "ai.onnx"):
        return None
    found = [member for member in group.by_role("through") if member.node == after.name]
    if len(found) != 1 or len(found[0].unit) != np.prod(graph.static_shape(after.inputs[found[0].input]) or ()):
        return None
    positions = units(found[0].unit, group.size)
    return found[0] if positions is not None and positions.shape[1] == 1 else None


def _columns(merger: Merger, group: Group, view: View) -> Array:
    """Return a[n, c], all that readers read from each unit, once for the graph as it came in."""

    def collect() -> Array:
        parts = []
        for reader in merger.readers:
            W = linear.matrix(graph.node_named(view.graph, reader.layer.name), reader.layer)
            for matrix, unit in zip(W, reader.unit, strict=True):
                found = units(unit, group.size)
                assert found is not None
                parts.append(np.moveaxis(matrix[:, found], 0, 1).reshape(group.size, -1))
        return np.concatenate(parts, axis=1)

    return view.once(("columns", group.name), collect)


def _rewrite(view: View, reader: Reader, merges: MergePlan, group: Group) -> None:
    """Add the columns of the units that go to those of the units that imitate them."""
    node = graph.node_named(view.graph, reader.layer.name)
    W = linear.matrix(node, reader.layer).copy()
    for matrix, unit in zip(W, reader.unit, strict=True):
        found = units(unit, group.size)
        assert found is not None
        matrix[:, found[merges.keep].reshape(-1)] = merge_columns(matrix[:, found.reshape(-1)], merges.M)
    try:
        linear.store(node, reader.layer, W, None)
    except FloatingPointError as error:
        hint = "Give `scaled: false`, or `skip` the layer that makes the units."
        raise PassError(f"merging the units of `{group.name}`: {error}", hint=hint) from error


def _costs(view: View, group: Group, what: str, kept: Array) -> Array:
    """Return the params of the group's constants, or the MACs of its layers, when `kept` units stay."""
    costs = view.costs
    if what == "params":
        by_constant = cuts.weight_costs(view.model, [group], "params")
    elif costs is not None:
        nodes = view.once("nodes", lambda: costs.nodes(view.model))
        by_constant = {(name, 1): float(macs) for name, (macs, _) in nodes.items() if macs}
    else:
        by_constant = {}
    parts = cuts.terms([group], by_constant)
    return cuts.total_cost(parts, 0.0)(kept[:, None])
