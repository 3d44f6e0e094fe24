"""What a model costs on a target, from its graph and concrete shapes alone: an estimate, never a measurement.

params  Elements of the constants of rank >= 1 that nodes read as numbers: floats, and the integers behind
    DequantizeLinear, Cast and the like or in QLinear* and *Integer ops. Each stored tensor counts once, however many
    nodes read it. Stored codebooks, factors and gather indices count as what they are, generated ConstantOfShape
    weights by their shape, bit-packed ones by what they unpack to. Not: BatchNormalization mean and variance,
    DequantizeLinear scales and zero points, shapes, axes, scalars.
nonzero  Those that are not zero (quantised: not the zero point); indices and packed bits count as nonzero.
macs  Multiply-accumulates (1 MAC = 2 FLOP) of the ops in cost_ops.LINEAR; padding counts, bias adds do not.
    If: the costlier branch. Scan: its length. Loop: its trip count if constant, else once. All with a note.
multiplications  macs + the scalar multiplications and divisions in cost_ops.MULTIPLICATIONS: what really runs, so that
    a Winograd or FFT form shows its gain. Nothing where a constant is folded or a node vanishes.
stored_bytes  All tensors of the file: initializers, constants, attributes; int4 packed, sparse ones as stored.
resident_bytes  Weights as the runtime holds them after folding: the full result where a constant meets a node that
    runs. DequantizeLinear is not folded, so its integers stay. Copies packed for kernels are not counted.
moved_bytes  What nodes read and write, weights included. Views move nothing; Gather and Slice read what they write.
peak_activation_bytes  Largest sum of live non-constant tensors in node order: graph inputs to their last use, outputs
    to the end. Views share memory; no other op works in place.
seconds  Sum over nodes of max(MACs or elements / rate, moved / bandwidth) + overhead, or by the target's tables, where
    it has one for the kernel, work / measured rate + overhead; tables are of weights in the cache and inputs as large
    as outputs, what is beyond that moves at its bandwidth. Channels are rounded up to what the target computes;
    a dense op on integers also brings each output to its grid, at twice the elementwise rate. Constant nodes cost
    nothing, views and shapes their overhead. A node pays for the values whose layout changes for it (cost_layout).

Nodes in the target's `fused` vanish where cost_fusion says so; they and the tensor between cost nothing. Where a shape
is not known, no work and no memory of that node counts, and a note says so.
Sources: roofline, Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785; rates: specs/targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from ccompile import graph
from ccompile.core import CostReport
from ccompile.cost_fusion import Fusion
from ccompile.cost_layout import Blocks
from ccompile.cost_memory import peak, stored_bytes
from ccompile.cost_ops import FREE, LINEAR, PARTIAL_READS, Call, Work, multiplications, run_of
from ccompile.cost_shapes import example_shapes, guessed_axes, inlined, inner_types
from ccompile.cost_weights import Constants, Weights
from ccompile.target import MIB, Step, Target, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ccompile.analysis.shapes import Shapes, ValueType

__all__ = ["SHAPE_UNKNOWN", "ModelCost", "NodeCost", "example_shapes", "guessed_axes", "price", "survey_metrics"]

SHAPE_UNKNOWN = "shape unknown: not counted"  # note of a row
_INTEGER_INSIDE = ("DynamicQuantizeMatMul",)


@dataclass(frozen=True)
class NodeCost:
    """One row: what a node costs. A node with subgraphs holds its bodies' cost; `note` says what is special.

    `params` and `stored_bytes` are of the constants it reads that no earlier node reads.
    """

    name: str
    op: str
    params: int = 0
    macs: int = 0
    multiplications: int = 0
    stored_bytes: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class ModelCost:
    """The totals, the rows of the top-level graph (without Constant nodes), the node at the memory peak, and notes."""

    report: CostReport
    nodes: tuple[NodeCost, ...]
    peak_node: str
    notes: tuple[str, ...] = ()


def price(model: ir.Model, shapes: Shapes, target: Target, beside: int = 0) -> ModelCost:
    """Return what one inference costs on `target`.

    beside: bytes of weights that other parts of the same inference read. shapes: of all top-level values, from
    analysis.shapes.infer with concrete input shapes (batch 1 by convention), or observed ones. Local functions are
    priced at every call.
    """
    stored = sum(stored_bytes(model))
    if model.functions:
        model, shapes = inlined(model, shapes)
    pricer = _Pricer(target, inner_types(model, shapes), _cold_share(stored + beside, target))
    body = pricer.body(model.graph, shapes)
    report = CostReport(
        params=sum(row.params for row in body.rows),
        nonzero=pricer.nonzero,
        macs=sum(row.macs for row in body.rows),
        multiplications=sum(row.multiplications for row in body.rows),
        stored_bytes=stored,
        resident_bytes=sum(pricer.resident.values()),
        moved_bytes=sum(row.moved_bytes for row in body.rows),
        peak_activation_bytes=body.peak,
        seconds=sum(row.seconds for row in body.rows) + target.session_overhead_us * 1e-6,
    )
    return ModelCost(report, body.rows, body.peak_node, tuple(pricer.all_notes()))


# ---------------------------------------------------------------------------------------------- nodes


@dataclass(frozen=True)
class _Body:
    rows: tuple[NodeCost, ...]
    peak: int
    peak_node: str


class _Pricer:
    """Walks one model; holds what is counted once across its graphs."""

    def __init__(self, target: Target, inner: Mapping[ir.Graph, Shapes], cold_share: float) -> None:
        self.target = target
        self.cold_share = cold_share  # of the weights: what is not in the cache, where tables were measured
        self.inner = inner
        self.constants = Constants()
        self.weights = Weights(self.constants)
        self.nonzero = 0
        self.resident: dict[ir.Value, int] = {}
        self.notes: dict[str, list[str]] = {}

    def all_notes(self) -> Iterator[str]:
        """Yield one note for each thing that is special, with the number of names and the first of them."""
        for what, names in self.notes.items():
            listed, more = ", ".join(names[:3]), ", ..." if len(names) > 3 else ""
            yield f"{len(names)} {what}: {listed}{more}"

    def note(self, what: str, name: str) -> None:
        """Remember what is special about a node or value."""
        self.notes.setdefault(what, []).append(name)

    def body(self, graph_: ir.Graph, types: Shapes) -> _Body:
        """Price the nodes of a graph or subgraph."""
        nodes = list(graph_)
        self.constants.add(iter(nodes))
        blocks = Blocks(nodes, self.target.layout, self.target.fused, self.constants, types)
        fusion = Fusion(nodes, self.target.fused, self.constants, blocks)
        rows, inner_peaks = [], {}
        for node in nodes:
            if node.op_type == "Constant":
                continue
            bodies = [self.body(sub, self.inner.get(sub, {})) for sub in graph.subgraphs(node)]
            inner_peaks[node] = max((body.peak for body in bodies), default=0)
            row = self._row(node, types, fusion, blocks, bodies)
            rows.append(replace(row, seconds=row.seconds + self._reordering(blocks.reorders.get(node, ()), types)))
        return _Body(tuple(rows), *peak(graph_, nodes, fusion, self.constants, types, inner_peaks))

    def _reordering(self, values: Sequence[ir.Value], types: Shapes) -> float:
        """Return the seconds of changing the layout of values."""
        seconds = 0.0
        for value in values:
            elements = math.prod(self.constants.type_of(value, types).static or ())
            rate = self.target.measured("reorder", "float32", {"elements": elements})
            each = elements / (rate or self.target.rate("elementwise", "float32"))
            seconds += each + self.target.node_overhead_us * 1e-6
        return seconds

    def _row(self, node: ir.Node, types: Shapes, fusion: Fusion, blocks: Blocks, bodies: Sequence[_Body]) -> NodeCost:
        name = str(node.name)
        if all(map(self.constants.is_folded, node.outputs)):
            return NodeCost(name, node.op_type, note="folded: runs once, at session creation")
        read = self.weights.read(node, types)
        self.nonzero += read.nonzero
        self._hold(node, types)
        row = NodeCost(name, node.op_type, read.params, stored_bytes=read.stored_bytes)
        overhead = self.target.node_overhead_us * 1e-6
        if bodies:
            return self._with_bodies(row, node, bodies, types, overhead)
        if fusion.vanishes(node):
            elements = math.prod(self.constants.type_of(node.outputs[0], types).static or ())
            rate = self.target.measured("fused", "float32", {"elements": elements}, op=node.op_type)
            return replace(row, seconds=elements / rate if rate else 0.0, note="vanishes into its neighbour")
        if node.op_type in FREE:
            return replace(row, seconds=overhead)
        try:
            return self._work(row, node, types, fusion, blocks)
        except (LookupError, ValueError):
            self.note("nodes of unknown shape not counted", name)
            return replace(row, note=SHAPE_UNKNOWN)

    def _work(self, row: NodeCost, node: ir.Node, types: Shapes, fusion: Fusion, blocks: Blocks) -> NodeCost:
        """Return the row of a node that runs; raises LookupError when a shape is not known."""
        inputs = [None if value is None else self.constants.type_of(value, types) for value in node.inputs]
        outputs = [self.constants.type_of(value, types) for value in node.outputs]
        call = Call(node, [known.static if known else None for known in inputs], [known.static for known in outputs])
        moved = self._moved(node, types, fusion)
        linear = LINEAR.get(node.op_type)
        macs = 0
        if linear is not None:
            work = linear.work(call)
            macs = work.macs
            dtype = self._dtype(node, types, fusion)
            is_blocked = blocks.runs(node) if self.target.layout is not None and dtype == "float32" else None
            is_measured, busy = self._linear_seconds(work, dtype, is_blocked)
            busy += self._beyond_table(node, inputs, outputs) if is_measured else 0.0
            if node in fusion.integer and work.kind not in ("depthwise", "ragged"):  # their rates hold it
                busy += math.prod(outputs[0].static or ()) / (2 * self.target.rate("elementwise", "int8"))
        else:
            sizes = [math.prod(known.static or ()) for known in (*inputs, *outputs) if known is not None]
            dtype = "int8" if node in fusion.integer else dtype_name(outputs[0].dtype or ir.DataType.FLOAT)
            is_measured, busy = self._other_seconds(call, dtype, max(sizes, default=0))
        return replace(
            row,
            macs=macs,
            multiplications=macs + multiplications(call),
            moved_bytes=moved,
            seconds=(busy if is_measured else max(busy, self.target.seconds_to_move(moved)))
            + self.target.node_overhead_us * 1e-6,
        )

    def _linear_seconds(self, work: Work, dtype: str, is_blocked: bool | None) -> tuple[bool, float]:
        """Return whether the seconds of a linear op come from a table, in which its memory takes part, and those."""
        step = self.target.step(dtype)
        if is_blocked and self.target.layout is not None and work.ins < self.target.layout.block:
            step = Step(out_channels=step.out_channels)  # few channels are read as they are
        work = work.at(step)
        computed = work.computed(step)
        if (known := work.table(step, is_blocked)) is not None:
            rate = self.target.measured(known[0], dtype, known[1], kernel=work.taps)
            if rate is not None:
                return True, computed / rate
        return False, computed / self.target.rate(work.kind, dtype)

    def _beyond_table(self, node: ir.Node, inputs: Sequence[ValueType | None], outputs: Sequence[ValueType]) -> float:
        """Return the seconds of moving what tables were not measured with: cold weights, an input above the output."""
        weights = [v for v in node.inputs if v is not None and self.constants.is_folded(v)]
        size = sum(self.constants.type_of(value, {}).nbytes or 0 for value in weights)
        groups = graph.attribute(node, "group", 1)  # tables are of one group
        cold = self.cold_share * size
        if self.target.cache is not None and size > groups * self.target.cache.mib * MIB:
            cold = 0.0  # neither were they cached there
        read, written = (known[0].nbytes or 0 if known and known[0] else 0 for known in (inputs, outputs))
        rest = max(read - written, 0) if "Conv" in node.op_type else 0
        return cold / (self.target.bandwidth_gb_s * 1e9) + self.target.seconds_to_move(rest)

    def _other_seconds(self, call: Call, dtype: str, elements: int) -> tuple[bool, float]:
        """Return whether the seconds of any other op come from a table, and those."""
        op, target = call.node.op_type, self.target
        if op in ("MaxPool", "AveragePool"):
            taps = math.prod(graph.attribute(call.node, "kernel_shape", [1]))
            work = math.prod(call.output) * taps
            rate = target.measured("pool", dtype, {"elements": math.prod(call.output)}, kernel=taps)
        elif op == "Transpose":
            work, run = elements, run_of(call)
            rate = target.measured("transpose", dtype, {"run": run, "elements": elements})
        else:
            work = elements
            rate = target.measured("ops", dtype, {"elements": elements}, op=op)
        if rate is not None:
            return True, work / rate
        return False, elements / target.rate("elementwise", dtype)

    def _dtype(self, node: ir.Node, types: Shapes, fusion: Fusion) -> str:
        """Return the type in which a linear op computes: int8 where both operands are, else its first operand's."""
        value = node.inputs[LINEAR[node.op_type].input]
        if node in fusion.integer or node.op_type in _INTEGER_INSIDE or value is None:
            return "int8"
        return dtype_name(self.constants.type_of(fusion.read(value), types).dtype or ir.DataType.FLOAT)

    def _moved(self, node: ir.Node, types: Shapes, fusion: Fusion) -> int:
        written = sum(self._bytes(fusion.written(value), types) for value in node.outputs if value.name)
        read = {fusion.read(value): None for value in node.inputs if value is not None}
        if node.op_type in PARTIAL_READS:
            return 2 * written + sum(self._bytes(value, types) for value in list(read)[1:])
        return written + sum(self._bytes(value, types) for value in read)

    def _bytes(self, value: ir.Value, types: Shapes) -> int:
        """Return the size of a value; strings and sequences have none; raises LookupError when its shape is unknown."""
        known = self.constants.type_of(value, types)
        if known.static is None:
            raise LookupError(value.name)
        return known.nbytes or 0

    def _hold(self, node: ir.Node, types: Shapes) -> None:
        """Remember the constants that stay in memory for a node that runs."""
        for value in node.inputs:
            if value is not None and self.constants.is_folded(value):
                nbytes = self.constants.type_of(value, types).nbytes
                if nbytes is None and self.constants.stored(value) is None:
                    self.note("constants of unknown shape not counted as resident", str(value.name))
                self.resident[value] = nbytes or 0

    def _with_bodies(
        self, row: NodeCost, node: ir.Node, bodies: Sequence[_Body], types: Shapes, overhead: float
    ) -> NodeCost:
        """Return the row of If (the costlier branch) or of Loop and Scan (the body, as often as it is known to run)."""
        times, note = self._trips(node, types)
        totals = [_sum(body.rows) for body in bodies]
        costly = max(totals, key=lambda total: (total.macs, total.seconds))
        if note:
            self.note(f"{node.op_type}: {note}", str(node.name))
        return replace(
            row,
            params=row.params + sum(total.params for total in totals),
            stored_bytes=row.stored_bytes + sum(total.stored_bytes for total in totals),
            macs=times * costly.macs,
            multiplications=times * costly.multiplications,
            moved_bytes=times * costly.moved_bytes,
            seconds=times * costly.seconds + overhead,
            note=note,
        )

    def _trips(self, node: ir.Node, types: Shapes) -> tuple[int, str]:
        if node.op_type == "If":
            return 1, "the costlier branch counted"
        if node.op_type == "Loop":
            trips = graph.constant(node.inputs[0])
            known = None if trips is None else int(trips.reshape(-1)[0])
        else:
            axes = graph.attribute(node, "scan_input_axes", [0])
            value, axis = node.inputs[-1], axes[-1] if len(axes) else 0
            shape = self.constants.type_of(value, types).static if value is not None else None
            known = shape[axis] if shape else None
        return (1, "body counted once") if known is None else (known, f"body counted {known} times")


