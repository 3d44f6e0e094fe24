"""One graph on its way through the calibration set, holding only what is live at the cut; and where two graphs part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.core import Array
from ccompile.ledger import Ledger
from ccompile.recording import Recording
from ccompile.runtime import Feeds, Outputs, Settings

Batches = Callable[[], Iterable[Feeds]]


class Walker:
    """One graph on its way through the calibration set: what is live at the cut, batch by batch."""

    def __init__(self, model: ir.Model, batches: Batches, settings: Settings, ledger: Ledger) -> None:
        self.model, self.settings, self.ledger = model, settings, ledger
        self.at = 0  # nodes before have run; what comes later may still be replaced
        self.live = ledger.watch(Recording())
        for feeds in batches():
            self.live.append(dict(feeds))

    @property
    def nodes(self) -> list[ir.Node]:
        """Return the nodes in order."""
        return list(self.model.graph)

    def reach(self, name: str, wanted: str) -> None:
        """Advance to just before a node, or stay where that is behind."""
        self.advance(max(self.at, [str(node.name) for node in self.nodes].index(name)), wanted)

    def advance(self, to: int, wanted: str) -> None:
        """Run nodes[at:to] on every batch and keep what later nodes read, and `wanted`."""
        nodes = self.nodes
        part = nodes[self.at : to]
        needed = {wanted} | {str(value.name) for value in runtime.read_values(nodes[to:])}
        made = {str(output.name) for node in part for output in node.outputs if output.name}
        kept = self.ledger.watch(Recording())
        session: runtime.Session | None = None
        for values in self.live:
            passing = {name: value for name, value in values.items() if name in needed}
            if made & needed:
                if session is None:
                    dtypes = {name: np.asarray(value).dtype for name, value in values.items()}
                    small = runtime.part_of(self.model, part, dtypes, sorted(made & needed))
                    session = runtime.Session(small, self.settings)
                passing |= session.run({name: v for name, v in values.items() if name in session.inputs})
            kept.append(passing)
        self.ledger.update()  # both cuts are held here
        self.live, self.at = kept, to

    def outputs_from(self, model: ir.Model, part: Sequence[ir.Node]) -> Iterator[Outputs]:
        """Yield the outputs of another graph that differs in its last nodes `part` only, from what is live here."""
        names = [str(output.name) for output in model.graph.outputs]
        session: runtime.Session | None = None
        for values in self.live:
            if session is None:
                dtypes = {name: np.asarray(value).dtype for name, value in values.items()}
                session = runtime.Session(runtime.part_of(model, part, dtypes, names), self.settings)
            yield session.run({name: value for name, value in values.items() if name in session.inputs})

    def values(self, name: str) -> Iterator[Array]:
        """Yield a live value, batch by batch."""
        return (np.asarray(outputs[name]) for outputs in self.live)


def first_change(base: ir.Model, copy: ir.Model) -> int:
    """Return how many leading nodes of a copy are still those of `base`, with the same constants."""
    pairs = zip(base.graph, copy.graph, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if not _is_same(one, other)), len(base.graph))


def _is_same(one: ir.Node, other: ir.Node) -> bool:
    """Return whether a copied node is untouched: copies share the arrays of their constants."""
    if (one.name, one.op_identifier()) != (other.name, other.op_identifier()) or any(graph.subgraphs(other)):
        return False
    if len(one.inputs) != len(other.inputs) or one.attributes.keys() != other.attributes.keys():
        return False
    pairs = ((one.attributes[name], other.attributes[name]) for name in one.attributes)
    if not all(a is b or (a.type != ir.AttributeType.TENSOR and a.value == b.value) for a, b in pairs):
        return False
    return all(_is_same_value(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


def _is_same_value(one: ir.Value | None, other: ir.Value | None) -> bool:
    if one is None or other is None or one.name != other.name:
        return one is other
    tensors = graph.stored(one), graph.stored(other)
    if tensors[0] is None or tensors[1] is None:
        return tensors[0] is tensors[1]
    a, b = (tensor.numpy() for tensor in tensors if tensor is not None)
    return (a.ctypes.data, a.shape, a.strides, a.dtype) == (b.ctypes.data, b.shape, b.strides, b.dtype)
