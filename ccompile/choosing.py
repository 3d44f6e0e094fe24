"""Which view and which coders make a tensor smallest, of those that decode fast enough.

Views are ranked by quick coders; the best few are coded by all. Of large tensors a sample decides.
LZMA decodes slowly, by the bytes that it reads: it is taken only for streams whose coded bytes are few against the
float32 weights that the tensor stands for (docs/decisions.md says what was measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ccompile import coders, positions, views
from ccompile.coders import FIRST_LZMA, GENERAL, HUFFMAN, POSITIONS, STORED, Coded
from ccompile.views import View

if TYPE_CHECKING:
    from ccompile.core import Array

_LZMA_SHARE = 16  # float32 bytes for each byte that LZMA reads: 200 MB/s at 12.5 MB/s of coded bytes
_WHOLE = 1 << 20  # bytes: larger tensors are sampled
_SLICES, _SLICE = 4, 1 << 16
_FINALISTS = 2
_STREAM = 4  # bytes in the index for each stream


@dataclass(frozen=True)
class Choice:
    """A tensor's view and its coded streams."""

    view: View
    filler: int
    streams: tuple[Coded, ...]

    @property
    def cost(self) -> int:
        """Return the bytes that it takes, about."""
        return sum(len(stream.data) + _STREAM for stream in self.streams)


def choose_text(data: bytes) -> Choice:
    """Return the smallest form of bytes that are no weights: any coder will do."""
    return Choice(View(), 0, (coders.smallest(data, GENERAL),))


def choose(data: Array, width: int, is_float: bool, shape: Sequence[int] = (), decoded: Sequence[int] = ()) -> Choice:
    """Return the smallest form of a tensor's bytes data[n] uint8, of elements of `width` bits.

    shape: of the tensor; decoded: of what its codes are decoded to, where bytes hold several codes.
    """
    planes = shape[1] if width == 8 and len(shape) == 3 and shape[0] == 1 and shape[1] in views.PLANES else 1
    planes = planes if data.size % planes == 0 else 1
    found = list(views.candidates(width, data.size, is_float, planes))
    sample = _sample(data, planes)
    weights = 4 * sample.size * 8 // width
    found.sort(key=lambda view: _coded(sample, view, (STORED, HUFFMAN), weights).cost)  # stable: the simplest first
    finalists = [_coded(sample, view, GENERAL, weights) for view in found[:_FINALISTS]]
    if sample is data:
        return min(
            (_positioned(choice, data, decoded or shape) for choice in finalists), key=lambda choice: choice.cost
        )
    best = min(finalists, key=lambda choice: choice.cost)
    filler, streams = views.separate(data, best.view)
    pairs = zip(streams, best.streams, strict=True)
    coded = tuple(coders.smallest(_bytes(stream), {STORED, like.coder}) for stream, like in pairs)
    return _positioned(Choice(best.view, filler, coded), data, decoded or shape)


def _positioned(choice: Choice, data: Array, shape: Sequence[int]) -> Choice:
    """Return the choice with its positions coded as such, where that is smaller."""
    if not choice.view.sparse:
        return choice
    mask, *others = choice.streams
    coded = Coded(POSITIONS, positions.encode(_bytes(views.separate(data, choice.view)[1][0]), shape))
    return replace(choice, streams=(coded, *others)) if coded.cost < mask.cost else choice


def _bytes(stream: Array) -> bytes:
    return np.ascontiguousarray(stream).tobytes()


def _sample(data: Array, planes: int) -> Array:
    """Return the data, or slices of it from end to end, the same of each plane."""
    if data.size <= _WHOLE:
        return data
    rows = data.reshape(planes, -1)
    width = _SLICE // planes // 64 * 64
    starts = np.linspace(0, (rows.shape[1] - width) // 64, _SLICES).astype(np.int64) * 64
    return np.concatenate([rows[:, start : start + width] for start in starts], axis=1).reshape(-1)


def _coded(data: Array, view: View, among: Sequence[int], weights: int) -> Choice:
    """Return the smallest form under a view; weights: the bytes of the float32 weights that the data stand for."""
    filler, streams = views.separate(data, view)
    share = weights // view.streams
    return Choice(view, filler, tuple(_smallest(_bytes(stream), among, share) for stream in streams))


def _smallest(stream: bytes, among: Sequence[int], weights: int) -> Coded:
    quick = coders.smallest(stream, [coder for coder in among if coder < FIRST_LZMA])
    slow = [coder for coder in among if coder >= FIRST_LZMA]
    if not slow or quick.cost * _LZMA_SHARE > 2 * weights:  # LZMA does not halve what the others leave
        return quick
    best = coders.smallest(stream, slow)
    return best if best.cost < quick.cost and best.cost * _LZMA_SHARE <= weights else quick
