"""Several techniques under one budget: what they cost together.

A cut removes units of a group, which shrinks every layer that makes or reads them; a split gives one layer several
stages. Of a layer whose inputs and outputs keep the shares i and o, the whole costs i o c, and in stages mostly
i c_1 + c_2 + ... + o c_n: the first stage reads what stays, the last makes it. A scheme says so of each stage
(`scales_with`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ccompile.analysis import cuts
from ccompile.analysis.channels import Group
from ccompile.core import Array, Candidate, Choice, Site, View
from ccompile.curves import told
from ccompile.moments import Layer
from ccompile.stages import Sides


@runtime_checkable
class Cutter(Protocol):
    """A pass that removes units of coupled groups."""

    def removal(self, site: Site, view: View) -> tuple[Group, Array]:
        """Return the group of a site and the order in which its units go."""
        ...

    def keeps(self, plan: Sequence[tuple[Site, Choice]], view: View) -> dict[Group, Array]:
        """Return which units of each group stay."""
        ...

    def left(self, site: Site, choice: Choice, view: View) -> Site:
        """Return what is left of a site that will be cut so."""
        ...

    def cut(self, plan: Sequence[tuple[Site, Choice]], view: View) -> tuple[dict[str, Array], set[str]]:
        """Cut all groups at once; return which output channels stay by layer, and the layers that read a cut."""
        ...


@dataclass(frozen=True, eq=False)
class Option:
    """One choice of one technique at a slot.

    stages: what each costs, none where the slot stays whole or is cut; sides: what that goes with.
    """

    technique: str
    site: Site
    choice: Choice
    impact: float
    stages: tuple[float, ...] = ()
    sides: tuple[Sides, ...] = ()


@dataclass(frozen=True, eq=False)
class Slot:
    """What is decided together: a group to cut, or a layer to split. options[0] leaves it as it is."""

    name: str
    options: tuple[Option, ...]
    layer: Layer | None = None
    group: Group | None = None
    order: Array | None = None


def frontier(options: Sequence[Option]) -> tuple[Option, ...]:
    """Return the first option, and those that no cheaper or equal one beats, mildest first; cuts stay as they are."""
    whole, rest = options[0], options[1:]
    if not any(option.stages for option in rest):
        return tuple(options)
    kept: list[Option] = []
    for option in sorted(rest, key=lambda o: (sum(o.stages), o.impact, o.technique)):
        if not kept or option.impact < kept[-1].impact:
            kept.append(option)
    return whole, *kept[::-1]


def candidates(slot: Slot, chosen: Option, budget: str) -> tuple[Candidate, ...]:
    """Return what was weighed at a slot under a budget, as the evidence tells it."""
    unit, costs = _costs(slot, budget)
    found = []
    for index, (option, cost) in enumerate(zip(slot.options, costs, strict=True)):
        name, choice = option.technique if index else "none", option.choice
        found.append(Candidate(name, choice.strength, choice.error, option.impact, cost, option is chosen, unit))
    return told(found)


def _costs(slot: Slot, budget: str) -> tuple[str, list[float]]:
    """Return what the options of a slot cost, and in which measure: multiply-adds where they lack the budget's."""
    if budget == "stored_bytes":
        staged = (sum(option.stages) / option.choice.params for option in slot.options if any(option.stages))
        size = next(staged, 4.0)  # bytes of a parameter
        return budget, [sum(option.stages) or option.choice.params * size for option in slot.options]
    found = [sum(option.stages) or float(getattr(option.choice, budget)) for option in slot.options]
    return (budget, found) if all(found) else ("macs", [float(option.choice.macs) for option in slot.options])


class JointCost:
    """The cost of options[m, slot] in one measure, as `allocation.allocate_interacting` asks for it."""

    def __init__(self, slots: Sequence[Slot], what: str, view: View) -> None:
        assert view.costs is not None
        self.slots = slots
        self.cutting = [index for index, slot in enumerate(slots) if slot.group is not None]
        self.kept = {
            index: np.array([int(option.choice.strength) for option in slots[index].options]) for index in self.cutting
        }
        align = view.target.align if what == "seconds" else None
        self.align: Callable[[int], int] | None = align
        groups = [slot.group for slot in slots if slot.group is not None]
        orders = [slot.order for slot in slots if slot.order is not None]
        whole = self._whole(groups, what, view)
        terms = {term.key: term for term in cuts.terms(groups, whole, orders)}
        self.layers = {
            index: (whole.get((slot.layer.name, slot.layer.weight), 0.0), terms.pop(_key(slot.layer), None))
            for index, slot in enumerate(slots)
            if slot.layer is not None
        }
        self.tables = {index: np.array([_by_sides(option) for option in slots[index].options]) for index in self.layers}
        self.terms = list(terms.values())
        now = float(getattr(view.costs.report(view.model), what))
        self.fixed = now - sum(term.cost for term in self.terms) - sum(cost for cost, _ in self.layers.values())

    def _whole(self, groups: Sequence[Group], what: str, view: View) -> Mapping[tuple[str, int], float]:
        """Return what layers and the constants of groups cost, by (node, input)."""
        assert view.costs is not None
        layers = [slot.layer for slot in self.slots if slot.layer is not None]
        if what in ("params", "stored_bytes"):
            found = cuts.weight_costs(view.model, groups, what)
            return found | cuts.layer_weights(view.model, layers, what)
        index = 0 if what == "macs" else 1
        weights = {layer.name: layer.weight for layer in layers}
        return {(name, weights.get(name, 1)): float(cost[index]) for name, cost in view.costs.nodes(view.model).items()}

    def __call__(self, options: Array) -> Array:
        """Return the cost of each row of options[m, slot]."""
        counts = (
            np.stack([self.kept[index][options[:, index]] for index in self.cutting], axis=1)
            if self.cutting
            else np.zeros((len(options), 0), int)
        )
        total = np.full(len(options), self.fixed)
        for term in self.terms:
            product = np.full(len(options), term.cost)
            for axis in range(len(term.axes)):
                product *= term.share(axis, counts, self.align)
            total += product
        for index, (cost, part) in self.layers.items():
            slot = self.slots[index]
            assert slot.layer is not None
            made, read = _shares(part, slot.layer, counts, self.align)
            apart, with_made, with_read, with_both = self.tables[index][options[:, index]].T
            split = apart + with_made * made + with_read * read + with_both * read * made
            total += np.where(options[:, index] == 0, cost * read * made, split)
        return total


def _key(layer: Layer) -> tuple[str, int]:
    return layer.name, layer.weight


def _by_sides(option: Option) -> Array:
    """Return the cost of the stages that go with neither side, the outputs, the inputs, and both."""
    sums = np.zeros(4)
    for cost, (read, made) in zip(option.stages, option.sides, strict=True):
        sums[2 * read + made] += cost
    return sums


def _shares(
    part: cuts.Term | None, layer: Layer, counts: Array, align: Callable[[int], int] | None
) -> tuple[Array, Array]:
    """Return the shares of a layer's outputs and inputs that stay."""
    made, read = np.ones(len(counts)), np.ones(len(counts))
    if part is None:
        return made, read
    out = 0 if (layer.op == "Conv" or layer.wide) else 1
    for index, number in enumerate(part.numbers):
        share = part.share(index, counts, align)
        if number == out:
            made = made * share
        else:
            read = read * share
    return made, read
