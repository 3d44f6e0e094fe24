"""Remove what computes nothing: constants folded, no-ops, repeats and dead nodes gone, equal initializers shared.

A node whose output equals one of its inputs is bypassed; a node that depends on constants only becomes an initializer,
unless that would store more bytes than it frees (a ConstantOfShape, a codebook, a half-precision weight) or undo a
quantisation; initializers with equal bytes become one.

Fires:  Identity, Dropout, Cast, Transpose, Reshape, Flatten, Expand, Slice, Pad, Concat, Sum, Max, Min, Mean, Split
        that change nothing; x * 1, x + 0 and the like; Transposes and Reshapes in a row; a Split joined again; a Pad
        before Conv, AveragePool, MaxPool that can do it; MatMul and Add of matrices (Gemm); nodes that compute what
        another does; Shape of a static shape; all deterministic constant nodes.
Error:  none, but a Gemm's float reordering; constants are computed by the runtime itself.
Cost:   never more nodes, never more stored bytes (but for constants of up to `growth` bytes each).
Source: compiler folklore; semantics by op from the ONNX operator specification.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from typing import ClassVar

import onnx
import onnx_ir as ir
from pydantic import Field

from ccompile import absorbing, folding, graph, noops, older_opsets, opsets, repeats, tidying
from ccompile.analysis.shapes import ValueType, shapes
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, View

_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_FILLED = {"strides": 1, "dilations": 1, "pads": 0}  # what these are on every axis when absent
GROWTH = (4096, 64)  # bytes; the second where the file's size is what counts: about what a node takes there


class TidyGraph(Rewrite):
    """Options of tidy-graph."""

    kind: ClassVar[Kind] = "exact"

    fold_constants: bool = Field(True, description="compute nodes that depend on constants only")
    share_initializers: bool = Field(True, description="store equal initializers once")
    compact: bool = Field(
        False, description="leave out of the file what follows: inner types that inference finds, default attributes"
    )
    short_names: bool = Field(
        False, description="give what is inside the graph the shortest names; nodes go without. As the last step"
    )
    opset: int | None = Field(
        None,
        ge=13,
        le=opsets.NEWEST,
        description="raise the version of the operators to this, for what only newer ones can say, where nothing that "
        "the graph computes changes",
    )
    growth: int | None = Field(
        None,
        ge=0,
        le=1_000_000_000,
        description="a folded constant of up to this many bytes may grow; by default 4096, and 64 with `compact`",
    )

    def run(self, view: View) -> PassResult:
        """Apply all rules until none fires."""
        applied = [Site((name,), "an initializer that nothing reads") for name in graph.unread(view.model)]
        skipped: dict[str, Skip] = {}
        growth = self.growth if self.growth is not None else GROWTH[self.compact]
        while True:
            before = len(applied)
            applied += folding.lifted(view)
            applied += noops.bypassed(view, skipped)
            applied += tidying.joined(view, skipped)
            applied += absorbing.absorbed(view, skipped)
            applied += repeats.merged(view, skipped)
            if self.fold_constants:
                applied += folding.folded(view, growth, skipped)
            if self.share_initializers:
                applied += folding.shared(view, skipped)
            applied += [Site((str(node.name),), "dead") for node in graph.remove_dead(view.graph)]
            view.changed()
            if len(applied) == before:
                if self.opset is not None:
                    applied += _raised(view, self.opset, skipped)
                if self.compact:
                    applied += _compact(view)
                if self.short_names:
                    applied += _shortened(view)
                alive = {str(node.name) for node in view.graph}
                return PassResult(tuple(applied), tuple(skip for skip in skipped.values() if skip.node in alive))


def _raised(view: View, version: int, skipped: dict[str, Skip]) -> list[Site]:
    """Raise the opset, or say why it stays."""
    before, first = graph.opset(view.model), next(iter(view.graph), None)
    if before >= version or first is None:
        return []
    reason = f"target {view.target.name} takes opset {view.target.newest} at most"
    if version <= view.target.newest:
        ranks = {name: len(kind.shape) for name, kind in view.ask(shapes).items() if kind.shape is not None}
        reason = older_opsets.refusal(view.model, ranks)
    if not reason:
        older_opsets.upgrade(view.model)
        reason = opsets.raise_to(view.model, version)
    view.changed()
    if reason:
        skipped[str(first.name)] = Skip(str(first.name), f"opset {graph.opset(view.model)} stays: {reason}")
    now = graph.opset(view.model)
    return [Site((str(first.name),), f"opset {before} raised to {now}")] if now > before else []


def _compact(view: View) -> list[Site]:
    """Take off declared types that inference gives as well, and attributes that say what their absence says."""
    found = []
    for node in view.graph:
        said = []
        for value in node.outputs:
            if not value.is_graph_output() and _is_declared(value, tidying.types_of(view, value)):
                value.shape, value.type = None, None
                said.append("a type that follows")
        for name in [name for name, held in node.attributes.items() if _is_default(node, name, held)]:
            node.attributes.pop(name)
            said.append(f"`{name}` at its default")
        if said:
            found.append(Site((str(node.name),), "left out: " + ", ".join(said)))
    return found


def _shortened(view: View) -> list[Site]:
    """Rename values and constants inside the graph to a, b, ..., and nodes to what they are called without a name."""
    found, kept = [], {*view.graph.inputs, *view.graph.outputs}
    inner = [value for value in view.graph.initializers.values() if not isinstance(value.const_value, ir.LazyTensor)]
    inner += [value for node in view.graph for value in node.outputs if value.name]
    fresh = _short_names(graph.names(view.graph))
    for value in inner:
        old, new = str(value.name), next(fresh)
        if value in kept or len(old) <= len(new):
            continue
        if value.const_value is not None:
            value.const_value = graph.renamed(value.const_value, new)
        value.name = new
        found.append(Site((new,), f"`{old}` until now"))
    for node in view.graph:
        node.name = None
    graph.name_nodes(view.graph)
    view.changed()
    return found


def _short_names(taken: set[str]) -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


def _is_default(node: ir.Node, name: str, held: ir.Attr) -> bool:
    if held.is_ref() or node.domain not in ("", "ai.onnx") or not isinstance(node.graph, ir.Graph):
        return False
    if name in _FILLED and node.op_type in _WINDOWED:
        return all(entry == _FILLED[name] for entry in held.value)
    if name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
        return graph.static_shape(node.inputs[1]) is not None
    schema = onnx.defs.get_schema(node.op_type, graph.opset(node.graph), "")
    known = schema.attributes.get(name)
    if known is None or known.required or not known.default_value.name:
        return False
    default = onnx.helper.get_attribute_value(known.default_value)
    return bool((default.decode() if isinstance(default, bytes) else default) == held.value)


def _is_declared(value: ir.Value, kind: ValueType) -> bool:
    return (
        value.shape is not None
        and kind.shape is not None
        and value.dtype == kind.dtype
        and graph.declared_shape(value) == kind.shape
    )
