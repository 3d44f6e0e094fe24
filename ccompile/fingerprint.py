"""What runs fed and put out, in few numbers that a later run can be held against: digests, sketches, statistics."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ccompile.comparison import class_axis
from ccompile.numerics import sketch
from ccompile.tolerance import is_inexact

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.runtime import Outputs


@dataclass(eq=False)
class OutputPrint:
    """One output over all batches, in order.

    `values` sketches its finite floats, and `norm` is |y| of them; `decisions` sketches the largest class of each row,
    or each element of an output that is no float, of which there are `positions`. `strange` counts NaN and infinity.
    `digest` is the SHA-256 of all of it, bit by bit.
    """

    name: str
    dtype: str = ""
    elements: int = 0
    strange: int = 0
    positions: int = 0
    squares: float = 0.0
    values: Array = field(default_factory=lambda: np.zeros(sketch.BUCKETS))
    decisions: Array = field(default_factory=lambda: np.zeros(sketch.BUCKETS))
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    @property
    def norm(self) -> float:
        """Return |y|, of finite elements."""
        return math.sqrt(self.squares)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what was added, in hexadecimal."""
        found: str = self._digest.hexdigest()
        return found

    def add(self, value: Any) -> None:
        """Add one batch; sequences add their elements, maps their values by key, an absent value its absence."""
        if isinstance(value, list):
            self._digest.update(b"[%d" % len(value))
            for item in value:
                self.add(item)
        elif isinstance(value, dict):
            self._digest.update(json.dumps([str(key) for key in value]).encode())
            self.add(np.array(list(value.values())))
        elif value is None:
            self._digest.update(b"absent")
        else:
            self._array(np.asarray(value))

    def _array(self, array: Array) -> None:
        self.dtype = self.dtype or str(array.dtype)
        self._digest.update(f"{array.dtype} {array.shape} ".encode())
        start = self.elements
        self.elements += array.size
        if array.dtype.kind in "OSU":
            texts = [str(text).encode() for text in array.reshape(-1)]
            self._digest.update(b"".join(b"%d:%b" % (len(text), text) for text in texts))
            self._decide(np.array([zlib.crc32(text) for text in texts], np.uint64))
            return
        self._digest.update(np.ascontiguousarray(array).tobytes())
        if not is_inexact(str(array.dtype)):
            self._decide(array.astype(np.int64).view(np.uint64).reshape(-1))
            return
        floats = array if array.dtype.kind == "c" else array.astype(np.float64)
        parts = np.stack([floats.real, floats.imag], -1) if array.dtype.kind == "c" else floats
        finite = np.isfinite(parts)
        self.strange += int(parts.size - np.count_nonzero(finite))
        kept = np.where(finite, parts, 0.0)
        width = 2 if array.dtype.kind == "c" else 1
        self.values += sketch.sketch_run(start * width, kept)
        self.squares += float(np.vdot(kept, kept))
        if (axis := class_axis(array)) is not None:
            self._decide(kept.argmax(axis).reshape(-1).astype(np.uint64))

    def _decide(self, words: Array) -> None:
        self.decisions += sketch.sketch_pairs(self.positions, words)
        self.positions += words.size


def prints_of(outputs: Iterable[Outputs]) -> list[OutputPrint]:
    """Return what a model put out, output by output."""
    found: dict[str, OutputPrint] = {}
    for batch in outputs:
        for name, value in batch.items():
            found.setdefault(name, OutputPrint(name)).add(value)
    return list(found.values())


@dataclass(eq=False)
class InputPrint:
    """One input over all samples: a digest, and its distribution per channel (one channel where it is no image).

    low[c], high[c], mean[c], std[c]; spread[c] is the standard deviation of the samples' own means.
    """

    name: str
    dtype: str = ""
    samples: int = 0
    low: Array | None = None
    high: Array | None = None
    _sum: Array | None = None
    _squares: Array | None = None
    _means: Array | None = None
    _count: int = 0
    _rows: int = 0
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what was added, however it was cut into batches, in hexadecimal."""
        found: str = self._digest.hexdigest()
        return found

    @property
    def mean(self) -> Array:
        """Return mean[c]."""
        assert self._sum is not None
        found: Array = self._sum / self._count
        return found

    @property
    def std(self) -> Array:
        """Return std[c]."""
        assert self._squares is not None
        found: Array = np.sqrt(np.maximum(self._squares / self._count - self.mean**2, 0))
        return found

    @property
    def spread(self) -> Array:
        """Return the standard deviation over samples of a sample's mean, by channel."""
        assert self._means is not None
        first, second = self._means / self._rows
        found: Array = np.sqrt(np.maximum(second - first**2, 0))
        return found

    @property
    def has_statistics(self) -> bool:
        """Return whether it held numbers of one layout."""
        return self._count > 0 and self.low is not None

    def add(self, value: Any, samples: int) -> None:
        """Add one batch of `samples` samples; what is no array of numbers is only digested."""
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OSUbc" or not value.size:
            self._digest.update(repr(type(value)).encode() + _bytes_of(value))
            return
        self.dtype = self.dtype or str(value.dtype)
        rows = value if value.ndim and len(value) == samples else value[None]
        self.samples += len(rows)
        self._digest.update(f"{value.dtype} {rows.shape[1:]}".encode() if not self._count else b"")
        self._digest.update(np.ascontiguousarray(rows).tobytes())
        self._statistics(_by_channel(rows.astype(np.float64)))

    def _statistics(self, x: Array) -> None:
        """Add x[sample, channel, place]."""
        if self.low is not None and len(self.low) != x.shape[1]:
            return
        low, high, total, squares, rows = x.min((0, 2)), x.max((0, 2)), x.sum((0, 2)), (x * x).sum((0, 2)), x.mean(2)
        means = np.stack([rows.sum(0), (rows**2).sum(0)])
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self._sum = total if self._sum is None else self._sum + total
        self._squares = squares if self._squares is None else self._squares + squares
        self._means = means if self._means is None else self._means + means
        self._count += x.shape[0] * x.shape[2]
        self._rows += x.shape[0]


def _by_channel(x: Array) -> Array:
    """Return x[sample, channel, place]: images have two to four channels, on axis 1 or last; all else has one."""
    if x.ndim == 4 and 2 <= x.shape[1] <= 4:
        return x.reshape(*x.shape[:2], -1)
    if x.ndim == 4 and 2 <= x.shape[3] <= 4:
        return np.moveaxis(x, 3, 1).reshape(x.shape[0], x.shape[3], -1)
    return x.reshape(x.shape[0], 1, -1)


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, list):
        return b"".join(map(_bytes_of, value))
    if value is None:
        return b""
    array = np.asarray(value)
    return json.dumps(array.tolist(), default=repr).encode() if array.dtype.kind in "OSU" else array.tobytes()


class Inputs:
    """Watches the inputs of a run, batch by batch."""

    def __init__(self) -> None:
        self._found: dict[str, InputPrint] = {}

    def add(self, feeds: Mapping[str, Any], samples: int) -> None:
        """Look at one batch."""
        for name, value in feeds.items():
            self._found.setdefault(name, InputPrint(name)).add(value, samples)

    @property
    def prints(self) -> list[InputPrint]:
        """Return what was fed, by name."""
        return [self._found[name] for name in sorted(self._found)]
