"""Cut the units of coupled groups: what they cost, and what the layers that read them make up for, in closed form.

A reader y = W x + b that loses columns is repaired in the metric H of its inputs, with the ridge that samples ask for;
the mean goes into the bias. See numerics/obs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ccompile import fitting, graph, surgery
from ccompile.analysis import cuts, linear
from ccompile.analysis.channels import Group
from ccompile.analysis.cuts import Reader
from ccompile.core import Array, Choice, View
from ccompile.fitting import Was
from ccompile.moments import Layer, Moments
from ccompile.numerics import obs, shrinkage
from ccompile.numerics.obs import Consumer

# Of a reader, given which columns [g, d] it loses: see `repaired`.
Repair = Callable[[ir.Node, Layer, Array], Array | None]


def readers(model: ir.Model, group: Group) -> list[Reader]:
    """Return the layers that read a group that may be cut."""
    found = cuts.readers(model, group)
    assert not isinstance(found, str)
    return found


def consumers(node: ir.Node, reader: Reader, moments: Moments | None, ridge: float | None) -> list[Consumer]:
    """Return each group of a reader with its metric, relative to its output's power; centred where it has a bias.

    Without moments the metric is that of the weights alone.
    """
    form, W = reader.layer, linear.matrix(node, reader.layer)
    if moments is None:
        power, H = sum(float(np.square(group).sum()) for group in W), np.eye(form.columns)
        weight = 1.0 / power if power > 0 else 0.0
        return [Consumer(group, H, unit, weight, None, 0) for group, unit in zip(W, reader.unit, strict=True)]
    power = float(moments.power.sum())
    weight = 1.0 / power if power > 0 else 0.0
    has_bias = form.op != "MatMul" and linear.bias(node, form) is not None
    found = []
    for g, gram in enumerate(fitting.gram(moments)):
        mean = moments.mean_x[g] if has_bias else None
        spread = gram if mean is None else gram - moments.rows * np.outer(mean, mean)
        R, scale = shrinkage.standardised(spread)
        chosen = shrinkage.ridge_of(R, moments.rows) if ridge is None else ridge
        H = gram + chosen * np.diag(shrinkage.weighted(R, scale))
        found.append(Consumer(W[g], H, reader.unit[g], weight, mean, moments.rows if has_bias else 0))
    return found


def repaired(node: ir.Node, form: Layer, lost: Array, moments: Moments, ridge: float | None) -> Array | None:
    """Make up for columns lost[g, d] in the others and the bias; return the bias if the node has no input for one."""
    reader = Reader(form, np.where(lost, 0, -1))
    fits = [obs.repair(group, np.zeros(0, np.int64), 0.0) for group in consumers(node, reader, moments, ridge)]
    W, shift = (np.stack(parts) for parts in zip(*fits, strict=True))
    old = linear.bias(node, form) if form.op != "MatMul" else None
    bias = None if old is None else old + shift
    if len(node.inputs) > 2:
        linear.store(node, form, W, bias)
        return None
    linear.store(node, form, W, None)
    return None if bias is None else bias.reshape(-1).astype(linear.matrix_dtype(node, form))


def cut(model: ir.Model, keeps: Mapping[Group, Array], repair: Repair) -> set[str]:
    """Repair what reads the units that go, then remove them; return the readers' names."""
    gone: dict[str, tuple[Layer, Array]] = {}
    for group, keep in keeps.items():
        for reader in readers(model, group):
            lost = (reader.unit >= 0) & ~keep[reader.unit]
            form, before = gone.get(reader.layer.name, (reader.layer, np.zeros_like(lost)))
            gone[reader.layer.name] = form, before | lost
    rows = kept_rows(keeps, fitting.forms(model))
    nodes = {name: graph.node_named(model.graph, name) for name in gone}
    new = {name: repair(nodes[name], form, lost) for name, (form, lost) in gone.items()}
    surgery.remove(model, dict(keeps))
    for name, bias in new.items():
        if bias is not None and bias.any():  # no group knows of it: it is cut here
            graph.replace_constant(nodes[name], 2, bias[rows[name]] if name in rows else bias)
    return set(gone)


def kept_rows(keeps: Mapping[Group, Array], was: Mapping[str, Was]) -> dict[str, Array]:
    """Return, by layer, which of its output channels stay."""
    found: dict[str, Array] = {}
    for group, keep in keeps.items():
        for member in (*group.by_role("producer"), *group.by_role("through")):
            form = was[member.node].layer if member.node in was else None
            if form is None or form.weight != member.input:
                continue
            positions = surgery.kept(member.unit, keep)
            if member.role == "through":  # depthwise: each channel has outputs of its own
                rows = np.repeat(positions, form.groups * form.out // len(positions))
            else:
                rows = cuts.rows_of(form, positions)
            found[member.node] = found.get(member.node, np.True_) & rows
    return found


def sparing(group: Group, order: Array, loss: Array) -> tuple[Array, Array]:
    """Return the removal order and its losses without what would leave a value no channel: the last of each part."""
    place = np.full(group.size, len(order))
    place[order] = np.arange(len(order))
    spared = np.isin(np.arange(len(order)), [place[part].max() for part in group.parts()])
    saved = np.cumsum(np.where(spared, np.diff(loss, prepend=0.0), 0.0))
    return order[~spared], (loss - saved)[~spared]


def curve(model: ir.Model, group: Group, order: Array, loss: Array) -> list[Choice]:
    """Return the group's curve, all units first; params of its own constants, macs left to the driver's costs."""
    parts = cuts.terms([group], cuts.weight_costs(model, [group], "params"), [order])
    kept = np.arange(group.size, 0, -1)
    params = cuts.total_cost(parts, 0.0)(kept[:, None])
    errors = np.concatenate([[0.0], loss])
    return [
        Choice(float(count), float(error), round(cost), round(cost))
        for count, error, cost in zip(kept[: len(errors)], errors, params, strict=False)
    ]


def price(groups: Sequence[Group], orders: Sequence[Array], what: str, reserve: float, view: View) -> cuts.Price:
    """Return the cost of the graph with kept[m, site] units in a budget's measure, and what is reserved of it."""
    assert view.costs is not None
    if what in ("params", "stored_bytes"):
        by_constant = cuts.weight_costs(view.model, groups, what)
    else:
        index = 0 if what == "macs" else 1
        by_constant = {(name, 1): float(c[index]) for name, c in view.costs.nodes(view.model).items() if c[index]}
    parts = cuts.terms(groups, by_constant, orders)
    fixed = float(getattr(view.costs.report(view.model), what)) - sum(part.cost for part in parts) + reserve
    return cuts.total_cost(parts, fixed, view.target.align if what == "seconds" else None)
