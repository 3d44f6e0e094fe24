"""Which channels must live and die together, in any graph.

Ids of channels run through the graph's own shape ops (channel_flow); where two meet they are joined; what is not
understood pins what it touches, with the reason. Removing whole units of a group keeps every tensor a rectangle and
changes nothing but what the removed channels contributed. Source: the coupling of Torch-Pruning (Fang et al. 2023,
arXiv:2301.12900), computed here by index arrays instead of per-layer rules.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import channel_linear, channel_maths, channel_moves, channel_reshape
from ccompile.analysis.channel_flow import Count, Flow, Handler, Read, Role, compressed, default_domain, flat, varying
from ccompile.core import Array, Skip

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil
    Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity
    IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCE = """
    ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare
"""
_POOL = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
_AXIS = "Hardmax LayerNormalization LogSoftmax LpNormalization RMSNormalization Softmax"

# op -> how it treats channels; any other op pins what flows into it
_OPS: dict[str, Handler] = {
    **dict.fromkeys(_ELEMENTWISE.split(), channel_maths.elementwise),
    **dict.fromkeys(_REDUCE.split(), channel_maths.reduce),
    **dict.fromkeys(_POOL.split(), channel_maths.pool),
    **dict.fromkeys(_AXIS.split(), channel_maths.along_axis),
    "BatchNormalization": channel_maths.batchnorm,
    "Concat": channel_moves.concat,
    "Conv": channel_linear.conv,
    "ConvTranspose": channel_linear.conv,
    "CumSum": channel_maths.cumsum,
    "DepthToSpace": channel_moves.depth_to_space,
    "DequantizeLinear": channel_maths.quantize,
    "Expand": channel_moves.expand,
    "Flatten": channel_reshape.reshape,
    "Gather": channel_moves.gather,
    "Gemm": channel_linear.gemm,
    "GroupNormalization": channel_maths.groupnorm,
    "InstanceNormalization": channel_maths.instancenorm,
    "LRN": channel_maths.mixes,
    "MatMul": channel_linear.matmul,
    "MeanVarianceNormalization": channel_maths.meanvariance,
    "Pad": channel_moves.pad,
    "QuantizeLinear": channel_maths.quantize,
    "Reshape": channel_reshape.reshape,
    "Resize": channel_moves.resize,
    "Shape": lambda flow, node: None,
    "Slice": channel_moves.cut,
    "SpaceToDepth": channel_moves.space_to_depth,
    "Split": channel_moves.split,
    "Squeeze": channel_moves.squeeze,
    "Tile": channel_moves.tile,
    "Transpose": channel_moves.transpose,
    "Unsqueeze": channel_moves.unsqueeze,
    "Upsample": channel_moves.resize,
}
_KEEPS_RANK = (
    channel_maths.along_axis,
    channel_maths.batchnorm,
    channel_maths.pool,
    channel_maths.reduce,
    channel_moves.cut,
    channel_moves.pad,
    channel_moves.transpose,
)
# ops that hand shape vectors on, and ops that look after the sizes they are given
_SIZE_OPS = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze")
_SIZED_OPS = ("Expand", "Reshape", "Resize")


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one constant that carries channels of a group.

    `value` is what input `input` of `node` reads: stored, or behind ops that graph.constant sees through.
    role: producer, rows of a linear weight or its bias; consumer, columns of a linear weight that contracts the
    channels; through, whatever follows them (normalisation parameters, broadcast constants, depthwise weights).
    unit[position along axis]: the unit's number in the group, -1 where the position belongs to no unit of it.
    """

    value: str
    node: str
    input: int
    axis: int
    role: Role
    unit: Array


