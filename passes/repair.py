"""Bring a graph that earlier steps changed back towards the source's outputs.

In topological order, each layer y = W x + b on the inputs x that the graph makes now, with the source's output Y of
the same name as target; a method is taken where it lowers E|Y - y|^2 on the calibration rows, one after the other:

    bias       b += E[Y - y] per channel
    affine     y -> g y + t per channel, g = 1 + shrink (cov(Y, y) / var(y) - 1), t = E[Y] - g E[y]; folded into W, b
    batchnorm  running mean and variance such that the output has Y's mean and variance: those of the inputs now,
               where the source's were those of its inputs
    refit      W, b = argmin E|Y - W x - b|^2 + ridge |W - W0|^2; behind a residual path, with what that path lost

Fires:  Conv, ConvTranspose, Gemm, MatMul with a constant weight, and BatchNormalization, whose output the source has
        too, in the same shape; a weight that is shared or encoded stays, and only the bias moves.
Error:  never larger on calibration data: per layer by its moments, and as a whole by the outputs, else all is undone.
Cost:   unchanged, but for a bias where there was none.
Source: Nagel et al. 2019, arXiv:1906.04721 (bias); He et al. 2017, arXiv:1707.06168 (refit); Frantar and Alistarh
        2022, arXiv:2208.11580, appendix (batchnorm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile import fitting, graph
from ccompile.analysis import linear
from ccompile.core import Array, Chain, Kind, PassResult, Rewrite, Site, Skip, View
from ccompile.errors import PassError
from ccompile.moments import ChannelMoments, Layer, Moments

Method = Literal["bias", "affine", "batchnorm", "refit"]
SAME = 1e-12  # an impact, or a share of an output's power, that is float rounding


@dataclass(frozen=True)
class _Repair:
    """What was found for one node: what to tell, and how to write it."""

    site: Site
    write: Callable[[ir.Node], None]


class Repair(Rewrite):
    """Options of repair."""

    kind: ClassVar[Kind] = "lossy"
    needs_calibration: ClassVar[bool] = True

    methods: tuple[Method, ...] = Field(
        ("bias", "affine", "batchnorm", "refit"), min_length=1, description="what may be done, always in this order"
    )
    shrink: float = Field(1.0, ge=0, le=1, description="share of the least-squares slope that affine takes")
    ridge: float | None = Field(
        None, ge=0, le=1, description="ridge of refit, relative to each column's variance; by default as samples ask"
    )

    def run(self, view: View) -> PassResult:
        """Repair a copy, and take over what it found if the outputs are no further from the source's than before."""
        stats = view.calibration("Give `data.calibration`, or leave the step out.")
        nodes = [node for node in view.graph if node.op_type in (*graph.LINEAR, "BatchNormalization")]
        before = stats.impact(view.model)
        if before <= SAME and _has_float_output(view.graph):
            reason = "nothing to repair: the outputs are the source's"
            return PassResult((), tuple(Skip(str(node.name), reason) for node in nodes))
        trial = graph.copy(view.model)
        chain = stats.chain(trial)
        found: list[_Repair] = []
        skipped: list[Skip] = []
        for index, original in enumerate(nodes):
            view.tell(f"layer {index + 1}/{len(nodes)}")
            node = graph.node_named(trial.graph, str(original.name))
            outcome = view.excluded(original) or self._repair(node, chain)
            if isinstance(outcome, Skip):
                skipped.append(outcome)
            else:
                outcome.write(node)
                found.append(outcome)
        after = stats.impact(trial) if found else before
        if not after <= before:
            reason = f"undone: all repairs together took the outputs from {before:.3g} to {after:.3g} off the source's"
            return PassResult((), (*skipped, *(Skip(repair.site.nodes[0], reason) for repair in found)))
        for repair in found:
            repair.write(graph.node_named(view.graph, repair.site.nodes[0]))
        view.changed()
        return PassResult(tuple(repair.site for repair in found), tuple(skipped))

    def _repair(self, node: ir.Node, chain: Chain) -> _Repair | Skip:
        name = str(node.name)
        try:
            if node.op_type == "BatchNormalization":
                found = self._normalisation(node, chain)
            else:
                found = self._layer(node, chain)
        except (PassError, FloatingPointError) as error:
            found = error.problems[0].message if isinstance(error, PassError) else str(error)
        return Skip(name, found) if isinstance(found, str) else found

    def _layer(self, node: ir.Node, chain: Chain) -> _Repair | str:
        form = linear.layer(node)
        if isinstance(form, str):
            return form
        if reason := fitting.refusal(node, form):
            return reason
        fixed = graph.weight_refusal(node.inputs[form.weight])
        wanted = self._applicable(form, fixed)
        if not wanted:
            return fixed or f"it has nothing that {', '.join(self.methods)} could change"
        moments = chain.moments(form)
        W0, b0 = linear.matrix(node, form), linear.bias(node, form)
        dtype = linear.matrix_dtype(node, form)
        assert b0 is not None
        W, b, best, used = W0, b0, (start := fitting.lost(moments, W0, b0)), []
        if start * float(moments.power.sum()) <= _rounding(dtype) * float(moments.yy.sum()):
            return "nothing to repair: its output is the source's"
        for method in wanted:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows the type is never better
                tried = [array.astype(dtype).astype(np.float64) for array in self._apply(method, moments, W, b)]
                after = fitting.lost(moments, *tried)
            if after < best:
                (W, b), best = tried, after
                used.append(method)
        if not used:
            return f"{', '.join(wanted)} cannot lower the {start:.3g} of its output's variance that is lost"
        kept = f"; {fixed}" if fixed else ""
        note = f"{', '.join(used)}: {start:.3g} -> {best:.3g} of the output's variance lost{kept}"
        weight = None if fixed else W.astype(dtype)
        write = partial(_write_layer, form=form, W=weight, b=None if form.op == "MatMul" else b)
        return _Repair(Site((form.name,), note, output=form.output), write)

    def _applicable(self, form: Layer, fixed: str) -> list[Method]:
        """Return the methods that can change a layer, in order."""
        possible: dict[Method, bool] = {"bias": form.op != "MatMul", "affine": not fixed, "refit": not fixed}
        return [method for method, can in possible.items() if can and method in self.methods]

    def _apply(self, method: Method, moments: Moments, W: Array, b: Array) -> tuple[Array, Array]:
        if method == "refit":
            return fitting.solve(moments, W, b, self.ridge)
        return fitting.affine(moments, W, b, 0.0 if method == "bias" else self.shrink)

    def _normalisation(self, node: ir.Node, chain: Chain) -> _Repair | str:
        if "batchnorm" not in self.methods:
            return "`methods` has no batchnorm"
        value, output = node.inputs[0], str(node.outputs[0].name)
        parameters = [graph.constant(operand) for operand in node.inputs[1:5]]
        if value is None or any(array is None or array.dtype.kind != "f" for array in parameters):
            return "its parameters are not constants of a float type"
        if graph.attribute(node, "training_mode", 0) or len([o for o in node.outputs if o.name]) > 1:
            return "it is in training mode"
        moments = chain.channels(str(node.name), str(value.name), output)
        old = [np.asarray(array) for array in parameters]
        mean, variance, start, best = _normalise(moments, old, graph.attribute(node, "epsilon", 1e-5))
        power = max(float(moments.spread[1].sum()), 1e-30)
        if start <= _rounding(old[2].dtype) * float(moments.sums[3].sum()) / moments.count:
            return "nothing to repair: its output is the source's"
        if not best < start:
            return f"batchnorm cannot lower the {start / power:.3g} of its output's variance that is lost"
        note = f"batchnorm: {start / power:.3g} -> {best / power:.3g} of the output's variance lost"
        return _Repair(
            Site((str(node.name),), note, output=output), partial(_write_normalisation, mean=mean, variance=variance)
        )


