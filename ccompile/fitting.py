"""Refit linear layers, in topological order, to the source's outputs on the inputs that a changed graph really makes.

W', b' = argmin |Y - W X - b|^2 + ridge |W - W0|^2 per layer, X the inputs now, Y the source's outputs; the mean goes
into the bias where the layer has one. Never worse than W0 on the calibration rows.
Source: He et al. 2017, arXiv:1707.06168 (asymmetric least squares); Zhang et al. 2015, arXiv:1505.06798 (sequential).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.core import Array, Chain
from ccompile.moments import Layer, Moments
from ccompile.numerics import least_squares

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


def is_fittable(node: ir.Node, form: Layer) -> bool:
    """Return whether a layer's weight can be replaced by a fitted one: plain, read once, not too wide."""
    return form.columns <= WIDEST and not graph.weight_refusal(node.inputs[form.weight])


def refit(model: ir.Model, wanted: Iterable[str], was: Mapping[str, Was], chain: Chain, ridge: float) -> list[Refitted]:
    """Refit the named layers of `model`, in its order; `was` says what each is in the source. Others are passed by."""
    names = set(wanted)
    found = []
    for node in list(model.graph):
        name = str(node.name)
        form = linear.layer(node) if name in names and name in was else ""
        if isinstance(form, Layer) and is_fittable(node, form):
            moments = chain.moments(form, was[name].layer, was[name].kept)
            found.append(_refit_layer(node, form, moments, ridge))
    return found


def _refit_layer(node: ir.Node, form: Layer, moments: Moments, ridge: float) -> Refitted:
    W0 = linear.matrix(node, form)
    bias = linear.bias(node, form) if form.op != "MatMul" else None
    W = np.stack([_fit(moments, index, W0[index], ridge, bias is not None) for index in range(form.groups)])
    if bias is None:
        b0 = b = np.zeros((form.groups, form.out))
    else:
        b0, b = bias, moments.mean_y - np.einsum("god,gd->go", W, moments.mean_x)
    before, after = (_lost(moments, weight, offset) for weight, offset in ((W0, b0), (W, b)))
    if after > before:
        return Refitted(form.name, before, before)
    linear.store(node, form, W, None if bias is None else b)
    return Refitted(form.name, before, after)


def _lost(moments: Moments, W: Array, b: Array) -> float:
    """Return E|Y - W X - b|^2 over the target's variance."""
    power = max(float(moments.power.sum()), 1e-30)
    if moments.x is not None and moments.y is not None:
        predicted = np.einsum("grd,god->gro", moments.x, W) + b[:, None]
        return float(np.square(moments.y - predicted).sum()) / power
    assert moments.xx is not None
    assert moments.yx is not None
    n = moments.rows
    quadratic = np.einsum("god,gde,goe->", W, moments.xx, W) - 2 * (W * moments.yx).sum() + moments.yy.sum()
    linear_part = 2 * (b * (np.einsum("god,gd->go", W, moments.sx) - moments.sy)).sum() + n * np.square(b).sum()
    return max(float(quadratic + linear_part), 0.0) / power


def _fit(moments: Moments, index: int, W0: Array, ridge: float, centred: bool) -> Array:
    if moments.x is not None and moments.y is not None:
        x, y = moments.x[index], moments.y[index]
        if centred:
            x, y = x - x.mean(0), y - y.mean(0)
        return least_squares.refit_wide(x, y, W0, ridge).W
    assert moments.xx is not None
    assert moments.yx is not None
    H, C = moments.xx[index], moments.yx[index]
    if centred:
        H, C = least_squares.center(H, C, moments.mean_x[index], moments.mean_y[index], moments.rows)
    return least_squares.refit(H, C, W0, ridge).W