@dataclass(frozen=True, eq=False)
class Size:
    """Numbers of a node that count channels; `unit` as in Member, along the axis that they count.

    now[index] counts it (Reshape, Expand and Resize targets, Split sizes, Conv's `group`, GroupNormalization's
    `num_groups`), except: Slice, now = (start, end) of its `index`-th axis, `unit` along its input; Pad, now = (begin,
    end) of its `index`-th axis, `unit` along its output; Gather, now = indices, `unit` along its input.
    """

    node: str
    index: int
    now: tuple[int, ...]
    unit: Array


@dataclass(frozen=True, eq=False)
class Carrier:
    """One axis of an activation along which channels of a group run; `unit` as in Member."""

    value: str
    axis: int
    unit: Array


@dataclass(frozen=True, eq=False)
class Group:
    """Units that share tensors; a unit is the least set of channels that can be removed alone.

    A group with `pinned` must not be touched. Other groups may share its tensors (Concat), in positions of unit -1.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    sizes: tuple[Size, ...]
    carriers: tuple[Carrier, ...]
    pinned: tuple[Skip, ...]

    def by_role(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role."""
        return tuple(member for member in self.members if member.role == role)


@dataclass(frozen=True)
class Channels:
    """The groups of a model in topological order of their first producer."""

    groups: tuple[Group, ...]

    def named(self, name: str) -> Group:
        """Return the group of that name. Raises KeyError when there is none."""
        return {group.name: group for group in self.groups}[name]

    @property
    def free(self) -> tuple[Group, ...]:
        """Return the groups that nothing pins."""
        return tuple(group for group in self.groups if not group.pinned)


def channels(model: ir.Model) -> Channels:
    """Return the groups of coupled channels of a model's main graph."""
    flow = Flow(model)
    for node in model.graph:
        _walk(flow, node)
    _pin_outside(flow)
    _agree_on_shared(flow)
    return _Groups(flow, _settle(flow)).gather()


def _walk(flow: Flow, node: ir.Node) -> None:
    if all(graph.is_constant(output) for output in node.outputs):
        return
    handler = _OPS.get(node.op_type) if default_domain(node) else None
    hands_on = handler is not None and node.op_type in _SIZE_OPS and channel_reshape.follow_sizes(flow, node)
    if handler is None or not (hands_on or node.op_type in _SIZED_OPS):
        channel_reshape.reads_sizes(flow, node)
    if handler is None:
        name = node.op_type if default_domain(node) else f"{node.domain}::{node.op_type}"
        flow.refuse(node, f"unknown op {name}")
        return
    if node.op_type != "Split" and any(list(o.uses()) or o.is_graph_output() for o in node.outputs[1:]):
        flow.refuse(node, "its further outputs are read")
    else:
        handler(flow, node)
    _note_rank(flow, node, handler)


def _note_rank(flow: Flow, node: ir.Node, handler: Handler) -> None:
    """Note the rank of an output that shape inference does not know, where the op tells it."""
    output, first = node.outputs[0], node.inputs[0] if node.inputs else None
    if first is None or flow.rank(output) is not None:
        return
    ranks = [flow.rank(value) for value in node.inputs if value is not None]
    known = [rank for rank in ranks if rank is not None]
    rank = ranks[0]
    if handler in (channel_maths.elementwise, channel_linear.matmul):
        rank = max(known) if len(known) == len(ranks) else None
    elif node.op_type == "Reshape":
        target = channel_reshape.numbers(flow, node.inputs[1])
        rank = None if target is None else len(target)
    elif handler is channel_maths.reduce and rank is not None and not graph.attribute(node, "keepdims", 1):
        axes = channel_maths.axes_of(node, rank)
        rank = None if axes is None else rank - len(axes)
    elif handler not in _KEEPS_RANK:
        rank = None
    if rank is not None:
        ones = channel_maths.axes_of(node, rank) if handler is channel_maths.reduce and rank == ranks[0] else None
        flow.guessed[str(output.name)] = tuple(1 if axis in (ones or ()) else None for axis in range(rank))