def _normalise(moments: ChannelMoments, old: list[Array], epsilon: float) -> tuple[Array, Array, float, float]:
    """Return the running mean and variance that serve each channel best, and E|Y - y|^2 before and after.

    old: gamma, beta, mean, variance. Tried: as it is; the mean moved; both moved.
    """
    gamma, beta, mean, variance = (array.astype(np.float64) for array in old)
    (x, y), (var_x, var_y, covariance) = moments.means, moments.spread

    def error(m: Array, v: Array) -> Array:
        slope = gamma / np.sqrt(v + epsilon)
        offset = slope * (x - m) + beta - y
        return np.asarray(var_y + np.square(slope) * var_x - 2 * slope * covariance + np.square(offset))

    with np.errstate(all="ignore"):  # channels without a slope or variance give NaN, which is never better
        matched = np.square(gamma) * var_x / var_y - epsilon
        tries = [(x + (beta - y) * np.sqrt(v + epsilon) / gamma, v) for v in (variance, matched)]
        start = best = error(mean, variance)
        for m, v in tries:
            m, v = m.astype(old[2].dtype).astype(np.float64), v.astype(old[3].dtype).astype(np.float64)
            found = error(m, v)
            better = (found < best) & (v >= 0) & np.isfinite(m)
            mean, variance = np.where(better, m, mean), np.where(better, v, variance)
            best = np.where(better, found, best)
    return mean.astype(old[2].dtype), variance.astype(old[3].dtype), float(start.sum()), float(best.sum())


def _write_layer(node: ir.Node, form: Layer, W: Array | None, b: Array | None) -> None:
    linear.store(node, form, W, b)


def _write_normalisation(node: ir.Node, mean: Array, variance: Array) -> None:
    graph.replace_constant(node, 3, mean)
    graph.replace_constant(node, 4, variance)


def _rounding(dtype: np.dtype[Any]) -> float:
    """Return the share of an output's power that rounding in that type may make up."""
    eps = 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)
    return max(float(np.square(8 * eps)), 1e-14)


def _has_float_output(main: ir.Graph) -> bool:
    """Return whether impact sees anything."""
    return any(value.dtype is not None and value.dtype.is_floating_point() for value in main.outputs)
