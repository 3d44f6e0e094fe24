"""What decodes a stored weight: where nodes go, what they may be made of, and codes of few bits in bytes.

Codes of 1, 2 and 4 bits lie side by side in bytes (BitShift, Mod), of 4 bits in UINT4 where the model's opset has it,
others as bit planes (MatMulInteger with the powers of two). All of it folds when the runtime opens a session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph
from ccompile.core import Array

NODE, CONSTANT = 48, 30  # about what a node adds to a file, and a constant beside its data, in bytes
NATIVE = 21  # the opset with UINT4
OLDEST = 11  # the opset with BitShift


@dataclass(frozen=True)
class Sliced:
    """A weight seen as [a, b, c]: the slices [a, :, c] have their own levels or scale."""

    a: int
    b: int
    c: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (a, b, c)."""
        return self.a, self.b, self.c


@dataclass(frozen=True)
class Means:
    """What a decoder may be made of: ops of the target, and UINT4 tensors where it has them and the model's opset."""

    opset: int
    runs: Callable[[str], bool] = lambda op: True
    native: bool = True

    @property
    def has_uint4(self) -> bool:
        """Return whether codes of 4 bits may be stored as they are."""
        return self.native and self.opset >= NATIVE


class Form(Protocol):
    """A way to store an array."""

    @property
    def ops(self) -> frozenset[str]:
        """Return the ops that decode it."""
        ...

    @property
    def name(self) -> str:
        """Return its name, for notes."""
        ...

    @property
    def nbytes(self) -> int:
        """Return about how many bytes it adds to the file, nodes included."""
        ...

    def put(self, at: Place) -> ir.Value:
        """Add the constants and nodes; return the value that is the array."""
        ...


