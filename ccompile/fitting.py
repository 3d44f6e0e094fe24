"""Refit linear layers, in topological order, to the source's outputs on the inputs that a changed graph really makes.

W', b' = argmin |Y - W X - b|^2 + ridge |W - W0|^2 per layer, X the inputs now, Y the source's outputs; the mean goes
into the bias where the layer has one. Never worse than W0 on the calibration rows.
Source: He et al. 2017, arXiv:1707.06168 (asymmetric least squares); Zhang et al. 2015, arXiv:1505.06798 (sequential).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.core import Array, Chain
from ccompile.moments import Layer, Moments
from ccompile.numerics import least_squares, shrinkage

T = TypeVar("T")

FACTORS = (0.25, 1.0, 4.0, 16.0, 64.0)  # multiples of the ridge that samples ask for, tried on held rows
SIGHTS = 2  # refits towards what the activation shows
WIDEST = 8192  # columns per group: beyond, a layer's Gram matrix is too large to factor


@dataclass(frozen=True)
class Was:
    """A layer as the source has it, and which of its output channels (flat over groups) are left; None means all."""

    layer: Layer
    kept: Array | None = None


@dataclass(frozen=True)
class Refitted:
    """What a refit did to one layer: the lost share of the target's variance before and after, on calibration rows."""

    name: str
    before: float
    after: float


def forms(model: ir.Model) -> dict[str, Was]:
    """Return the layers of a graph by node name, whole."""
    found = ((str(node.name), linear.layer(node)) for node in model.graph)
    return {name: Was(form) for name, form in found if isinstance(form, Layer)}


def refusal(node: ir.Node, form: Layer) -> str:
    """Return why a layer cannot be fitted at all, or nothing."""
    if form.columns > WIDEST:
        return f"it has more than {WIDEST} columns per group"
    weight = graph.constant(node.inputs[form.weight])
    if weight is None or not (weight.dtype.kind == "f" or weight.dtype.name == "bfloat16"):
        return "its weight is not of a float type"
    if form.op != "MatMul" and linear.bias(node, form) is None:
        return "its bias is not one constant per channel"
    return ""


def is_fittable(node: ir.Node, form: Layer) -> bool:
    """Return whether a layer's weight can be replaced by a fitted one: plain, read once, not too wide."""
    return not refusal(node, form) and not graph.weight_refusal(node.inputs[form.weight])


def biases(model: ir.Model, names: Iterable[str], what: str) -> float:
    """Return what the biases may cost in a budget's measure that fits add to these layers."""
    if what not in ("params", "stored_bytes"):
        return 0.0
    known, total = forms(model), 0
    for name in names:
        node, form = graph.node_named(model.graph, name), known[name].layer
        total += bias_added(node, form) * (linear.matrix_dtype(node, form).itemsize if what == "stored_bytes" else 1)
    return float(total)


def bias_added(node: ir.Node, form: Layer) -> int:
    """Return how many parameters a fit may add to a layer: those of a bias that it has not, or shares."""
    if form.op == "MatMul":
        return 0
    count, value = form.groups * form.out, node.inputs[2] if len(node.inputs) > 2 else None
    held = graph.constant(value)
    if value is None or held is None or len(list(value.uses())) > 1:
        return count
    return max(0, count - held.size)


def refit(
    model: ir.Model,
    wanted: Iterable[str],
    was: Mapping[str, Was],
    chain: Chain,
    ridge: float | None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Refitted]:
    """Refit the named layers of `model`, in its order; `was` says what each is in the source. Others are passed by.

    ridge: relative to each column's own H_jj; None shrinks each layer's covariance as its sample size asks (OAS).
    tell: shown how far it is.
    """
    names = set(wanted)
    nodes = [node for node in list(model.graph) if str(node.name) in names and str(node.name) in was]
    found = []
    for index, node in enumerate(nodes):
        tell(f"refit {index + 1}/{len(nodes)} layers")
        found.append(refit_node(node, was[str(node.name)], chain, ridge))
    return [one for one in found if one is not None]


def refit_node(node: ir.Node, was: Was, chain: Chain, ridge: float | None) -> Refitted | None:
    """Refit one layer, as `refit` does; None when it cannot be."""
    form = linear.layer(node)
    if isinstance(form, str) or not is_fittable(node, form):
        return None
    moments = chain.moments(form, was.layer, was.kept)
    W0, b0 = linear.matrix(node, form), linear.bias(node, form)
    assert b0 is not None
    (W, b), ridge = tried_fit(moments, W0, b0, ridge)
    before, after = lost(moments, W0, b0), lost(moments, W, b)
    if after > before:
        return Refitted(form.name, before, before)
    W, b = _seen(moments, (W, b), was, chain, ridge)
    linear.store(node, form, W, None if form.op == "MatMul" else b)
    return Refitted(form.name, before, after)


