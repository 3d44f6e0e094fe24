"""What cutting channels touches: the layers that read a group, and how cost falls with the channels that stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.analysis.channels import Group, Member
from ccompile.core import Array
from ccompile.moments import Layer


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that contracts a group's channels: unit[groups, columns] is each column's unit, -1 for others."""

    layer: Layer
    unit: Array


def readers(model: ir.Model, group: Group) -> list[Reader] | str:
    """Return the layers that read a group's channels, in topological order, or why one of them cannot be fitted."""
    nodes = {str(node.name): node for node in model.graph}
    found = []
    for member in group.by_role("consumer"):
        form = linear.layer(nodes[member.node])
        if isinstance(form, str) or form.weight != member.input:
            reason = form if isinstance(form, str) else "it is read as data"
            return f"`{member.node}` reads its channels, and {reason}"
        found.append(Reader(form, columns_of(form, member)))
    order = {name: index for index, name in enumerate(nodes)}
    return sorted(found, key=lambda reader: order[reader.layer.name])


def columns_of(form: Layer, member: Member) -> Array:
    """Return the unit of each column [groups, columns] from that of each position along the weight's channel axis."""
    if form.op == "ConvTranspose":
        return np.repeat(member.unit.reshape(form.groups, form.channels), form.taps, axis=1)
    per_group = np.repeat(member.unit, form.taps)
    return np.broadcast_to(per_group, (form.groups, form.columns))


def rows_of(form: Layer, kept: Array) -> Array:
    """Return which output channels stay, flat over groups, from which positions stay along the weight's output axis."""
    return np.tile(kept, form.groups) if form.op == "ConvTranspose" else kept


@dataclass(frozen=True, eq=False)
class Term:
    """A part of the cost that is a product over axes: `cost` at full size; axes[(free, {site: left}, total)].

    left[k]: how many positions along the axis stay when k units of the site do. It is that of the constant which is
    input `key`[1] of the node `key`[0], `numbers` are its axes.
    """

    cost: float
    axes: tuple[tuple[int, Mapping[int, Array], int], ...]
    key: tuple[str, int] = ("", 0)
    numbers: tuple[int, ...] = ()

    def share(self, axis: int, counts: Array, align: Callable[[int], int] | None = None) -> Array:
        """Return the share of the axes[axis] that stays for counts[m, site] units."""
        free, sites, size = self.axes[axis]
        left = np.full(len(counts), float(free))
        for site, table in sites.items():
            left += table[counts[:, site]]
        return _stairs(left, size, align)


def terms(
    groups: Sequence[Group], cost: Mapping[tuple[str, int], float], orders: Sequence[Array] | None = None
) -> list[Term]:
    """Return the cost terms of the constants that groups share; `cost` by (node, input) that reads the constant.

    orders: the order in which each group's units go. Without it every unit is taken to have the same number of
    positions along an axis, which is wrong where a Split hands parts of a group to different layers.
    """
    axes: dict[tuple[str, int], dict[int, tuple[int, dict[int, Array]]]] = defaultdict(dict)
    for site, group in enumerate(groups):
        for member in group.members:
            key = (member.node, member.input)
            if key not in cost:
                continue
            total, left = axes[key].setdefault(member.axis, (len(member.unit), {}))
            left[site] = _positions_left(member.unit, group.size, None if orders is None else orders[site])
            axes[key][member.axis] = (total, left)
    return [
        Term(
            cost[key],
            tuple((total - round(sum(map(np.max, left.values()))), left, total) for total, left in known.values()),
            key,
            tuple(known),
        )
        for key, known in axes.items()
    ]


def _positions_left(unit: Array, size: int, order: Array | None) -> Array:
    """Return how many positions stay when k = 0 .. size units do."""
    known = unit[unit >= 0]
    if order is None:
        return np.arange(size + 1) * (len(known) / size)
    times = np.bincount(known, minlength=size)
    sequence = np.concatenate([order, np.setdiff1d(np.arange(size), order)])
    left: Array = np.concatenate([[0], np.cumsum(times[sequence[::-1]])]).astype(np.float64)
    return left


Price = Callable[[Array], Array]


def total_cost(parts: Sequence[Term], fixed: float, align: Callable[[int], int] | None = None) -> Price:
    """Return the cost of keeping kept[m, site] units: fixed + sum of the terms; `align` rounds channels up."""

    def cost(kept: Array) -> Array:
        counts = np.rint(kept).astype(int)
        total = np.full(len(kept), fixed)
        for part in parts:
            product: Array | float = part.cost
            for free, sites, size in part.axes:
                left: Array | float = float(free)
                for site, table in sites.items():
                    left = left + table[counts[:, site]]
                product = product * _stairs(np.asarray(left), size, align)
            total += product
        return total

    return cost


def _stairs(left: Array, size: int, align: Callable[[int], int] | None) -> Array:
    if align is None or size == 1:
        return left / size
    table = np.array([align(count) for count in range(size + 1)], np.float64) / align(size)
    stairs: Array = table[np.rint(left).astype(int)]
    return stairs


def weight_costs(model: ir.Model, groups: Sequence[Group], what: str) -> dict[tuple[str, int], float]:
    """Return elements or bytes of each constant that carries channels, by one (node, input) that reads it."""
    nodes = {str(node.name): node for node in model.graph}
    found: dict[tuple[str, int], float] = {}
    seen: set[str] = set()
    for member in (member for group in groups for member in group.members):
        key = (member.node, member.input)
        if key in found or (member.value in seen and key not in found):
            continue
        seen.add(member.value)
        value = nodes[member.node].inputs[member.input]
        array = graph.constant(value)
        if array is not None and array.ndim:
            found[key] = float(array.size if what == "params" else array.nbytes)
    return found


def layer_weights(model: ir.Model, layers: Sequence[Layer], what: str) -> dict[tuple[str, int], float]:
    """Return elements or bytes of the weights of layers, by (node, input)."""
    found: dict[tuple[str, int], float] = {}
    for layer in layers:
        array = graph.constant(graph.node_named(model.graph, layer.name).inputs[layer.weight])
        if array is not None:
            found[layer.name, layer.weight] = float(array.size if what == "params" else array.nbytes)
    return found