def _pin_outside(flow: Flow) -> None:
    """Pin what the world outside the main graph's nodes sees: graph outputs, subgraphs."""
    for node in flow.graph:
        for output in node.outputs:
            ids, entries = flow.ids(output), flow.numbers.get(str(output.name), ())
            inner = [use.node for use in output.uses() if use.node.graph is not flow.graph]
            for seen, reason in (
                (output.is_graph_output(), f"graph output `{output.name}`"),
                (bool(inner), f"a subgraph reads `{output.name}`"),
            ):
                if seen and ids is not None:
                    flow.pin(ids, node, reason)
                for entry in entries if seen else ():
                    channel_reshape.reads_size(flow, node, entry)


def _agree_on_shared(flow: Flow) -> None:
    """Join what the readers of one constant say of it; pin it where a reader says nothing or it hides behind ops."""
    by_value: dict[ir.Value, list[Read]] = defaultdict(list)
    for read in flow.reads:
        by_value[read.value].append(read)
    for value, reads in by_value.items():
        chain = graph.stored_chain(value) or ()
        links = [node.inputs[0] for node in chain if node.op_type != "ConstantOfShape"]
        if any(link is not None and (len(list(link.uses())) > 1 or link.is_graph_output()) for link in links):
            for read in reads:
                flow.pin(read.ids, read.node, f"`{value.name}` shares its storage with another constant")
        readers = {(use.node, use.idx) for use in value.uses()}
        if len(readers) > 1 or value.is_graph_output():
            for axis in sorted({read.axis for read in reads}):
                _agree(flow, value, [read for read in reads if read.axis == axis], readers)


def _agree(flow: Flow, value: ir.Value, reads: list[Read], readers: set[tuple[ir.Node, int]]) -> None:
    silent = readers - {(read.node, read.input) for read in reads}
    plain = all(len(varying(read.ids)) == 1 for read in reads)
    if silent or not plain or value.is_graph_output():
        for read in reads:
            flow.pin(read.ids, read.node, f"`{value.name}` is shared with a reader that needs all of it")
        return
    for read in reads[1:]:
        flow.unify(reads[0].ids.reshape(-1), read.ids.reshape(-1))


def _settle(flow: Flow) -> Array:
    """Join units until every value's vary along one axis, so that what is left is always a rectangle; return them.

    Where several axes would do, the longest stays.
    """
    several = [ids for ids in _distinct(flow) if len(varying(ids)) > 1]
    unit = flow.components()
    while True:
        for ids in several:
            now = compressed(unit[ids])
            if len(varying(now)) > 1:
                keep = int(np.argmax(now.shape))
                flow.unify(ids, flat(ids, [axis for axis in range(ids.ndim) if axis != keep]))
                unit = flow.components()
                break
        else:
            break
    for name, ids in flow.values.items():
        if np.all(unit[ids] == unit[ids.flat[0]]):
            node = next(output.producer() for output in _outputs(flow) if output.name == name)
            assert node is not None
            flow.pin(ids.reshape(-1)[:1], node, f"all channels of `{name}` stand and fall together")
    return unit


def _outputs(flow: Flow) -> list[ir.Value]:
    return [output for node in flow.graph for output in node.outputs]


def _distinct(flow: Flow) -> list[Array]:
    return list({id(ids): ids for ids in flow.values.values()}.values())


