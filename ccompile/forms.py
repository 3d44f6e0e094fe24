"""The forms in which a weight is stored, each of which gives back every bit (see storage for the choice)."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from ccompile import onnx_io
from ccompile.core import Array
from ccompile.decoding import (
    CONSTANT,
    NODE,
    OLDEST,
    Form,
    Means,
    Place,
    bits_of,
    code_bytes,
    code_ops,
    dims,
    overhead,
    unpacked,
)


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
        return code_ops(self.bits, self.means) | table

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
        return at.node("Reshape", [found, at.shared(dims(self.shape), np.array(self.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Blocks:
    """vectors[k, v] and codes[rows, blocks] of an array whose rows (columns, where `turned`) fall into such blocks."""

    vectors: Array
    codes: Array
    shape: tuple[int, ...]
    turned: bool
    means: Means

    @property
    def bits(self) -> int:
        """Return the bits of a code."""
        return bits_of(len(self.vectors))

    @property
    def ops(self) -> frozenset[str]:
        """Return what decodes codes, looks them up and arranges them."""
        return code_ops(self.bits, self.means) | {"Gather", "Reshape"} | ({"Transpose"} if self.turned else set())

    @property
    def name(self) -> str:
        """Return what it is, and of how many bits."""
        return f"{self.bits}-bit codes of blocks of {self.vectors.shape[1]}, codebook"

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes, vectors and nodes."""
        vectors, halved = _half(self.vectors)
        decoder = overhead(2 + halved + self.turned, 2)
        return code_bytes(self.codes.size, self.bits, self.means) + vectors.nbytes + decoder

    def put(self, at: Place) -> ir.Value:
        """Add codes and vectors, and what looks them up."""
        vectors, halved = _half(self.vectors)
        table = at.constant("vectors", vectors)
        if halved:
            table = at.node("Cast", [table], to=ir.DataType.from_numpy(self.vectors.dtype).value)
        found = at.node("Gather", [table, unpacked(at, self.codes, self.bits, self.codes.shape)])
        rows = (len(self.codes), self.codes.shape[1] * self.vectors.shape[1])
        shape = rows if self.turned else self.shape
        found = at.node("Reshape", [found, at.shared(dims(shape), np.array(shape, np.int64))])
        return at.node("Transpose", [found], perm=[1, 0]) if self.turned else found


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
        return plain if self.is_native else plain | {"Gather"} | code_ops(self.bits, self.means)

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
        return at.node("Reshape", [scaled, at.shared(dims(self.shape), np.array(self.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Bitmask:
    """mask[shape], and how the values that are not zero are stored, in order, behind a zero: `values`[1 + nonzero]."""

    mask: Array
    values: Form

    @property
    def ops(self) -> frozenset[str]:
        """Return what decodes the mask, and counts and gathers."""
        return code_ops(1, Means(OLDEST)) | {"CumSum", "Mul", "Gather"} | self.values.ops

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
        return at.node("Reshape", [found, at.shared(dims(self.mask.shape), np.array(self.mask.shape, np.int64))])


@dataclass(frozen=True, eq=False)
class Outliers:
    """A codebook's array, but values[n] at the ascending places where[n] of it, which are stored as gaps."""

    table: Codebook
    where: Array
    values: Array

    @property
    def _gaps(self) -> Array:
        gaps = np.diff(self.where, prepend=0)
        return gaps.astype(np.uint8 if gaps.max() < 256 else np.uint16 if gaps.max() < 65_536 else np.int32)

    @property
    def ops(self) -> frozenset[str]:
        """Return what decodes the codebook's array, and what puts the others in."""
        return self.table.ops | {"Cast", "CumSum", "Reshape", "ScatterElements"}

    @property
    def name(self) -> str:
        """Return what it is, and how many there are."""
        return f"{self.table.name}, {len(self.where)} outliers"

    @property
    def nbytes(self) -> int:
        """Return the bytes of the codebook's array, gaps, values and nodes."""
        values, halved = _half(self.values)
        return self.table.nbytes + self._gaps.nbytes + values.nbytes + overhead(5 + halved, 3)

    def put(self, at: Place) -> ir.Value:
        """Add the codebook's array, gaps and values, and what puts them in."""
        shape, flat = self.table.shape, at.shared("flat", np.array([-1], np.int64))
        values, halved = _half(self.values)
        others = at.constant("outliers", values)
        if halved:
            others = at.node("Cast", [others], to=ir.DataType.from_numpy(self.values.dtype).value)
        gaps = at.node("Cast", [at.constant("gaps", self._gaps)], to=onnx.TensorProto.INT32)
        where = at.node("CumSum", [gaps, at.shared("axis", np.array(0, np.int64))])
        array = at.node("Reshape", [self.table.put(at), flat])
        found = at.node("ScatterElements", [array, where, others], axis=0)
        return at.node("Reshape", [found, at.shared(dims(shape), np.array(shape, np.int64))])


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
        value.const_value = onnx_io.SparseTensor(proto)
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
