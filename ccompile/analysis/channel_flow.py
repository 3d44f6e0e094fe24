"""What the channel analysis knows while it walks a graph: ids along axes, and what must hold between them.

Every output channel of a linear layer gets an id. A value's ids are an integer array of the value's rank; an axis of
size 1 does not tell channels apart (whatever its real size), any other axis has the value's size. A value without ids
cannot lose anything. `edges` join ids that live and die together; `pins` name ids that must live.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ccompile import graph, onnx_io
from ccompile.analysis.shapes import UNKNOWN, Dim, shapes
from ccompile.core import Array, Skip

Role = Literal["producer", "through", "consumer"]
Dims = tuple[Dim, ...]
Entry = int | tuple[str, int] | None  # of a shape vector: a number, (value, axis) whose size it is, or unknown


@dataclass(frozen=True)
class Read:
    """Axis `axis` of a constant runs along axis `along` of `ids`."""

    value: ir.Value
    node: ir.Node
    input: int
    axis: int
    role: Role
    ids: Array
    along: int


@dataclass(frozen=True)
class Count:
    """Numbers of a node that count the positions of axis `along` of `ids`; see channels.Size."""

    node: ir.Node
    index: int
    now: tuple[int, ...]
    ids: Array
    along: int


class Flow:
    """The state of one walk over a model's main graph."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.types = shapes(model)
        self.values: dict[str, Array] = {}
        self.guessed: dict[str, Dims] = {}  # what the walk knows where shape inference gives up
        self.numbers: dict[str, tuple[Entry, ...]] = {}
        self.origins: list[tuple[int, str]] = []  # (first id, node) of every call of `fresh`, ids rising
        self.edges: list[tuple[Array, Array]] = []
        self.pins: list[tuple[Array, Skip]] = []
        self.notes: list[tuple[int, Skip]] = []  # why the ids joined with this one were joined, where it may matter
        self.reads: list[Read] = []
        self.counts: list[Count] = []
        self.size = 0

    # ------------------------------------------------------------------------------------------ values

    def ids(self, value: ir.Value | None) -> Array | None:
        """Return the ids of a value, or None when it carries none."""
        return None if value is None else self.values.get(str(value.name))

    def dims(self, value: ir.Value) -> Dims | None:
        """Return the dimensions of a value as far as they are known, or None when even the rank is not."""
        known, ids = self.types.get(str(value.name), UNKNOWN).shape, self.ids(value)
        if known is None:
            known = graph.static_shape(value)
        if known is None:
            known = self.guessed.get(str(value.name))
        if ids is None:
            return known
        if known is None or len(known) != ids.ndim:
            known = (None,) * ids.ndim
        return tuple(size if size > 1 else dim for size, dim in zip(ids.shape, known, strict=True))

    def rank(self, value: ir.Value) -> int | None:
        """Return the rank of a value, or None."""
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def open_size(self, entry: tuple[str, int]) -> Dim:
        """Return the size of an axis of a value, or None when it is unknown or counts channels."""
        known, ids = self.types.get(entry[0], UNKNOWN).shape, self.values.get(entry[0])
        return None if known is None or (ids is not None and ids.shape[entry[1]] > 1) else known[entry[1]]

    def give(self, value: ir.Value, ids: Array | None) -> None:
        """Let `value` carry `ids`. A value left with one channel only must keep it."""
        node = value.producer()
        if ids is None or node is None or not value.name:
            return
        ids = compressed(ids)
        known = self.types.get(str(value.name), UNKNOWN).shape
        if known is not None and (len(known) != ids.ndim or not _fits(ids, known)):
            self.pin(ids, node, f"the inferred shape of `{value.name}` contradicts its channels")
        elif ids.size == 1:
            self.pin(ids, node, f"`{value.name}` has no other channel")
        else:
            self.values[str(value.name)] = ids

    def describe(self, value: ir.Value) -> str:
        """Return in words what a value without channels is."""
        node = value.producer()
        if graph.is_constant(value):
            return f"the constant `{value.name}`"
        if node is None:
            return f"the graph input `{value.name}`"
        return f"`{value.name}`, whose channels `{node.name}` ({node.op_type}) cannot lose"

    # ------------------------------------------------------------------------------------------ facts

    def fresh(self, node: ir.Node, count: int) -> Array:
        """Return `count` new ids of channels that `node` makes."""
        self.origins.append((self.size, str(node.name)))
        self.size += count
        return np.arange(self.size - count, self.size)

    def pin(self, ids: Array, node: ir.Node, reason: str) -> None:
        """Say that none of these channels may be removed."""
        self.pins.append((np.unique(ids), Skip(str(node.name), reason)))

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Pin everything that flows into `node`; its outputs carry no ids."""
        for value in node.inputs:
            ids = self.ids(value)
            if ids is not None:
                self.pin(ids, node, reason)

    def unify(self, a: Array, b: Array) -> Array:
        """Join two id arrays element by element, broadcasting, and return them as one."""
        if a is b:
            return a
        left, right = np.broadcast_arrays(a, b)
        self.edges.append((left.reshape(-1), right.reshape(-1)))
        full = [ids for ids in (a, b) if ids.shape == left.shape]
        return full[0] if full else left

    def bind(self, ids: Array, axes: Iterable[int], node: ir.Node, reason: str) -> None:
        """Join all channels that differ along `axes` only: none goes without the others. Pin when nothing else varies.

        `ids` stay usable for the value; `flat` drops the bound axes.
        """
        bound = [axis for axis in axes if ids.shape[axis] > 1]
        if not bound:
            return
        first = flat(ids, bound)
        if first.size == 1:
            self.pin(ids, node, reason)
            return
        self.unify(ids, first)
        self.notes.append((int(first.flat[0]), Skip(str(node.name), reason)))

    def read(self, node: ir.Node, index: int, axis: int, role: Role, ids: Array, along: int) -> None:
        """Let axis `axis` of the constant input `index` run along axis `along` of `ids`; pin what cannot be cut."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or ids.shape[along] == 1:
            return
        shape = graph.static_shape(value)
        if shape is None:
            self.pin(ids, node, f"its operand `{value.name}` is not constant")
        elif shape[axis] == 1:
            return
        elif shape[axis] != ids.shape[along]:
            self.pin(ids, node, f"the size of `{value.name}` does not fit its channels")
        else:
            chain = graph.stored_chain(value) or ()
            smaller = [f"behind {link.op_type}" for link in chain if link.op_type in graph.ENCODED]
            if isinstance(graph.stored(value), onnx_io.SparseTensor):
                smaller.append("sparse")
            if smaller:
                self.pin(ids, node, f"`{value.name}` is stored in a smaller form, {smaller[0]}")
            self.reads.append(Read(value, node, index, axis, role, ids, along))

    def count(self, node: ir.Node, index: int, now: Sequence[int], ids: Array, along: int) -> None:
        """Say that numbers of `node` count positions of axis `along` of `ids`; see channels.Size."""
        if ids.shape[along] > 1:
            self.counts.append(Count(node, index, tuple(int(n) for n in now), ids, along))

    # ------------------------------------------------------------------------------------------ answers

    def components(self) -> Array:
        """Return for each id the number of the set that lives and dies with it."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        a, b = (np.concatenate([edge[k] for edge in self.edges] or [np.zeros(0, np.int64)]) for k in (0, 1))
        links = coo_array((np.ones(a.size, np.int8), (a, b)), shape=(self.size, self.size))
        return np.asarray(connected_components(links, directed=False)[1])


def flat(ids: Array, axes: Iterable[int]) -> Array:
    """Return the first slice of `ids` along each of `axes`, which then no longer varies there."""
    for axis in axes:
        ids = ids if ids.shape[axis] == 1 else ids.take([0], axis)
    return ids


def compressed(ids: Array) -> Array:
    """Return `ids` with size 1 on every axis along which they do not vary.

    >>> compressed(np.array([[3, 3], [5, 5]])).tolist()
    [[3], [5]]
    """
    for axis in varying(ids):
        first = ids.take([0], axis)
        if bool((ids == first).all()):
            ids = first
    return ids


def varying(ids: Array) -> list[int]:
    """Return the axes of `ids` that tell channels apart."""
    return [axis for axis, size in enumerate(ids.shape) if size > 1]


def line(ids: Array, along: int) -> Array:
    """Return the first line of `ids` along one axis."""
    return flat(ids, [axis for axis in range(ids.ndim) if axis != along % ids.ndim]).reshape(-1)


def lifted(ids: Array, rank: int) -> Array:
    """Return `ids` with leading axes of size 1 up to `rank`."""
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def _fits(ids: Array, dims: Dims) -> bool:
    return all(size == 1 or not isinstance(dim, int) or dim == size for size, dim in zip(ids.shape, dims, strict=True))


def product(dims: Iterable[Dim]) -> int | None:
    """Return the product of dimensions, or None when one is not a number."""
    known = list(dims)
    return math.prod(d for d in known if isinstance(d, int)) if all(isinstance(d, int) for d in known) else None


def default_domain(node: ir.Node) -> bool:
    """Return whether a node's op is ONNX's own."""
    return node.domain in ("", "ai.onnx")


Handler = Callable[[Flow, ir.Node], None]
