"""What passes may ask about cost in a compile: core.Costs, by the target's estimate, and by runs on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from ccompile import cost, graph, runtime, timing
from ccompile.analysis.shapes import UNKNOWN, Shapes, ValueType, infer
from ccompile.core import CostReport
from ccompile.cost import ModelCost
from ccompile.runtime import Feeds, Settings
from ccompile.target import Target


@dataclass
class Prices:
    """core.Costs. types_of: the types of a graph's values for one sample, which `feeds` are; threads: of timed runs."""

    origin: CostReport
    target: Target
    types_of: Callable[[ir.Model], Mapping[str, ValueType]]
    feeds: Feeds
    threads: int
    timer: timing.Timer = timing.interleaved
    _known: dict[str, ValueType] = field(default_factory=dict)

    @property
    def source(self) -> CostReport:
        """Return the source model's cost."""
        return self.origin

    def report(self, model: ir.Model) -> CostReport:
        """Return a graph's cost."""
        return self._price(model).report

    def nodes(self, model: ir.Model) -> Mapping[str, tuple[int, float]]:
        """Return (MACs, estimated seconds) of each top-level node, by name."""
        return {node.name: (node.macs, node.seconds) for node in self._price(model).nodes}

    def _price(self, model: ir.Model) -> ModelCost:
        return cost.price(model, self.types_of(model), self.target)

    def coding(self, model: ir.Model, values: Iterable[str]) -> Mapping[str, float]:
        """Return the estimated seconds of turning each value into codes of a byte, or back, in nodes of their own.

        Images also change their layout, twice: integer convolutions have channels last, float ones have them in blocks,
        and the rest first.
        """
        types, target = self.types_of(model), self.target
        shapes = {name: types[name].static or () for name in values}
        rate, overhead = target.rate("elementwise", "float32"), target.node_overhead_us * 1e-6
        found = {}
        for name, shape in shapes.items():
            size, nodes = math.prod(shape), 3 if len(shape) > 3 else 1
            found[name] = nodes * (max(size / rate, target.seconds_to_move(5 * size)) + overhead)
        return found

    # -------------------------------------------------------------------------------- excerpts

    def excerpt(self, model: ir.Model, nodes: Sequence[str]) -> ir.Model:
        """Return some nodes as a model of their own that computes on one sample; constants are shared."""
        part = cut_out(model, nodes)
        names = [str(value.name) for value in (*part.graph.inputs, *part.graph.outputs)]
        if any(name not in self._known for name in names):
            self._known |= self.types_of(model)  # names keep their meaning: rewrites make fresh ones
        for value in part.graph.inputs:
            known = self._known.get(str(value.name), UNKNOWN)
            if known.dtype is not None:
                value.type = ir.TensorType(known.dtype)
            if known.shape is not None:
                value.shape = ir.Shape(known.shape)
        return part

    def weigh(self, part: ir.Model) -> Mapping[str, float]:
        """Return the estimated seconds of each node of an excerpt, by name; infinite where a shape is not known."""
        types: Shapes = {
            name: found if found.static is not None else self._known.get(name, found)
            for name, found in infer(part, {}).items()
        }
        rows = cost.price(part, types, self.target, self.origin.stored_bytes).nodes
        return {row.name: math.inf if row.note == cost.SHAPE_UNKNOWN else row.seconds for row in rows}

    def timed(self, model: ir.Model, parts: Sequence[ir.Model]) -> Sequence[float]:
        """Return the seconds that each excerpt of `model`, rewritten or not, takes on this machine, run in turns."""
        names = {str(value.name) for part in parts for value in part.graph.inputs}
        feeds = {name: value for name, value in self.feeds.items() if name in names}
        if missing := sorted(names - feeds.keys()):
            feeds |= runtime.Session(model, Settings(self.threads), missing).run(self.feeds, missing)
        return timing.race(parts, feeds, self.threads, self.timer)


def cut_out(model: ir.Model, nodes: Sequence[str]) -> ir.Model:
    """Return the named top-level nodes, and those that make their constants, as a model that shares the tensors.

    Its inputs are the other values they read; its outputs what nodes outside, or nothing, read, and graph outputs.
    """
    wanted = set(nodes)
    main = [node for node in model.graph if str(node.name) in wanted]
    constant = {node for own in main for value in own.inputs for node in graph.stored_chain(value) or ()}
    inside = {*main, *constant}
    ordered = [node for node in model.graph if node in inside]
    outputs = [value for node in main for value in node.outputs if value.name and _leaves(value, inside)]
    reads = runtime.read_values(ordered)
    inputs = sorted((value for value in reads if graph.stored(value) is None), key=lambda value: str(value.name))
    held = (value for node in _with_inner(ordered) for value in node.inputs if value is not None)
    stored = {str(v.name): v.const_value for v in held if v.is_initializer() and v.graph is model.graph}
    tensors = {name: tensor for name, tensor in stored.items() if tensor is not None}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in ordered],
            "excerpt",
            [onnx.ValueInfoProto(name=str(value.name)) for value in inputs],
            [onnx.ValueInfoProto(name=str(value.name)) for value in outputs],
            [onnx.TensorProto(name=name, data_type=t.dtype.value, dims=[0]) for name, t in tensors.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()],
        functions=[ir.to_proto(function) for function in model.functions.values()],
        ir_version=model.ir_version,
    )
    part = ir.from_proto(proto)
    for name, tensor in tensors.items():
        value = part.graph.initializers[name]
        value.const_value = graph.renamed(tensor, name)
        value.shape, value.type = ir.Shape(graph.dims_of(tensor)), ir.TensorType(tensor.dtype)
    return part


def _leaves(value: ir.Value, inside: set[ir.Node]) -> bool:
    uses = list(value.uses())
    return value.is_graph_output() or not uses or any(use.node not in inside for use in uses)


def _with_inner(nodes: Iterable[ir.Node]) -> Iterable[ir.Node]:
    """Yield nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for inner in graph.subgraphs(node):
            yield from inner.all_nodes()
