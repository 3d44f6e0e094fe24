"""Which elements of a sparse tensor are kept: the gaps between them, with codes of their own for lines of like density.

Deep Compression stores gaps between kept elements (relative indices). In real networks the density of kept elements
differs from one input of a layer to the next (a pixel that is always dark needs no weight), and they stand in groups.
So a tensor [..., outer, inner] is looked at as `outer` lines, lines of like density make a class, and each class has
its elements in a row, along its lines or *across* them, and codes their gaps: a byte each, 255 for as many elements
without a kept one. One class of one line, the whole tensor, is a way, too.

    varint outer, varint inner, varint (2 classes + across) | coded class of each line | of each class its elements

The elements of a class are varint 0; or varint 2 n and n gaps; or varint 1 and bits, where a class is dense. Gaps, bits
and classes are coded: a coder, the length as varint, and the bytes.
Source: Han et al. 2016, arXiv:1510.00149, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ccompile import coders
from ccompile.coders import HUFFMAN, STORED, ZSTD
from ccompile.numerics.densities import partitions
from ccompile.wire import Buffer, encode_varint, varint

if TYPE_CHECKING:
    from ccompile.core import Array

_FILLER = 255
_MOST_LINES = 1 << 16
_MOST_CLASSES = 4
_SPARSE = 10  # elements for each that is kept, from which on bits are not tried
_TRIAL, _QUICK = (STORED, HUFFMAN), (STORED, HUFFMAN, ZSTD)


@dataclass(frozen=True)
class _Way:
    """A way to look at the tensor; labels: the class of each line."""

    outer: int
    inner: int
    across: bool
    labels: Array

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def encode(mask: bytes, shape: Sequence[int]) -> bytes:
    """Return the shortest coded form of a mask, low bits first; shape: the tensor's, if it has as many elements."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return _written(bits, min(_ways(bits, shape), key=lambda way: len(_written(bits, way, _TRIAL))), _QUICK)


def _ways(bits: Array, shape: Sequence[int]) -> Iterator[_Way]:
    """Yield the whole in a row, and lines along each axis, and along all axes behind the first, in classes."""
    yield _Way(1, 1, False, np.zeros(1, np.int64))
    if not math.prod(shape) or not 0 <= bits.size - math.prod(shape) < 8:
        return
    inners = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    lines = {*zip(shape, inners, strict=True)} | {(inner, 1) for inner in inners[:1]}
    for outer, inner in sorted(lines):
        if 1 < outer <= _MOST_LINES and outer * inner <= bits.size:
            grid = _grid(bits, outer, inner)
            for labels in partitions(grid.sum((0, 2), dtype=np.int64), grid.shape[0] * inner, _MOST_CLASSES):
                yield _Way(outer, inner, True, labels)
                yield _Way(outer, inner, False, labels)


def _written(bits: Array, way: _Way, among: Sequence[int]) -> bytes:
    grid = _grid(bits, way.outer, way.inner)
    parts = [encode_varint(number) for number in (way.outer, way.inner, 2 * way.classes + way.across)]
    parts.append(_with_length(way.labels.astype(np.uint8).tobytes(), among))
    for label in range(way.classes):
        block = grid[:, way.labels == label]
        parts.append(_class((block.transpose(2, 0, 1) if way.across else block).reshape(-1), among))
    return b"".join(parts)


def _class(bits: Array, among: Sequence[int]) -> bytes:
    """Return the elements of a class: nothing, their gaps, or bits, the shorter."""
    entries = _gaps(bits)
    if not entries:
        return encode_varint(0)
    gaps = encode_varint(2 * len(entries)) + _with_length(entries, among)
    if bits.size > _SPARSE * len(entries):
        return gaps
    return min(gaps, encode_varint(1) + _with_length(np.packbits(bits, bitorder="little").tobytes(), among), key=len)


def _grid(bits: Array, outer: int, inner: int) -> Array:
    """Return the bits as [rows, outer, inner], the last row filled up with zeros."""
    padded = np.append(bits, np.zeros(-bits.size % (outer * inner), np.uint8))
    return padded.reshape(-1, outer, inner)


def _gaps(bits: Array) -> bytes:
    gaps = np.diff(np.flatnonzero(bits), prepend=-1) - 1
    fillers = gaps // _FILLER
    entries = np.full(gaps.size + int(fillers.sum()), _FILLER, np.uint8)
    entries[np.arange(gaps.size) + np.cumsum(fillers)] = gaps % _FILLER
    return entries.tobytes()


def _with_length(data: bytes, among: Sequence[int]) -> bytes:
    coded = coders.smallest(data, among)
    return bytes([coded.coder]) + encode_varint(coded.cost) + coded.data


def decode(data: bytes, size: int) -> bytes:
    """Return the mask of `size` bytes. Raises ValueError when the data are not of such a mask."""
    reader = _Reader(memoryview(data))
    outer, inner, (count, across) = reader.number(), reader.number(), divmod(reader.number(), 2)
    if not 0 < outer * inner <= max(8 * size, 1) or not count:
        raise ValueError(f"{outer} lines of {inner} in {size} bytes of bits")
    labels = np.frombuffer(reader.coded(outer), np.uint8)
    if labels.max() >= count:
        raise ValueError("a line is in a class that is not there")
    rows = -(-8 * size // (outer * inner))
    grid = np.zeros((rows, outer, inner), np.uint8)
    for label in range(count):
        (entries, is_packed), lines = divmod(reader.number(), 2), labels == label
        if entries or is_packed:
            held = int(np.count_nonzero(lines))
            bits = (_packed if is_packed else _from_gaps)(reader, entries, rows * held * inner)
            along = bits.reshape(inner, rows, held).transpose(1, 2, 0) if across else bits.reshape(rows, held, inner)
            grid[:, lines] = along
    reader.finish()
    return np.packbits(grid.reshape(-1), bitorder="little")[:size].tobytes()


def _packed(reader: _Reader, entries: int, length: int) -> Array:
    """Return the next class's `length` bits, stored as such."""
    if entries:
        raise ValueError(f"{entries} gaps and bits")
    data = np.frombuffer(reader.coded(-(-length // 8)), np.uint8)
    return np.unpackbits(data, count=length, bitorder="little")


def _from_gaps(reader: _Reader, entries: int, length: int) -> Array:
    """Return the next class's `length` bits, stored as gaps."""
    if entries > length:
        raise ValueError(f"{entries} gaps in {length} bits")
    gaps = np.frombuffer(reader.coded(entries), np.uint8)
    ends = np.cumsum(gaps + (gaps != _FILLER).astype(np.int64))
    if ends[-1] > length:
        raise ValueError(f"gaps of {ends[-1]} in {length} bits")
    bits = np.zeros(length, np.uint8)
    bits[ends[gaps != _FILLER] - 1] = 1
    return bits


class _Reader:
    """Reads numbers and coded streams one after the other. Raises ValueError at the end of the data."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """Return the next number."""
        try:
            found, self._at = varint(self._data, self._at)
        except IndexError as error:
            raise ValueError("it is truncated") from error
        return found

    def coded(self, size: int) -> bytes:
        """Return the next stream, of `size` bytes."""
        coder, length = self.number(), self.number()
        if coder not in _QUICK:
            raise ValueError(f"coder {coder} inside positions")
        start, self._at = self._at, self._at + length
        return coders.decode(bytes(self._data[start : self._at]), coder, size)

    def finish(self) -> None:
        """Raise ValueError when something is left."""
        if self._at != len(self._data):
            raise ValueError("it is longer than what it tells")