def _cold_share(nbytes: int, target: Target) -> float:
    """Return how much of weights of `nbytes` the cache has lost when an inference comes back to them.

    Nothing up to half of the cache, everything from its size on: activations and other programs want their part.
    """
    if target.cache is None:
        return 0.0
    return min(max(2 * nbytes / (target.cache.mib * MIB) - 1, 0.0), 1.0)


def _sum(rows: Iterable[NodeCost]) -> NodeCost:
    total = NodeCost("", "")
    for row in rows:
        total = replace(
            total,
            params=total.params + row.params,
            macs=total.macs + row.macs,
            multiplications=total.multiplications + row.multiplications,
            stored_bytes=total.stored_bytes + row.stored_bytes,
            moved_bytes=total.moved_bytes + row.moved_bytes,
            seconds=total.seconds + row.seconds,
        )
    return total


# ---------------------------------------------------------------------------------------------- comparison


def survey_metrics(before: CostReport, after: CostReport) -> dict[str, float]:
    """Return how much smaller and faster a model became, by metric and quantity.

    compression_rate a / a*, space_saving 1 - a* / a; speed_up s / s* of the estimated seconds.
    Source: Cheng et al. 2017, arXiv:1710.09282, eq. 8-10. Its eq. 9 prints (a - a*) / a*, which is the rate less one;
    here the saving is the share of `before` that is gone.
    """
    found: dict[str, float] = {}
    for name in ("params", "macs", "stored_bytes"):
        a, b = getattr(before, name), getattr(after, name)
        found[f"compression_rate.{name}"] = _ratio(a, b)
        found[f"space_saving.{name}"] = 1 - b / a if a else 0.0
    found["speed_up"] = _ratio(before.seconds, after.seconds)
    return found


def _ratio(a: float, b: float) -> float:
    """Return a / b; 1 when both are 0, infinity when only b is."""
    return a / b if b else (math.inf if a else 1.0)
