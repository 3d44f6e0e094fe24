"""How long each layer of a model really takes: the runtime's profile of the graph that it made, told by source nodes.

ONNX Runtime merges nodes, renames them and inserts changes of layout. A node that runs stands for the source nodes
between what it reads and what it writes; values keep their names, but those in blocks of channels, whose makers are
called `<value>_nchwc`, and what integer convolutions with channels last write, which keep the name of their node. A
change of layout belongs to what reads its result, or to what made the value where nothing does.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from ccompile import graph, measuring, timing
from ccompile.runtime import Feeds, Session, Settings

_REORDERS = ("ReorderInput", "ReorderOutput")
_SUMMED = 3  # the input of a convolution in blocks that it adds to its result
_NEAR = 0.2  # how far an estimate may be off to count as right


@dataclass(frozen=True)
class LayerTime:
    """Source nodes that run as one, the target's estimate for them, and their measured seconds."""

    nodes: tuple[str, ...]
    estimate: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Seconds by layer, those of a whole inference, and on how many threads."""

    layers: tuple[LayerTime, ...]
    seconds: float
    threads: int

    @property
    def near(self) -> float:
        """Return the share of the layers' time whose estimate is at most a fifth off."""
        right = (layer for layer in self.layers if abs(layer.estimate - layer.seconds) <= _NEAR * layer.seconds)
        return sum(layer.seconds for layer in right) / max(sum(layer.seconds for layer in self.layers), 1e-12)


def measure(
    model: ir.Model,
    estimates: Mapping[str, float],
    feeds: Feeds,
    threads: int,
    node_seconds: float,
    budget: float,
) -> Measured:
    """Return what layers take in about `budget` seconds, in the order of the graph.

    estimates: seconds by node; node_seconds: what a node costs beside its work, which profiles do not tell.
    """
    bench = measuring.Bench(threads, time.perf_counter() + budget)
    bench.overheads()
    with tempfile.TemporaryDirectory() as folder:
        written = str(Path(folder) / "optimised.onnx")
        session = Session(model, Settings(threads, True, str(Path(folder) / "profile"), optimised=written))
        stop, rounds = time.perf_counter() + budget / 2, 0
        while rounds < 6 or time.perf_counter() < stop:
            session.run(feeds)
            rounds += 1
        taken = measuring.by_name(Path(session.end_profiling()), bench.empty_us)
        runs = onnx.load(written, load_external_data=False).graph
    plain = Session(model, Settings(threads, optimise=True))
    (whole,) = timing.interleaved([lambda: plain.run(feeds)], threads == 1, budget=budget / 4)
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for name, nodes in Covering(model, runs).nodes().items():
        if name in taken:
            sums[nodes] += taken[name] + node_seconds
    order = {str(node.name): at for at, node in enumerate(model.graph)}
    layers = [LayerTime(nodes, sum(estimates.get(n, 0.0) for n in nodes), s) for nodes, s in sums.items()]
    layers.sort(key=lambda layer: min((order[name] for name in layer.nodes), default=len(order)))
    return Measured(tuple(layers), whole, threads)


class Covering:
    """Which source nodes each node of the graph that runs stands for."""

    def __init__(self, model: ir.Model, runs: onnx.GraphProto) -> None:
        self.made = {str(value.name): node for node in model.graph for value in node.outputs if value.name}
        self.order = {node: at for at, node in enumerate(model.graph)}
        self.named = {str(node.name): node for node in model.graph}
        self.known = self.made.keys() | {str(value.name) for value in model.graph.inputs}
        self.runs = list(runs.node)
        self.maker = {name: node for node in self.runs for name in node.output}

    def nodes(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the source nodes of each node that runs, by its name."""
        taken: set[ir.Node] = set()
        found = {node.name: self.covered(node, taken) for node in self.runs if not self.reorders(node)}
        for node in self.runs:
            if self.reorders(node):
                reader = next((other for other in self.runs if set(node.output) & set(other.input)), None)
                is_last = reader is None or self.reorders(reader)
                maker = self.made.get(self.source(node.input[0]))
                own = () if maker is None else (str(maker.name),)
                holding = next((nodes for nodes in found.values() if own and own[0] in nodes), own)
                found[node.name] = holding if is_last or reader is None else found[reader.name]
        return found

    def covered(self, node: onnx.NodeProto, taken: set[ir.Node]) -> tuple[str, ...]:
        """Return the source nodes between what a node reads and what it writes, in order, and add them to `taken`.

        What earlier nodes have taken is left out.
        """
        read = {self.source(name) for name in node.input}
        waiting = [self.source(name) for name in node.output if name]
        inside: set[ir.Node] = set()
        while waiting:
            name = waiting.pop()
            maker = self.made.get(name)
            if name in read or maker is None or maker in inside or maker in taken:
                continue
            inside.add(maker)
            waiting += [str(value.name) for value in maker.inputs if value is not None and not graph.is_constant(value)]
        taken |= inside
        return tuple(str(maker.name) for maker in sorted(inside, key=self.order.__getitem__))

    def source(self, name: str) -> str:
        """Return the source value that a value stands for."""
        while name not in self.known and name in self.maker:
            node = self.maker[name]
            if not self.reorders(node):
                return self._written(node)
            name = node.input[0]
        return name

    def reorders(self, node: onnx.NodeProto) -> bool:
        """Return whether a node does nothing but change a layout for the runtime's own sake."""
        return node.op_type in _REORDERS or (node.op_type == "Transpose" and node.name not in self.named)

    def _written(self, node: onnx.NodeProto) -> str:
        """Return the source value that a node with a layout of its own writes."""
        maker = self.named.get(re.sub(r"_token_\d+$", "", node.name))
        if node.op_type != "QLinearConv" or maker is None:
            return self._written_in_blocks(node)
        while maker.op_type != "QuantizeLinear" and (reader := graph.only_use(maker.outputs[0])) is not None:
            maker = reader
        return str(maker.outputs[0].name)

    def _written_in_blocks(self, node: onnx.NodeProto) -> str:
        """Return what a node in blocks writes: its name says that of the convolution itself.

        A sum that it absorbed in blocks, and the activation behind that, stand behind it.
        """
        name = re.sub(r"_nchwc(_token_\d+)?$", "", node.name)
        absorbed = ["Add", "Sum"] if len(node.input) > _SUMMED and node.input[_SUMMED] else []
        maker = self.made.get(name)
        if not absorbed or maker is None:
            return name
        activation = next((held.s.decode() for held in node.attribute if held.name == "activation"), "")
        for ops in (absorbed, [activation]):
            reader = graph.only_use(maker.outputs[0])
            if reader is None or reader.op_type not in ops:
                break
            maker = reader
        return str(maker.outputs[0].name)
