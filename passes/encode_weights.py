"""Store weights in the smallest form that gives back every bit.

W  becomes  levels[code], mask and values, or a sparse initializer, whichever takes the fewest bytes: of use where a
weight has zeros or few distinct values, as another tool or an earlier step left it. The runtime decodes the forms once,
when it opens a session; the passes that make weights of few values store them in these forms by themselves.

Fires:  float initializers of at least `least` entries that hold few values or many zeros, whoever reads them.
Error:  none: every bit comes back.
Cost:   fewer stored bytes; multiply-adds as before.
Source: Han et al. 2016, arXiv:1510.00149 (shared values, sparse storage); ONNX operator specification.
"""

from __future__ import annotations

import math
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from ccompile import decoding, graph, opsets, storage
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, View
from ccompile.decoding import Means, Sliced
from ccompile.forms import Plain


class EncodeWeights(Rewrite):
    """Options of encode-weights."""

    kind: ClassVar[Kind] = "exact"

    least: int = Field(64, ge=16, le=1_000_000_000, description="entries of the smallest weight that is looked at")

    def run(self, view: View) -> PassResult:
        """Look at every initializer that nodes of the main graph read."""
        if view.target.holds("uint4") and view.target.newest >= decoding.NATIVE:
            opsets.raise_to(view.model, decoding.NATIVE)
        means = Means(graph.opset(view.graph), view.target.runs, view.target.holds("uint4"))
        applied, skipped = [], []
        for value in list(view.graph.initializers.values()):
            done = self._encode(value, means, view)
            if isinstance(done, Site):
                applied.append(done)
            elif done is not None:
                skipped.append(done)
        view.changed()
        return PassResult(tuple(applied), tuple(skipped))

    def _encode(self, value: ir.Value, means: Means, view: View) -> Site | Skip | None:
        weight, name = graph.constant(value), str(value.name)
        if weight is None or weight.size < self.least or weight.dtype.name not in ("float16", "float32", "float64"):
            return None
        readers = [use.node for use in value.uses()]
        if value.is_graph_output() or value.is_graph_input() or any(node.graph is not view.graph for node in readers):
            return Skip(
                str(readers[0].name) if readers else name, f"`{name}` is of the interface, or a subgraph reads it"
            )
        if blocked := next(filter(None, map(view.excluded, readers)), None):
            return blocked
        form = storage.smallest(weight, means, _parts(weight.shape))
        if isinstance(form, Plain):
            return None
        saved = weight.nbytes - form.nbytes
        storage.replace_value(value, form, means)
        label = f"`{name}`: {form.name}, {saved:,.0f} bytes fewer"
        return Site((str(readers[0].name),), label, output=str(readers[0].outputs[0].name))


def _parts(shape: tuple[int, ...]) -> list[Sliced]:
    """Return the slices whose few values are looked for: along the first axis, and along the last of a matrix."""
    if len(shape) < 2:
        return []
    rows = Sliced(shape[0], math.prod(shape[1:]), 1)
    return [rows, Sliced(1, shape[0], shape[1])] if len(shape) == 2 else [rows]
