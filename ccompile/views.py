"""Views of a tensor's bytes: the streams of symbols that entropy coders do best on, and the way back.

A tensor is a run of elements of 1, 2, 4 (low bits first), 8, 16, 32 or 64 bits, or of 3, 5, 6 or 7 bits in planes, as
`decoding.pack` lays codes out: plane b holds bit b of all elements, byte j of it those of elements j, m + j, 2 m + j...
A *sparse* view takes the commonest
element out: one bit per element says where others stand (Deep Compression's positions), and only those are kept. What
is kept is then whole bytes, or *spread*: a byte for each element below 8 bits, a stream for each byte of a wider one
(its exponents compress, its last bits do not). A *turned* view of floats moves the sign behind the last bit first, so
that the exponent of float32 is one byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ccompile.core import Array

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 3, 5, 6, 7)
PLANES = (3, 5, 6, 7)  # bits of elements that are stored in planes
_NARROW = 8  # bits: elements below a byte, and a byte


@dataclass(frozen=True)
class View:
    """How elements of `width` bits become streams."""

    width: int = 8
    sparse: bool = False
    spread: bool = False
    turned: bool = False

    @property
    def number(self) -> int:
        """Return what stands for the view in a file.

        >>> View.of(View(32, spread=True).number)
        View(width=32, sparse=False, spread=True, turned=False)
        """
        return WIDTHS.index(self.width) | self.sparse << 4 | self.spread << 5 | self.turned << 6

    @classmethod
    def of(cls, number: int) -> View:
        """Return the view of a number. Raises ValueError when there is none."""
        if number >> 7 or number & 15 >= len(WIDTHS):
            raise ValueError(f"there is no view {number}")
        view = cls(WIDTHS[number & 15], bool(number & 16), bool(number & 32), bool(number & 64))
        if not view.is_sensible:
            raise ValueError(f"there is no view {number}")
        return view

    @property
    def is_sensible(self) -> bool:
        """Return whether the view differs from all simpler ones."""
        if self.packing == _NARROW:
            return not (self.spread or self.turned)
        return not self.turned or (self.width > _NARROW and self.spread)

    @property
    def packing(self) -> int:
        """Return the bits that an element takes in a stream that is not spread."""
        return self.width if self.width not in PLANES else 4 if self.width < 4 else _NARROW

    @property
    def streams(self) -> int:
        """Return the number of streams."""
        return self.sparse + (self.width // 8 if self.spread and self.width > _NARROW else 1)

    def __str__(self) -> str:
        spread = ("turned planes" if self.turned else "planes") if self.width > _NARROW else "one per byte"
        parts = [f"{self.width}-bit"] + ["sparse"] * self.sparse + [spread] * self.spread
        return " ".join(parts) if parts != ["8-bit"] else "bytes"


def candidates(width: int, size: int, is_float: bool, planes: int = 1) -> Iterator[View]:
    """Yield the views worth a trial on `size` bytes of elements of `width` bits, the simplest first.

    planes: of bits, if bytes may hold codes in planes. Bytes are tried as several packed indices, too; those are not
    tried as a byte each below 4 bits, which takes much time and serves coders that look for repetitions only.
    """
    yield View()
    if width > _NARROW:
        if size % (width // 8) == 0:
            turned = (False, True) if is_float else (False,)
            yield from (View(width, sparse, True, turn) for sparse in (False, True) for turn in turned)
    elif width == _NARROW:
        yield View(8, sparse=True)
        yield from (View(4, spread=True), View(4, sparse=True), View(4, sparse=True, spread=True))
        yield from (View(2, sparse=True), View(1, sparse=True))
        if planes in PLANES and size % planes == 0:
            ways = (View(planes, sparse, spread) for sparse in (False, True) for spread in (False, True))
            yield from (view for view in ways if view.is_sensible)
    elif width > 1:
        yield from (View(width, spread=True), View(width, sparse=True), View(width, sparse=True, spread=True))


def separate(data: Array, view: View) -> tuple[int, list[Array]]:
    """Return the commonest element (0 unless the view is sparse) and the streams of data[n] uint8.

    A wide element counts as the commonest only when it is zero: sparse views of floats are for pruned weights.
    """
    if view == View():
        return 0, [data]
    elements, filler, streams = elements_of(data, view.width), 0, []
    if view.sparse:
        filler = int(np.bincount(elements, minlength=1).argmax()) if view.width <= _NARROW else 0
        kept = elements != filler
        streams.append(np.packbits(kept, bitorder="little"))
        elements = elements[kept]
    return filler, streams + _written(elements, view)


def join(filler: int, size: int, view: View, read: Callable[[int, int], Array]) -> Array:
    """Return the data[size] uint8 that `separate` took apart; read(index, length) gives a stream.

    Raises ValueError when the size is no whole number of elements or the filler no element.
    """
    if view == View():
        return read(0, size)
    if size * 8 % view.width or (view.width in PLANES and size % view.width) or filler >> min(view.width, _NARROW):
        raise ValueError(f"{size} bytes with filler {filler} are no {view} data")
    count = size * 8 // view.width
    if not view.sparse:
        return _bytes_of(_read(count, view, read), view.width)
    kept = np.unpackbits(read(0, -(-count // 8)), count=count, bitorder="little").view(bool)
    values = _read(int(np.count_nonzero(kept)), view, lambda index, length: read(index + 1, length))
    elements = np.full(count, filler, values.dtype)
    elements[kept] = values
    return _bytes_of(elements, view.width)


def elements_of(data: Array, width: int) -> Array:
    """Return the elements of data[n] uint8 as unsigned integers; those below a byte one per byte."""
    if width > _NARROW:
        return data.view(f"<u{width // 8}")
    if width in PLANES:
        found = np.zeros((8, data.size // width), np.uint8)
        for place, plane in enumerate(data.reshape(width, -1)):
            for row in range(8):
                found[row] |= (plane >> np.uint8(row) & 1) << np.uint8(place)
        return found.reshape(-1)
    return data if width == _NARROW else _SPREAD[width][data].view(np.uint8)


def _bytes_of(elements: Array, width: int) -> Array:
    """Return the bytes of elements, the inverse of `elements_of`; a last byte that is not full ends in zeros."""
    if width >= _NARROW:
        return elements.view(np.uint8)
    if width in PLANES:
        rows = elements.reshape(8, -1)
        planes = np.zeros((width, rows.shape[1]), np.uint8)
        for place, plane in enumerate(planes):
            for row in range(8):
                plane |= (rows[row] >> np.uint8(place) & 1) << np.uint8(row)
        return planes.reshape(-1)
    per_byte = 8 // width
    padded = np.concatenate([elements, np.zeros(-elements.size % per_byte, np.uint8)])
    found = padded[::per_byte].copy()
    for place in range(1, per_byte):
        found |= padded[place::per_byte] << np.uint8(place * width)
    return found


def _spread_table(width: int) -> Array:
    """Return table[byte]: its elements of `width` bits, one per byte, as one integer of 8 / width bytes."""
    symbols = np.arange(256)[:, None] >> np.arange(0, 8, width) & (1 << width) - 1
    return symbols.astype(np.uint8).view(f"<u{8 // width}").reshape(-1)


_SPREAD = {width: _spread_table(width) for width in (1, 2, 4)}


def _written(elements: Array, view: View) -> list[Array]:
    """Return the streams of the elements that are kept."""
    if view.width <= _NARROW:
        return [elements if view.spread else _bytes_of(elements, view.packing)]
    if not view.spread:
        return [elements.view(np.uint8)]
    if view.turned:
        elements = elements << 1 | elements >> (view.width - 1)
    planes = elements.view(np.uint8).reshape(-1, view.width // 8)
    return [np.ascontiguousarray(planes[:, place]) for place in range(planes.shape[1])]


def _read(count: int, view: View, read: Callable[[int, int], Array]) -> Array:
    """Return the `count` elements that `_written` wrote."""
    if view.width <= _NARROW:
        if view.spread:
            return read(0, count)
        return elements_of(read(0, -(-count * view.packing // 8)), view.packing)[:count]
    kind = np.dtype(f"<u{view.width // 8}")
    if not view.spread:
        return read(0, count * kind.itemsize).view(kind)
    planes = np.empty((count, kind.itemsize), np.uint8)
    for place in range(kind.itemsize):
        planes[:, place] = read(place, count)
    elements = planes.reshape(-1).view(kind)
    return elements >> 1 | elements << (view.width - 1) if view.turned else elements