class _Groups:
    """Turn the records of a walk into groups: units that a producer makes side by side share one."""

    def __init__(self, flow: Flow, unit: Array) -> None:
        self.flow, self.unit = flow, unit
        self.group, self.number, self.sizes = self._label()
        self._lines: dict[tuple[int, int], list[tuple[int, Array]]] = {}
        self._held: list[Array] = []

    def _label(self) -> tuple[Array, Array, Array]:
        """Return each id's group and its unit's number there, and the size of each group, in order of first id."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        starts = np.array([first for first, _ in self.flow.origins], np.int64)
        origin = np.searchsorted(starts, np.arange(self.flow.size), side="right") - 1
        count = int(self.unit.max(initial=-1)) + 1
        total = count + starts.size
        links = coo_array((np.ones(self.flow.size, np.int8), (self.unit, count + origin)), shape=(total, total))
        label = connected_components(links, directed=False)[1][self.unit]
        group = _ranked(label)
        first = np.unique(self.unit, return_index=True)[1]  # of each unit, its first id
        number = np.zeros(count, np.int64)
        sizes = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
        for unit in np.argsort(first, kind="stable"):
            number[unit] = sizes[group[first[unit]]]
            sizes[group[first[unit]]] += 1
        return group, number[self.unit], sizes

    def _line(self, ids: Array, along: int) -> list[tuple[int, Array]]:
        """Return (group, unit per position along one axis) of every group there; none when units do not vary there."""
        key = (id(ids), along % ids.ndim)
        if key not in self._lines:
            self._held.append(ids)
            self._lines[key] = self._computed_line(ids, key[1])
        return self._lines[key]

    def _computed_line(self, ids: Array, along: int) -> list[tuple[int, Array]]:
        units = compressed(self.unit[ids])
        if units.shape[along] == 1:
            return []
        row = flat(ids, [axis for axis in range(ids.ndim) if axis != along]).reshape(-1)
        group, number = self.group[row], self.number[row].astype(np.int32)
        return [(int(g), _frozen(np.where(group == g, number, np.int32(-1)))) for g in np.unique(group)]

    def gather(self) -> Channels:
        """Return the groups."""
        members: dict[int, list[Member]] = defaultdict(list)
        sizes: dict[int, list[Size]] = defaultdict(list)
        carriers: dict[int, list[Carrier]] = defaultdict(list)
        pinned: dict[int, dict[Skip, None]] = defaultdict(dict)
        for read in self.flow.reads:
            for group, unit in self._line(read.ids, read.along):
                found = Member(str(read.value.name), str(read.node.name), read.input, read.axis, read.role, unit)
                members[group].append(found)
        for count in self.flow.counts:
            for group, unit in self._line(count.ids, count.along):
                sizes[group].append(Size(str(count.node.name), count.index, count.now, unit))
        for name, ids in self.flow.values.items():
            for axis in varying(ids):
                for group, unit in self._line(ids, axis):
                    carriers[group].append(Carrier(name, axis, unit))
        for ids, skip in self.flow.pins:
            for group in np.unique(self.group[ids]):
                pinned[int(group)].setdefault(skip)
        names = self._names(members)
        return Channels(
            tuple(
                Group(name, int(self.sizes[g]), tuple(members[g]), tuple(sizes[g]), tuple(carriers[g]), tuple(skips))
                for g, name in names.items()
                if (skips := _reasons(name, members[g], list(pinned[g]))) is not None
            )
        )

    def _names(self, members: dict[int, list[Member]]) -> dict[int, str]:
        """Return the name of each group: its first producer's, else that of the node where it starts."""
        names: dict[int, str] = {}
        for first, node in self.flow.origins:
            group = int(self.group[first])
            if group not in names:
                producer = next((member.node for member in members[group] if member.role == "producer"), node)
                taken = sum(name.split("#")[0] == producer for name in names.values())
                names[group] = f"{producer}#{taken + 1}" if taken else producer
        return names


def _reasons(name: str, members: list[Member], pinned: list[Skip]) -> list[Skip] | None:
    """Return why a group is pinned, nothing when it is not; None when it is no group at all."""
    roles = {member.role for member in members}
    if not members:
        return None
    if not pinned and "producer" not in roles:
        return [Skip(name, "no linear layer makes its channels")]
    if not pinned and "consumer" not in roles:
        return [Skip(name, "no linear layer reads its channels")]
    return pinned


def _ranked(label: Array) -> Array:
    """Renumber labels in the order in which they first occur."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


__all__ = ["Carrier", "Channels", "Count", "Group", "Member", "Role", "Size", "channels"]
