"""Split a dense layer into two thinner ones.

y = W x + b  becomes  y = U (V x) + b,  W[o, i] ~= U[o, r] V[r, i], the best approximation of rank r.
A 1x1 convolution keeps its stride, pads and dilation in the first factor and its bias in the second.

Fires:  Gemm, MatMul with one constant matrix, Conv 1x1 with one group; weight plain and read once; r (o + i) < o i.
Error:  |dy|_2 <= (s[r] + 8 eps |s|_2) |x|_2 at that layer, s the singular values from s[0] on, s[r] = 0 at full rank,
        eps the rounding of the weight's type.
Cost:   o i -> r (o + i) multiply-adds per row, and parameters.
Source: Denton et al. 2014, arXiv:1404.0736; Xue et al. 2013 (Interspeech).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import graph
from ccompile.core import Array, Choice, Compression, Kind, Site, Skip, View
from ccompile.numerics import svd

if TYPE_CHECKING:
    from collections.abc import Sequence


class SplitSvd(Compression):
    """Options of split-svd: exactly one of rank, energy and error."""

    kind: ClassVar[Kind] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm",)

    rank: int | None = Field(None, ge=1, le=1_000_000, description="rank kept at every site")
    energy: float | None = Field(None, gt=0, le=1, description="share of the squared spectrum kept at every site")
    error: float | None = Field(None, ge=0, lt=1, description="relative error |W - U V| / |W| allowed at every site")

    @model_validator(mode="after")
    def _one_strength(self) -> SplitSvd:
        if sum(value is not None for value in (self.rank, self.energy, self.error)) != 1:
            raise ValueError("give exactly one of `rank`, `energy` and `error`")
        return self

    def sites(self, view: View) -> list[Site | Skip]:
        """Return dense layers, and why others are left alone."""
        found: list[Site | Skip] = []
        for node in view.graph:
            if node.op_type not in ("Gemm", "MatMul", "Conv") or node.domain not in ("", "ai.onnx"):
                continue
            name = str(node.name)
            if excluded := view.excluded(node):
                found.append(excluded)
            elif reason := _refusal(node):
                found.append(Skip(name, reason))
            else:
                data = node.inputs[1 - _weight_index(node)]
                assert data is not None
                found.append(Site((name,), input=str(data.name), output=str(node.outputs[0].name)))
        return found

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Decompose the weights of all sites."""
        matrices = (_matrix(graph.node_named(view.graph, site.nodes[0])) for site in sites)
        for site, factors in zip(sites, view.map(svd.decompose, matrices), strict=True):
            view.remember(site.nodes, factors)

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return every rank, full rank first; params without bias, macs per row."""
        U, s, V = _factors(site, view)
        errors, width = svd.tail_errors(s), len(U) + V.shape[1]
        return [Choice(r, float(errors[r]), r * width, r * width) for r in range(len(s), 0, -1)]

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return the least rank that keeps what the options ask for, if it saves anything."""
        limit = self.error if self.energy is None else math.sqrt(1 - self.energy)
        if limit is None:
            fitting = [c for c in choices if c.strength <= (self.rank or 0)][:1]
        else:
            fitting = [c for c in choices if c.error <= limit * (1 + 1e-12)][-1:]
        chosen = fitting[0] if fitting else choices[0]
        full = choices[0]
        dense = _dense_size(choices)
        if chosen.params >= dense:
            least = (dense - 1) // (full.params // int(full.strength))
            return Skip(
                site.nodes[0],
                f"rank {chosen.strength:g} would cost {chosen.params} for {dense}; it pays up to rank {least}",
            )
        return chosen

    def apply(self, site: Site, choice: Choice, view: View) -> Site:
        """Put two thin layers in the place of one."""
        node = graph.node_named(view.graph, site.nodes[0])
        W = _matrix(node)
        U, s, V = _factors(site, view)
        rank = int(choice.strength)
        A, B = svd.truncate(U, s, V, rank)
        first, second = _rebuild(node, A.astype(W.dtype), B.astype(W.dtype), view.graph)
        graph.replace_node(node, second)
        view.changed()
        eps = float(ml_dtypes.finfo(W.dtype).eps)  # type: ignore[no-untyped-call]
        rounding = 8 * eps * float(np.linalg.norm(s))
        bound = (float(s[rank]) if rank < len(s) else 0.0) + rounding
        note = f"rank {rank} of {len(s)}, weight error {choice.error:.4g}"
        return Site((str(first.name), str(second.name)), note, site.input, site.output, bound)


