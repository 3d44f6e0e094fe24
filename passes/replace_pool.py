"""Replace poolings by cheaper ones and fit the layers around them to calibration data.

strides   MaxPool(act(W x + b)) -> act(W' x + b'), one convolution with the pooling's strides; W' starts as the same
          with an AveragePool, which is exact, and is fitted to what the pooling gave
average   MaxPool -> AveragePool with the same windows
s3        MaxPool(k, stride s) -> AveragePool(s, stride s) of MaxPool(k, stride 1)
detail-preserving
          MaxPool -> the mean of x weighted by alpha + max(x - its window's mean, 0)^lambda, both fitted to the maxima
head      Gemm(Flatten(x)) -> Gemm(GlobalAveragePool(x)); W'[o, c] starts as sum over h, w of W[o, c, h, w], which is
          exact where W is the same at all positions

Then every layer behind the first change is fitted, in topological order, to its output in the graph as it was, on the
inputs that it has now: W, b = argmin E|Y - W x - b|^2 + ridge |W - W0|^2.

Fires:  MaxPool of one output; for `strides` without pads, behind a Conv or its activation that nothing else reads,
        where that takes fewer multiply-adds; for `s3` with a stride; for `detail-preserving` of windows side by side
        that fill the map; a Gemm, MatMul with a constant weight behind a Flatten, Reshape of maps.
Error:  measured: the step needs a tolerance.
Cost:   strides 9 -> 16 / 4 multiply-adds for 3 x 3 and 2 x 2; head o c h w -> o c parameters and multiply-adds.
        `s3` and `detail-preserving` compute more than the maximum: the latter about nine times as many elements.
Source: Springenberg et al. 2015, arXiv:1412.6806 (strides); Zhai et al. 2017, arXiv:1611.05138 (s3); Saeedan et al.
        2018, arXiv:1804.04076 (detail-preserving); Lin et al. 2014, arXiv:1312.4400 (head); He et al. 2017,
        arXiv:1707.06168 (fit).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ccompile import fitting, graph, pooling
from ccompile.analysis import kernels, linear
from ccompile.analysis.shapes import UNKNOWN, ValueType, shapes
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, View
from ccompile.numerics import composition

_ACTIVATIONS = ("Relu", "Clip", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus")  # they never fall
_ELEMENTS = 1 << 16  # that alpha and lambda are fitted to


class ReplacePool(Rewrite):
    """Options of replace-pool."""

    kind: ClassVar[Kind] = "lossy"
    needs_calibration: ClassVar[bool] = True

    max_pool: Literal["strides", "average", "s3", "detail-preserving", "keep"] = Field(
        "strides",
        description="what a MaxPool becomes: strides of the convolution before it, an AveragePool, means of maxima at "
        "all positions, a weighted mean, or itself",
    )
    head: bool = Field(True, description="pool over all positions before a dense layer that reads flattened maps")
    ridge: float | None = Field(
        None, ge=0, le=1, description="ridge of the fits, relative to each column's variance; by default as samples ask"
    )

    def run(self, view: View) -> PassResult:
        """Replace, then fit what lies behind."""
        stats = view.calibration("Give `data.calibration`, or leave the step out.")
        before, was = graph.copy(view.model), fitting.forms(view.model)
        applied: list[Site] = []
        skipped: list[Skip] = []
        for node in list(view.graph):
            found = self._replaced(node, view, before) if node.graph is view.graph else ""
            if isinstance(found, Site):
                applied.append(found)
                graph.remove_dead(view.graph)
                view.changed()
            elif found:
                skipped.append(Skip(str(node.name), found))
        if not applied:
            return PassResult((), tuple(skipped))
        changed = {name for site in applied for name in site.nodes}
        nodes = [str(node.name) for node in view.graph]
        first = min(index for index, name in enumerate(nodes) if name in changed)
        fits = fitting.refit(view.model, nodes[first:], was, stats.chain(view.model, before), self.ridge, view.tell)
        told = {fit.name: f", then {fit.after:.3g} of its output's power is lost" for fit in fits}
        notes = (replace(s, note=s.note + next((told[n] for n in s.nodes if n in told), "")) for s in applied)
        return PassResult(tuple(notes), tuple(skipped))

    def _replaced(self, node: ir.Node, view: View, before: ir.Model) -> Site | str:
        """Replace one pooling or what stands for one; return why not where there is a reason."""
        if node.domain not in ("", "ai.onnx"):
            return ""
        wanted = self.max_pool != "keep" and node.op_type == "MaxPool" and len(node.outputs) == 1
        if not wanted and not (self.head and node.op_type in ("Gemm", "MatMul")):
            return ""
        if excluded := view.excluded(node):
            return excluded.reason
        if not wanted:
            return _pooled_head(node, view)
        if self.max_pool == "strides":
            return _strided(node, view, before)
        known = view.ask(shapes).get(str(node.inputs[0].name), UNKNOWN) if node.inputs[0] is not None else UNKNOWN
        if self.max_pool == "detail-preserving":
            return _detailed(node, known, view, before)
        return pooling.softened(node, known) if self.max_pool == "s3" else pooling.averaged(node)


def _detailed(node: ir.Node, known: ValueType, view: View, before: ir.Model) -> Site | str:
    opset = graph.opset(view.model)
    if reason := pooling.why_no_detail(node, known, opset):
        return reason
    value = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    return pooling.detailed(node, view.calibration().maps(before, [value], _ELEMENTS)[value])


def _strided(node: ir.Node, view: View, before: ir.Model) -> Site | str:
    """Let a convolution take over the windows of the MaxPool behind it, or behind its activation."""
    chain = _conv_before(node)
    if not chain:
        return "no convolution before it that nothing else reads"
    conv = chain[0]
    if excluded := view.excluded(conv):
        return f"`{conv.name}` is {excluded.reason}"
    types = view.ask(shapes)
    known = [types.get(str(v.name), UNKNOWN).shape if v is not None else None for v in (conv.inputs[0], node.inputs[0])]
    form, one = linear.layer(conv), kernels.convolution(conv, known[0])
    if isinstance(form, str) or isinstance(one, str):
        return str(form if isinstance(form, str) else one)
    if not fitting.is_fittable(conv, form):
        return f"`{conv.name}`: {fitting.refusal(conv, form) or graph.weight_refusal(conv.inputs[1])}"
    pool = kernels.pooling(node, one.outs, known[1])
    reason = pool if isinstance(pool, str) else composition.why_not_cascade(one, pool)
    if isinstance(pool, str) or reason:
        return f"it cannot be merged with `{conv.name}`: {reason}"
    macs, now = composition.cascade_macs(one, pool), math.prod(pool.strides) * one.W.size
    if macs >= now:
        return f"merged with `{conv.name}`, it would take {macs} multiply-adds per output position in place of {now}"
    kernels.store(conv, composition.cascade(one, pool), kernels.weight_dtype(conv))
    if len(chain) > 1:
        _pool_sooner(graph.node_named(before.graph, str(node.name)))
    for other in chain:
        other.outputs[0].shape = None
    graph.absorb(node, chain[-1].outputs[0])
    told = f"{macs} multiply-adds per output position in place of {now}"
    return Site((str(conv.name), str(node.name)), f"strides of `{conv.name}`: {told}")


def _pool_sooner(pool: ir.Node) -> None:
    """Let a MaxPool and the activation before it change places, and the pooling give the convolution's value.

    Where the activation never falls that changes nothing, and what the convolution alone shall give, by its name, is
    then in the graph that it is fitted to.
    """
    act = pool.inputs[0].producer() if pool.inputs[0] is not None else None
    first, main = act.inputs[0] if act is not None else None, pool.graph
    assert act is not None
    assert first is not None
    assert isinstance(main, ir.Graph)
    pooled, last = pool.outputs[0], act.outputs[0]
    names = str(first.name), str(pooled.name)
    last.type, last.shape = pooled.type, pooled.shape
    pooled.replace_all_uses_with(last, replace_graph_outputs=True)
    pool.replace_input_with(0, first)
    act.replace_input_with(0, pooled)
    first.name, pooled.name = (graph.fresh_name(main, f"{names[0]}_{what}") for what in ("whole", "pooled"))
    last.name, pooled.name = names[1], names[0]
    first.shape = pooled.shape = None
    main.sort()


def _conv_before(node: ir.Node) -> list[ir.Node]:
    """Return the Conv whose output, or activation, a node alone reads, and the activation; or nothing."""
    found: list[ir.Node] = []
    at = node
    for _ in range(2):
        value = at.inputs[0]
        made = value.producer() if value is not None and graph.only_use(value) is at else None
        if made is None or made.domain not in ("", "ai.onnx"):
            return []
        found.insert(0, made)
        if made.op_type == "Conv":
            return found
        if made.op_type not in _ACTIVATIONS:
            return []
        at = made
    return []


def _pooled_head(node: ir.Node, view: View) -> Site | str:
    """Pool over all positions before a dense layer that reads flattened maps."""
    form = linear.layer(node)
    value = node.inputs[0]
    flat = value.producer() if value is not None and graph.only_use(value) is node else None
    if isinstance(form, str) or form.weight != 1 or flat is None or flat.op_type not in ("Flatten", "Reshape"):
        return ""
    maps = flat.inputs[0]
    known = view.ask(shapes).get(str(maps.name), UNKNOWN).shape if maps is not None else None
    if known is None or len(known) < 3 or not all(isinstance(dim, int) for dim in known[1:]):
        return ""
    sizes = [dim for dim in known[1:] if isinstance(dim, int)]
    if math.prod(sizes) != form.columns or math.prod(sizes[1:]) == 1:
        return ""
    if not fitting.is_fittable(node, form):
        return fitting.refusal(node, form) or graph.weight_refusal(node.inputs[1])
    W = linear.matrix(node, form)[0].reshape(form.out, sizes[0], -1).sum(-1)
    pool = graph.add_node("GlobalAveragePool", [maps], before=node, base=f"{node.name}_pool")
    flatten = graph.add_node("Flatten", pool.outputs, before=node, base=f"{node.name}_flat")
    node.replace_input_with(0, flatten.outputs[0])
    linear.store(node, form, W[None], None)
    return Site((str(node.name), str(pool.name)), f"{form.columns} columns pooled to {sizes[0]}")
