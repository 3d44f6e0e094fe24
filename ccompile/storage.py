"""Smaller forms of a weight: the same values in fewer bytes of the file, decoded by nodes that fold.

The runtime computes the nodes once, when it opens a session, and then runs at full speed; only the file shrinks.

form       stored                                                 decoded by
codebook   ascending levels[k] and a code per weight              Gather
codebooks  levels[a, k, c] of the slices [a, :, c] of [a, b, c]   GatherElements
grid       integers and a scale per slice                         Cast, Mul
bitmask    one bit per weight, and the weights that are not zero  CumSum, Gather
sparse     index and value of the weights that are not zero       (a sparse initializer)

Codes of 1, 2 and 4 bits lie side by side in bytes (BitShift, Mod), of 4 bits in UINT4 where the model's opset has it,
others as bit planes. `smallest` picks the form of fewest bytes that gives back every bit.
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

LEVELS = 256  # most values of one codebook
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


# ---------------------------------------------------------------------------------------------- codes


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
    return at.node("Reshape", [value, at.shared(_dims(shape), np.array(shape, np.int64))])


def _dims(shape: Sequence[int]) -> str:
    return "d" + "x".join(map(str, shape))


def _code_ops(bits: int, means: Means) -> frozenset[str]:
    """Return the ops that decode codes of so many bits."""
    if bits == 4 and means.has_uint4:
        return frozenset({"Cast"})
    if bits == 8:
        return frozenset({"Cast", "Reshape"})
    plain = {"BitShift", "Mod", "Cast", "Reshape", "Slice"}
    return frozenset(plain if bits in (1, 2, 4) else plain | {"MatMulInteger"})


# ---------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True, eq=False)
class Plain:
    """The array itself."""

    array: Array
    name: str = "plain"
    ops: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the array."""
        return int(self.array.nbytes) + CONSTANT

    def put(self, at: Place) -> ir.Value:
        """Add one constant."""
        return at.constant("values", self.array)