def tried_fit(moments: Moments, W0: Array, b0: Array, ridge: float | None) -> tuple[tuple[Array, Array], float | None]:
    """Return the fitted W[g, o, d] and b[g, o], and the ridge that was tried for them; see `tried_ridge`."""
    ridge = tried_ridge(moments, ridge, lambda others, tried: solve(others, W0, b0, tried))
    return solve(moments, W0, b0, ridge), ridge


def tried_ridge(
    moments: Moments, ridge: float | None, fit: Callable[[Moments, float], tuple[Array, Array]]
) -> float | None:
    """Return the ridge whose fit loses least on the rows that are held, of multiples of what the samples ask for.

    fit(moments, ridge) -> W[g, o, d], b[g, o]. A given ridge is kept, and None (as samples ask) where no rows are held.
    """
    if ridge is not None or moments.held is None:
        return ridge
    others = moments.others()
    asked = max(_asked(others, group) for group in range(others.layer.groups))
    losses = {factor: lost(moments.held, *fit(others, asked * factor)) for factor in FACTORS}
    best = min(losses, key=lambda factor: losses[factor])
    return asked * best


def _asked(moments: Moments, group: int) -> float:
    """Return the ridge that a group's covariance asks for by its sample size."""
    centred = moments.layer.op != "MatMul"
    H = moments.centred()[0][group] if centred else gram(moments)[group]
    return shrinkage.ridge_of(shrinkage.standardised(H)[0], moments.rows)


def _seen(
    moments: Moments, fit: tuple[Array, Array], was: Was, chain: Chain, ridge: float | None
) -> tuple[Array, Array]:
    """Return the fit towards what the activation behind the layer shows, from the fit to the layer's own output."""
    best, least = fit, np.inf
    for _ in range(SIGHTS):
        again = chain.visible(moments, fit, was.layer, was.kept)
        if again is None or again.left >= least:
            return best
        best, least = fit, again.left
        fit = solve(again, *fit, ridge)
    return fit


def solve(moments: Moments, W0: Array, b0: Array, ridge: float | None) -> tuple[Array, Array]:
    """Return the fitted W[g, o, d] and b[g, o]; a MatMul has no bias: its b is b0."""
    centred = moments.layer.op != "MatMul"
    W = np.stack([_fit(moments, index, W0[index], ridge, centred) for index in range(moments.layer.groups)])
    return W, moments.mean_y - np.einsum("god,gd->go", W, moments.mean_x) if centred else b0


@dataclass(frozen=True, eq=False)
class Metric:
    """What a structure is fitted to, for one group: W[o, d], H[d, d] (None: the identity), the power of the output."""

    W: Array
    H: Array | None
    power: float


@dataclass(frozen=True, eq=False)
class Goal:
    """A layer's least-squares weight and metric, group by group, on the inputs and targets of some moments."""

    moments: Moments
    metrics: tuple[Metric, ...]
    old_bias: Array
    ridge: float | None = None

    def bias(self, What: Array) -> Array:
        """Return the bias [g, o] that goes with a weight [g, o, d]: it keeps the targets' means."""
        if self.moments.layer.op == "MatMul":
            return self.old_bias
        offset: Array = self.moments.mean_y - np.einsum("god,gd->go", What, self.moments.mean_x)
        return offset


def fitted(
    goal: Goal, fit: Callable[[Goal], T], weight: Callable[[T], Array], was: Was, chain: Chain
) -> tuple[T, Goal]:
    """Return fit(goal), or that to what the activation behind the layer shows if better, and the goal that it is for.

    weight: gives the structured weight [g, o, d] of what `fit` returns. The layer is the one asked for last.
    """
    found = best = fit(goal)
    best_goal, least = goal, math.inf
    for _ in range(SIGHTS):
        again = _towards_seen(goal, weight(found), was, chain)
        if again is None or again[1] >= least:
            return best, best_goal
        best, best_goal, (goal, least) = found, goal, again
        found = fit(goal)
    return found, goal


def _towards_seen(goal: Goal, What: Array, was: Was, chain: Chain) -> tuple[Goal, float] | None:
    """Return the goal towards what the activation behind the layer asked for last shows, and what What loses there.

    What[g, o, d]: the structured weight so far. None where the activation, if any, shows all.
    """
    bias = goal.bias(What)
    moments = chain.visible(goal.moments, (What, bias), was.layer, was.kept)
    if moments is None:
        return None
    W = np.stack([metric.W for metric in goal.metrics])
    better, _ = solve(moments, W, goal.bias(W), goal.ridge)
    return Goal(moments, tuple(metrics(moments, better, goal.ridge)), goal.old_bias, goal.ridge), moments.left