@dataclass(frozen=True)
class Place:
    """Where constants and nodes go: before a node. Their names are short, for they are many and are stored too."""

    before: ir.Node
    means: Means

    @property
    def main(self) -> ir.Graph:
        """Return the graph."""
        main = self.before.graph
        assert isinstance(main, ir.Graph)
        return main

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add an initializer."""
        return graph.add_constant(self.main, name, array)

    def shared(self, name: str, array: Array) -> ir.Value:
        """Return the initializer of that name and content, added if there is none."""
        old = self.main.initializers.get(name)
        held = graph.constant(old) if old is not None and not old.is_graph_input() else None
        if old is not None and held is not None and held.dtype == array.dtype and np.array_equal(held, array):
            return old
        return self.constant(name, array)

    def node(self, op: str, inputs: Sequence[ir.Value], **attributes: graph.Attribute) -> ir.Value:
        """Add a node and return its output."""
        made = graph.add_node(op, list(inputs), attributes, before=self.before, base="c").outputs[0]
        made.name = graph.fresh_name(self.main, "c")
        return made


def bits_of(count: int) -> int:
    """Return the bits of a code for that many values.

    >>> [bits_of(count) for count in (1, 2, 3, 16, 17)]
    [1, 1, 2, 4, 5]
    """
    return max(1, (count - 1).bit_length())


def overhead(nodes: int, constants: int) -> int:
    """Return about how many bytes nodes and constants add to a file beside data."""
    return NODE * nodes + CONSTANT * constants


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of that many codes."""
    return -(-count * bits // 8) if bits in (1, 2, 4, 8) else bits * -(-count // 8)


def code_bytes(count: int, bits: int, means: Means | None = None) -> int:
    """Return the bytes that codes add to a file, with what decodes them (by any `means`: with what all have)."""
    if bits == 4 and means is not None and means.has_uint4:
        return packed_bytes(count, bits) + overhead(1, 1)
    nodes, constants = (2, 2) if bits == 8 else (4, 4) if bits in (1, 2, 4) else (4, 5)
    is_whole = bits == 8 or not count % (8 // bits if bits in (1, 2, 4) else 8)
    return packed_bytes(count, bits) + (overhead(nodes, constants) if is_whole else overhead(nodes + 2, constants + 1))


def pack(codes: Array, bits: int) -> Array:
    """Return codes[n] < 2^bits as bytes: [m, 1] side by side, or bit planes [1, bits, m] for odd widths.

    >>> pack(np.array([1, 2, 3]), 4).ravel().tolist()
    [33, 3]
    """
    flat = codes.reshape(-1).astype(np.uint8)
    if bits == 8:
        return flat
    if bits in (1, 2, 4):
        each = 8 // bits
        rows = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
        side: Array = np.bitwise_or.reduce(rows << (bits * np.arange(each)).astype(np.uint8), axis=1)[:, None]
        return side
    eighths = np.pad(flat, (0, -len(flat) % 8)).reshape(8, 1, -1)
    planes = (eighths >> np.arange(bits, dtype=np.uint8)[:, None]) & 1  # [8, bits, m]
    found: Array = np.bitwise_or.reduce(planes << np.arange(8, dtype=np.uint8)[:, None, None], axis=0)[None]
    return found


def unpacked(at: Place, codes: Array, bits: int, shape: Sequence[int], to: int = onnx.TensorProto.INT32) -> ir.Value:
    """Return a value that is the codes of that shape, decoded from bytes."""
    if bits == 4 and at.means.has_uint4:
        native = at.constant("codes", codes.reshape(shape).astype(ml_dtypes.uint4))
        return at.node("Cast", [native], to=to)
    data, count = at.constant("codes", pack(codes, bits)), math.prod(shape)
    if bits == 8:
        return at.node("Cast", [_shaped(at, data, shape, codes.size, count)], to=to)
    if bits in (1, 2, 4):
        each = 8 // bits
        shifted = at.node(
            "BitShift", [data, at.shared(f"shifts{bits}", (bits * np.arange(each)).astype(np.uint8))], direction="RIGHT"
        )
        single = at.node("Mod", [shifted, at.shared(f"base{bits}", np.array(2**bits, np.uint8))])
        return at.node("Cast", [_shaped(at, single, shape, each * data.shape[0], count)], to=to)  # type: ignore[index]
    eight = at.shared("shifts", np.arange(8, dtype=np.uint8)[:, None, None])
    single = at.node(
        "Mod", [at.node("BitShift", [data, eight], direction="RIGHT"), at.shared("base1", np.array(2, np.uint8))]
    )
    powers = at.shared(f"powers{bits}", (2 ** np.arange(bits, dtype=np.uint8))[None])
    whole = at.node("MatMulInteger", [powers, single])
    found = _shaped(at, whole, shape, 8 * data.shape[2], count)  # type: ignore[index]
    return found if to == onnx.TensorProto.INT32 else at.node("Cast", [found], to=to)


def _shaped(at: Place, value: ir.Value, shape: Sequence[int], held: object, count: int) -> ir.Value:
    """Return the first `count` elements of a value in a shape."""
    if held != count:
        value = at.node("Reshape", [value, at.shared("flat", np.array([-1], np.int64))])
        ends = [at.shared(f"at{number}", np.array([number], np.int64)) for number in (0, count)]
        value = at.node("Slice", [value, *ends])
    return at.node("Reshape", [value, at.shared(dims(shape), np.array(shape, np.int64))])


def dims(shape: Sequence[int]) -> str:
    """Return the name of a shape's constant.

    >>> dims((16, 8))
    'd16x8'
    """
    return "d" + "x".join(map(str, shape))


def code_ops(bits: int, means: Means) -> frozenset[str]:
    """Return the ops that decode codes of so many bits."""
    if bits == 4 and means.has_uint4:
        return frozenset({"Cast"})
    if bits == 8:
        return frozenset({"Cast", "Reshape"})
    plain = {"BitShift", "Mod", "Cast", "Reshape", "Slice"}
    return frozenset(plain if bits in (1, 2, 4) else plain | {"MatMulInteger"})
