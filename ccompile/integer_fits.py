"""Refit a plan's layers, in order, to the float graph's outputs on the codes that they will really read.

For each layer W*, b* = argmin |Y - W X - b|^2 + ridge |W - W0|^2, X its inputs once all before it computes on integers,
Y its outputs in float; W* goes on its grid, and the bias keeps the mean of Y. What the grids of activations clip and
round away is so made up for where it can be, instead of adding up.

Source: He et al. 2017, arXiv:1707.06168 (asymmetric least squares); Nagel et al. 2019, arXiv:1906.04721 (bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ccompile import fitting, quantising
from ccompile.analysis import linear
from ccompile.analysis.integers import Unit
from ccompile.analysis.shapes import Shapes
from ccompile.core import Statistics
from ccompile.moments import Layer
from ccompile.qdq import Plan
from ccompile.quantising import Recipe


def refitted(
    stats: Statistics,
    model: ir.Model,
    plan: Plan,
    types: Shapes,
    units: Sequence[Unit],
    recipe: Recipe,
    tell: Callable[[str], None],
) -> Plan:
    """Return a plan for a float graph with its chosen layers' weights refitted, on calibration batches not held out.

    Layers that cannot be fitted (a weight that others read too, say) keep the plan's weights.
    """
    layers = {unit.name: unit for unit in units if unit.kind == "layer" and unit.name in plan.chosen}
    was = fitting.forms(model)
    held = [node for node in model.graph if str(node.name) in layers]
    free = {str(node.name) for node in held if fitting.is_fittable(node, was[str(node.name)].layer)}
    if not free:
        return plan
    floats = {name: known for name, known in plan.weights.items() if name not in free}
    trial = quantising.written(model, replace(plan, weights=floats), types)  # codes between layers of float weights
    chain, weights = stats.chain(trial, model, spare=True), dict(plan.weights)
    nodes = [node for node in trial.graph if str(node.name) in free]
    for index, node in enumerate(nodes):
        tell(f"refit {index + 1}/{len(nodes)} layers on codes")
        form, unit = linear.layer(node), layers[str(node.name)]
        assert isinstance(form, Layer)
        source = was[form.name].layer
        moments = chain.moments(replace(form, output=source.output), source)  # a graph output's name is the decoder's
        W0, b0 = linear.matrix(node, form), linear.bias(node, form)
        assert b0 is not None
        (W, b), _ = fitting.tried_fit(moments, W0, b0, None)
        if fitting.lost(moments, W, b) > fitting.lost(moments, W0, b0):
            W, b = W0, b0
        step = plan.grids[str(unit.inputs[0].name)].scale
        rounded_in = None if recipe.rounding == "nearest" else moments
        known = quantising.coded(source, W, b, step, rounded_in, recipe)
        if form.op != "MatMul":
            known = replace(known, bias=moments.mean_y - np.einsum("god,gd->go", known.values, moments.mean_x))
        weights[unit.name] = known
        linear.store(node, form, known.values, None if form.op == "MatMul" else known.bias)
    return replace(plan, weights=weights)