@dataclass(frozen=True, eq=False)
class Codebook:
    """levels[k] and codes of the array's shape, or levels[a, k, c] and codes[a, b, c] in the array's order."""

    levels: Array
    codes: Array
    shape: tuple[int, ...]
    means: Means

    @property
    def bits(self) -> int:
        """Return the bits of a code."""
        return bits_of(self.levels.shape[-2] if self.levels.ndim == 3 else len(self.levels))

    @property
    def ops(self) -> frozenset[str]:
        """Return what decodes codes, and looks them up."""
        table = {"Gather"} if self.levels.ndim == 1 else {"GatherElements", "Reshape"}
        return _code_ops(self.bits, self.means) | table

    @property
    def name(self) -> str:
        """Return what it is, and of how many bits."""
        several = f"{self.levels.shape[0] * self.levels.shape[2]} codebooks" if self.levels.ndim == 3 else "codebook"
        return f"{self.bits}-bit codes, {several}"

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, levels and nodes."""
        levels, halved = _half(self.levels)
        nodes, constants = (1, 1) if self.levels.ndim == 1 else (2, 2)
        return code_bytes(self.codes.size, self.bits, self.means) + levels.nbytes + overhead(nodes + halved, constants)

    def put(self, at: Place) -> ir.Value:
        """Add codes and levels, and what looks them up."""
        levels, halved = _half(self.levels)
        table = at.constant("levels", levels)
        if halved:
            table = at.node("Cast", [table], to=ir.DataType.from_numpy(self.levels.dtype).value)
        if self.levels.ndim == 1:
            return at.node("Gather", [table, unpacked(at, self.codes, self.bits, self.shape)])
        codes = unpacked(at, self.codes, self.bits, self.codes.shape)
        found = at.node("GatherElements", [table, codes], axis=1)
        return at.node("Reshape", [found, at.shared(_dims(self.shape), np.array(self.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Grid:
    """pattern[codes[a, b, c]] times scale[a, 1, c], in the array's order; the pattern ascends."""

    codes: Array
    pattern: Array
    scale: Array
    shape: tuple[int, ...]
    means: Means

    @property
    def bits(self) -> int:
        """Return the bits of a code."""
        return bits_of(len(self.pattern))

    @property
    def is_native(self) -> bool:
        """Return whether the values are the signed integers of an element type."""
        whole = self.bits in (8, 16) or (self.bits == 4 and self.means.has_uint4)
        return whole and np.array_equal(self.pattern, np.arange(len(self.pattern)) - 2 ** (self.bits - 1))

    @property
    def ops(self) -> frozenset[str]:
        """Return what makes floats of codes and scales them."""
        plain = frozenset({"Cast", "Mul", "Reshape"})
        return plain if self.is_native else plain | {"Gather"} | _code_ops(self.bits, self.means)

    @property
    def name(self) -> str:
        """Return the bits of a code and the number of scales."""
        return f"{self.bits}-bit grid, {self.scale.size} scale{'s' * (self.scale.size > 1)}"

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, scales and nodes."""
        scale, halved = _half(self.scale)
        decoder = overhead(2 + halved + (self.shape != self.codes.shape), 1 + (self.shape != self.codes.shape))
        if self.is_native:
            return self.codes.size * self.bits // 8 + CONSTANT + scale.nbytes + decoder
        pattern = len(self.pattern) * self.scale.itemsize + CONSTANT
        return code_bytes(self.codes.size, self.bits, self.means) + pattern + scale.nbytes + decoder

    def put(self, at: Place) -> ir.Value:
        """Add codes or integers, and scales."""
        dtype = ir.DataType.from_numpy(self.scale.dtype).value
        if self.is_native:
            kinds = {4: ml_dtypes.int4, 8: np.int8, 16: np.int16}
            integers = (self.codes.astype(np.int32) - 2 ** (self.bits - 1)).astype(kinds[self.bits])
            whole = at.node("Cast", [at.constant("integers", integers)], to=dtype)
        else:
            pattern = at.constant("pattern", self.pattern.astype(self.scale.dtype))
            whole = at.node("Gather", [pattern, unpacked(at, self.codes, self.bits, self.codes.shape)])
        scale, halved = _half(self.scale)
        factor = at.constant("scale", scale)
        if halved:
            factor = at.node("Cast", [factor], to=dtype)
        scaled = at.node("Mul", [whole, factor])
        if self.shape == self.codes.shape:
            return scaled
        return at.node("Reshape", [scaled, at.shared(_dims(self.shape), np.array(self.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Bitmask:
    """mask[shape], and how the values that are not zero are stored, in order, behind a zero: `values`[1 + nonzero]."""

    mask: Array
    values: Form

    @property
    def ops(self) -> frozenset[str]:
        """Return what decodes the mask, and counts and gathers."""
        return _code_ops(1, Means(OLDEST)) | {"CumSum", "Mul", "Gather"} | self.values.ops

    @property
    def name(self) -> str:
        """Return what it is."""
        return f"bitmask of {int(np.count_nonzero(self.mask))} of {self.mask.size}, {self.values.name}"

    @property
    def nbytes(self) -> int:
        """Return the bytes of mask, values and nodes."""
        return code_bytes(self.mask.size, 1) + self.values.nbytes + overhead(3, 1)  # short names, shared constants

    def put(self, at: Place) -> ir.Value:
        """Add the mask and the values, and what counts and gathers."""
        count = self.mask.size
        bits = unpacked(at, self.mask.reshape(-1), 1, (count,))
        place = at.node("Mul", [at.node("CumSum", [bits, at.shared("axis", np.array(0, np.int64))]), bits])
        found = at.node("Gather", [self.values.put(at), place])
        return at.node("Reshape", [found, at.shared(_dims(self.mask.shape), np.array(self.mask.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Sparse:
    """The array as a sparse initializer."""

    array: Array
    name: str = "sparse initializer"
    ops: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Return the bytes of values and 64-bit indices."""
        return int(np.count_nonzero(self.array)) * (self.array.itemsize + 8) + 2 * CONSTANT

    def put(self, at: Place) -> ir.Value:
        """Add the initializer."""
        value = at.constant("sparse", np.zeros(0, self.array.dtype))
        name, flat = str(value.name), self.array.reshape(-1)
        indices = np.flatnonzero(flat).astype(np.int64)
        proto = onnx.SparseTensorProto(dims=list(self.array.shape))
        proto.values.CopyFrom(onnx.numpy_helper.from_array(flat[indices], name))
        proto.indices.CopyFrom(onnx.numpy_helper.from_array(indices, f"{name}_indices"))
        value.const_value = graph.SparseTensor(proto)
        value.shape = ir.Shape(self.array.shape)
        return value


def _half(levels: Array) -> tuple[Array, bool]:
    """Return levels in float16 when that loses nothing and is worth a node, and whether."""
    if levels.dtype != np.float32 or levels.nbytes <= 2 * NODE:
        return levels, False
    with np.errstate(over="ignore"):
        half = levels.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32).view(np.uint32), levels.view(np.uint32))
    return (half, True) if exact else (levels, False)


# ---------------------------------------------------------------------------------------------- choice