def goal(node: ir.Node, was: Was, chain: Chain, ridge: float | None, structured: Callable[[Goal], Array]) -> Goal:
    """Return what a structured weight of the layer is fitted to now; `was` says what the layer is in the source.

    structured: makes the weight [g, o, d] from a goal; the ridge is tried with it where rows are few.
    """
    form = linear.layer(node)
    assert isinstance(form, Layer)
    moments = chain.moments(form, was.layer, was.kept)
    W0, b0 = linear.matrix(node, form), linear.bias(node, form)
    assert b0 is not None

    def fit(others: Moments, tried: float) -> tuple[Array, Array]:
        towards = _goal(others, W0, b0, tried)
        What = structured(towards)
        return What, towards.bias(What)

    return _goal(moments, W0, b0, tried_ridge(moments, ridge, fit))


def _goal(moments: Moments, W0: Array, b0: Array, ridge: float | None) -> Goal:
    W, b = solve(moments, W0, b0, ridge)
    best = W if lost(moments, W, b) <= lost(moments, W0, b0) else W0
    return Goal(moments, tuple(metrics(moments, best, ridge)), b0, ridge)


def metrics(moments: Moments, W: Array, ridge: float | None) -> list[Metric]:
    """Return the metric of each group around W[g, o, d]: the Gram matrix, centred where a bias takes the mean.

    Its diagonal carries the ridge, relative to each column's variance: what a structure moves away from W is paid for
    as the fit that found W was, and `power` is measured likewise, so that what is lost of it is a share.
    """
    centred = moments.layer.op != "MatMul"
    grams = moments.centred()[0] if centred else gram(moments)
    found = []
    for group, H in zip(W, grams, strict=True):
        R, scale = shrinkage.standardised(H)
        chosen = shrinkage.ridge_of(R, moments.rows) if ridge is None else ridge
        H = H + chosen * np.diag(shrinkage.weighted(R, scale))
        found.append(Metric(group, H, float(((group @ H) * group).sum())))
    return found


def gram(moments: Moments) -> Array:
    """Return the sums of x x^T, [g, d, d]."""
    grams = moments.xx if moments.x is None else moments.x.transpose(0, 2, 1) @ moments.x
    assert grams is not None
    return grams


def lost(moments: Moments, W: Array, b: Array) -> float:
    """Return E|Y - W X - b|^2 over the target's variance."""
    power = max(float(moments.power.sum()), 1e-30)
    if moments.x is not None and moments.y is not None:
        predicted = moments.x @ W.transpose(0, 2, 1) + b[:, None]
        return float(np.square(moments.y - predicted).sum()) / power
    assert moments.xx is not None
    assert moments.yx is not None
    n = moments.rows
    quadratic = ((W @ moments.xx - 2 * moments.yx) * W).sum() + moments.yy.sum()
    linear_part = 2 * (b * (np.einsum("god,gd->go", W, moments.sx) - moments.sy)).sum() + n * np.square(b).sum()
    return max(float(quadratic + linear_part), 0.0) / power


def affine(moments: Moments, W: Array, b: Array, shrink: float) -> tuple[Array, Array]:
    """Return g W, g b + t with the per-channel g y + t nearest the target; see least_squares.affine_repair.

    shrink 0 only moves the means. A MatMul has no bias: its slope runs through the origin.
    """
    n, (H, C) = moments.rows, moments.centred()
    mean, target = np.einsum("god,gd->go", W, moments.mean_x) + b, moments.mean_y
    variance, covariance = ((W @ H) * W).sum(-1) / n, (W * C).sum(-1) / n
    variance = np.where(variance > 1e-12 * np.square(mean), variance, 0.0)  # below is what rounding leaves of none
    if moments.layer.op == "MatMul":
        variance, covariance = variance + np.square(mean), covariance + mean * target
        mean = target = np.zeros_like(b)
    g, t = least_squares.affine_repair(mean, variance, covariance, target, shrink)
    return g[:, :, None] * W, g * b + t


def _fit(moments: Moments, index: int, W0: Array, ridge: float | None, centred: bool) -> Array:
    if moments.x is not None and moments.y is not None:
        x, y = moments.x[index], moments.y[index]
        if centred:
            x, y = x - x.mean(0), y - y.mean(0)
        R, scale = shrinkage.standardised(x.T @ x)
        chosen = shrinkage.ridge_of(R, len(x)) if ridge is None else ridge
        return least_squares.refit_wide(x / scale, y, W0 * scale, chosen).W / scale
    assert moments.xx is not None
    assert moments.yx is not None
    H, C = moments.xx[index], moments.yx[index]
    if centred:
        H, C = least_squares.center(H, C, moments.mean_x[index], moments.mean_y[index], moments.rows)
    R, scale = shrinkage.standardised(H)
    chosen = shrinkage.ridge_of(R, moments.rows) if ridge is None else ridge
    return least_squares.refit(R, C / scale, W0 * scale, chosen).W / scale