def _factors(site: Site, view: View) -> tuple[Array, Array, Array]:
    """Return the decomposition of a site's weight as it came in."""
    node = graph.node_named(view.graph, site.nodes[0])
    return view.once(site.nodes, lambda: view.map(svd.decompose, [_matrix(node)])[0])


def _dense_size(choices: Sequence[Choice]) -> int:
    """Return o i, from the cost k (o + i) at full rank k = min(o, i)."""
    k = int(choices[0].strength)
    return k * (choices[0].params // k - k)


def _weight_index(node: ir.Node) -> int:
    left = node.op_type == "MatMul" and not graph.is_constant(node.inputs[1])
    return 0 if left else 1


def _refusal(node: ir.Node) -> str:
    weight = node.inputs[_weight_index(node)]
    if reason := graph.weight_refusal(weight):
        return reason
    if graph.is_constant(node.inputs[1 - _weight_index(node)]):
        return "both operands are constant"
    shape = graph.static_shape(weight)
    assert shape is not None
    if node.op_type == "Conv":
        if graph.attribute(node, "group", 1) != 1:
            return f"grouped convolution ({graph.attribute(node, 'group', 1)} groups)"
        if math.prod(shape[2:]) != 1:
            return f"kernel {'x'.join(map(str, shape[2:]))}, not 1x1"
    elif len(shape) != 2:
        return f"its weight has rank {len(shape)}, not 2"
    elif node.op_type == "Gemm" and graph.attribute(node, "transA", 0):
        return "its input is transposed"
    o, i = shape[0], shape[1]
    if o * i <= o + i:
        return f"{o} x {i} is too small: already rank 1 costs as much"
    array = graph.constant(weight)
    if array is not None and array.dtype.kind in "iub":
        return "its weight holds integers"
    if array is None or not graph.is_finite(array):
        return "its weight is not finite"
    return ""


def _matrix(node: ir.Node) -> Array:
    """Return W[o, i] with y = W x, in the weight's own type; Gemm's alpha is folded in."""
    index = _weight_index(node)
    W = graph.constant(node.inputs[index])
    assert W is not None
    if node.op_type == "Conv":
        return W.reshape(W.shape[:2])
    if node.op_type == "Gemm":
        alpha: float = graph.attribute(node, "alpha", 1.0)
        scaled: Array = (W if graph.attribute(node, "transB", 0) else W.T) * np.asarray(alpha, W.dtype)
        return scaled
    return W if index == 0 else W.T


def _rebuild(node: ir.Node, A: Array, B: Array, main: ir.Graph) -> tuple[ir.Node, ir.Node]:
    index = _weight_index(node)
    x, name, stem = node.inputs[1 - index], str(node.name), str(node.inputs[index].name)  # type: ignore[union-attr]

    def constant(suffix: str, array: Array) -> ir.Value:
        return graph.add_constant(main, f"{stem}_{suffix}", array)

    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "Conv":
        ones = (1,) * (len(graph.static_shape(node.inputs[1]) or ()) - 2)
        kept = {k: a.value for k, a in node.attributes.items() if k in ("strides", "pads", "dilations", "auto_pad")}
        shape = {"kernel_shape": list(ones)} if ones else {}
        V = constant("V", B.reshape(B.shape + ones))
        first = graph.add_node("Conv", [x, V], kept | shape, before=node, base=f"{name}/V")
        inputs = [first.outputs[0], constant("U", A.reshape(A.shape + ones)), *([bias] if bias else [])]
        return first, graph.add_node("Conv", inputs, shape, before=node, base=f"{name}/U")
    if node.op_type == "Gemm":
        first = graph.add_node("Gemm", [x, constant("V", B)], {"transB": 1}, before=node, base=f"{name}/V")
        inputs = [first.outputs[0], constant("U", A), *([bias] if bias else [])]
        attributes: dict[str, graph.Attribute] = {"transB": 1}
        if bias is not None:
            attributes["beta"] = float(graph.attribute(node, "beta", 1.0))
        return first, graph.add_node("Gemm", inputs, attributes, before=node, base=f"{name}/U")
    if index == 0:
        first = graph.add_node("MatMul", [constant("V", B), x], before=node, base=f"{name}/V")
        return first, graph.add_node("MatMul", [constant("U", A), first.outputs[0]], before=node, base=f"{name}/U")
    first = graph.add_node("MatMul", [x, constant("V", B.T)], before=node, base=f"{name}/V")
    return first, graph.add_node("MatMul", [first.outputs[0], constant("U", A.T)], before=node, base=f"{name}/U")