def codebook(array: Array, means: Means, sliced: Sliced | None = None) -> Codebook | None:
    """Return an array as codes into its distinct values, of the whole or of each slice; None if they are too many."""
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return None
    bits = _bits(array)
    if sliced is None:
        levels, codes = np.unique(bits, return_inverse=True)
        if len(levels) > LEVELS:
            return None
        found = levels.view(array.dtype)
        return Codebook(found, codes.reshape(array.shape).astype(np.uint8), array.shape, means)
    cube = bits.reshape(sliced.shape)
    order = np.argsort(cube, axis=1, kind="stable")
    ranked = np.take_along_axis(cube, order, 1)
    step = np.concatenate([np.zeros((sliced.a, 1, sliced.c), bool), ranked[:, 1:] != ranked[:, :-1]], axis=1)
    rank = np.cumsum(step, axis=1)
    most = int(rank.max()) + 1
    if most > LEVELS:
        return None
    tables = np.zeros((sliced.a, most, sliced.c), bits.dtype)
    np.put_along_axis(tables, rank, ranked, 1)
    cells = np.empty_like(rank)
    np.put_along_axis(cells, order, rank, 1)
    return Codebook(tables.view(array.dtype), cells.astype(np.uint8), array.shape, means)


def bitmask(array: Array, means: Means) -> Bitmask | None:
    """Return an array as a mask and its values; None when no value is +0."""
    mask = _bits(array) != 0
    if mask.all():
        return None
    values = np.concatenate([np.zeros(1, array.dtype), array[mask]])
    return Bitmask(mask, min_form([Plain(values), codebook(values, means)]))


def sparse(array: Array) -> Sparse | None:
    """Return an array as a sparse initializer; None when it has a -0, which that would lose, or is of another type."""
    if array.dtype not in (np.float32, np.float64) or (_bits(array)[array == 0] != 0).any() or not array.any():
        return None
    return Sparse(array)


def smallest(array: Array, means: Means, sliced: Sequence[Sliced] = (), more: Sequence[Form] = ()) -> Form:
    """Return the form of fewest bytes that gives an array back bit by bit; `more`: others that do."""
    if means.opset < OLDEST or array.dtype.name not in ("float16", "float32", "float64"):
        return min_form([Plain(array), *more])
    tables = [codebook(array, means, each) for each in (None, *sliced)]
    forms = [*tables, bitmask(array, means), sparse(array), *more]
    return min_form([Plain(array), *(form for form in forms if form is not None and all(map(means.runs, form.ops)))])


def min_form(forms: Sequence[Form | None]) -> Form:
    """Return the form of fewest bytes, of equals the first."""
    return min((form for form in forms if form is not None), key=lambda form: form.nbytes)


def _bits(array: Array) -> Array:
    """Return the bits of floats as unsigned integers: -0 and 0 differ."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)


def replace_weight(node: ir.Node, index: int, form: Form, means: Means) -> ir.Value:
    """Let a node read a weight in another form, under the weight's name; what only held the old one goes."""
    old = node.inputs[index]
    assert old is not None
    held = graph.constant(old)
    assert held is not None
    if isinstance(form, Plain):
        return old
    found = form.put(Place(node, means))
    found.shape, found.type = ir.Shape(held.shape), ir.TensorType(ir.DataType.from_numpy(held.dtype))
    node.replace_input_with(index, found)
    main, name = node.graph, str(old.name)
    assert isinstance(main, ir.Graph)
    if old.is_initializer() and not list(old.uses()) and not old.is_graph_output():
        main.initializers.pop(name)
        if not found.is_initializer():
            found.name = name
    return found


def replace_value(value: ir.Value, form: Form, means: Means) -> ir.Value:
    """Let all readers of an initializer of the main graph read it in another form, under its name."""
    held, name, main = graph.constant(value), str(value.name), value.graph
    assert held is not None
    assert isinstance(main, ir.Graph)
    readers = {use.node for use in value.uses()}
    first = next(node for node in main if node in readers)
    found = form.put(Place(first, means))
    found.shape, found.type = ir.Shape(held.shape), ir.TensorType(ir.DataType.from_numpy(held.dtype))
    value.replace_all_uses_with(found)
    main.initializers.pop(name)
    if not found.is_initializer():
        found.name = name
    return found


def is_lossless(value: ir.Value | None) -> bool:
    """Return whether a weight that one node reads stands in a form that gives back every bit, as those here."""
    chain = graph.stored_chain(value)
    if value is None or not chain or len(list(value.uses())) > 1 or value.is_graph_output():
        return False
    return all(node.op_type in _DECODERS for node in chain)


_DECODERS = frozenset(
    {
        "BitShift",
        "Mod",
        "Cast",
        "Reshape",
        "Slice",
        "Mul",
        "MatMulInteger",
        "Gather",
        "GatherElements",
        "CumSum",
        "Range",
        "Add",
    }
)


def stored_bytes(value: ir.Value | None) -> int:
    """Return the bytes of all that a constant value is made of."""
    leaves: dict[ir.Value, int] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each is None or each in leaves:
            continue
        tensor = graph.stored(each)
        if tensor is not None:
            leaves[each] = int(tensor.nbytes)
        elif (node := each.producer()) is not None:
            waiting += list(node.inputs)
    return sum(leaves.values())
