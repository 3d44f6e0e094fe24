"""What did the outputs do: comparison against a reference, streamed batch by batch in float64 sums.

The reference is always the second operand: the source model's or the previous step's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ccompile.tolerance import EXACT_RELATIVE_L2, EXACT_SHARE, Comparison, OutputComparison, Tolerance, is_inexact

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.runtime import Outputs


def class_axis(array: Array) -> int | None:
    """Return the axis over which an argmax makes sense: the last of [N, C] and [N, T, C], axis 1 of [N, C, H, W]."""
    if array.ndim not in (2, 3, 4) or array.dtype.kind != "f":
        return None
    axis = 1 if array.ndim == 4 else array.ndim - 1
    return axis if array.shape[axis] >= 2 else None


_ENTRIES = 4096  # sums kept per axis; a longer axis has neighbours share one


@dataclass
class Entries:
    """Squared sums per index of one axis: large entries must not hide small ones that broke."""

    axis: int
    width: int = 0
    error: Array = field(default_factory=lambda: np.zeros(0))
    reference: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, error: Array, reference: Array) -> None:
        """Add squares of one batch; the axis may be longer or shorter than before."""
        size = error.shape[self.axis]
        self.width = self.width or -(-size // _ENTRIES)
        others = tuple(axis for axis in range(error.ndim) if axis != self.axis)
        starts = np.arange(0, size, self.width)
        fresh = [np.add.reduceat(squares.sum(others), starts) for squares in (error, reference)]
        self.error, self.reference = (_added(a, b) for a, b in zip((self.error, self.reference), fresh, strict=True))

    def worst(self, share: float) -> tuple[float, str]:
        """Return the largest relative L2 of an entry, and which it is.

        Entries whose norm, or whose error, is less than `share` of the whole output are rounding next to the others.
        """
        least = share**2 * float(self.reference.sum())
        counts = (self.reference > least) & (self.error > least)
        if not counts.any():
            return 0.0, ""
        ratios = np.sqrt(np.divide(self.error, self.reference, out=np.zeros_like(self.error), where=counts))
        index = int(np.argmax(ratios.round(9)))
        last = f"..{(index + 1) * self.width - 1}" if self.width > 1 else ""
        return float(ratios[index]), f"index {index * self.width}{last} of axis {self.axis}"


def _added(a: Array, b: Array) -> Array:
    long, short = (a, b) if len(a) > len(b) else (b, a)
    total: Array = long.copy()
    total[: len(short)] += short
    return total


@dataclass
class Running:
    """Streamed sums over one output."""

    name: str
    rtol: float
    dtype: str = ""
    elements: int = 0
    finite: int = 0
    mismatches: int = 0
    max_abs: float = 0.0
    excess: float = 0.0
    error: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    dot: float = 0.0
    rows: int = 0
    kept: int = 0
    kl: float | None = 0.0
    problem: str = ""
    entries: dict[int, Entries] = field(default_factory=dict)

    def update(self, candidate: Any, reference: Any) -> None:
        """Add one batch; sequences add their elements, maps their values."""
        if isinstance(reference, dict) and isinstance(candidate, dict):
            if candidate.keys() != reference.keys():
                self.problem = self.problem or "a map has other keys"
                return
            candidate, reference = _map_values(candidate, reference)
        if reference is None or candidate is None:
            self.elements += 1
            self.finite += 1
            if reference is not candidate:
                self.problem = self.problem or "absent on one side only"
        elif (mine := _form(candidate)) != (theirs := _form(reference)):
            self.problem = self.problem or f"a {mine} instead of a {theirs}"
        elif isinstance(reference, list):
            if len(candidate) != len(reference):
                self.problem = self.problem or f"{len(candidate)} elements instead of {len(reference)}"
            for a, b in zip(candidate, reference, strict=False):
                self.update(a, b)
        else:
            self._arrays(np.asarray(candidate), np.asarray(reference))

    def _arrays(self, a: Array, b: Array) -> None:
        self.dtype = self.dtype or str(b.dtype)
        if a.shape != b.shape:
            self.problem = self.problem or f"shape {list(a.shape)} instead of {list(b.shape)}"
            return
        if a.dtype != b.dtype:
            self.problem = self.problem or f"type {a.dtype} instead of {b.dtype}"
            return
        self.elements += b.size
        if b.dtype.kind not in "fc" and "float" not in b.dtype.name:
            self.finite += b.size
            self.mismatches += int(np.count_nonzero(a != b))
            return
        if b.size:
            self._floats(a, b)

    def _floats(self, a: Array, b: Array) -> None:
        wide = np.complex128 if b.dtype.kind == "c" else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(b)
        strange = ~finite
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        self.mismatches += int(np.count_nonzero(strange & ~same)) + int(np.count_nonzero(finite & ~np.isfinite(a)))
        both = finite & np.isfinite(a)
        self.finite += int(np.count_nonzero(both))
        if not both.any():
            return
        x, y = (a, b) if both.all() else (np.where(both, a, 0), np.where(both, b, 0))
        difference = np.abs(x - y)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.excess = max(self.excess, float((difference - self.rtol * np.abs(y)).max()))
        self.error += float(np.vdot(difference, difference).real)
        self.reference += float(np.vdot(y, y).real)
        self.candidate += float(np.vdot(x, x).real)
        self.dot += float(np.vdot(x, y).real)
        if y.ndim > 1:
            squares = difference**2, np.abs(y) ** 2
            for index in {1, y.ndim - 1}:
                self.entries.setdefault(index, Entries(index)).add(*squares)
        if wide is np.float64 and (axis := class_axis(y)) is not None:
            self._classes(np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1))

    def _classes(self, a: Array, b: Array) -> None:
        """Count the rows whose first largest entry in `a` is a largest one in `b`: a tie of `b` may be broken anyhow.

        A candidate that is constant therefore agrees by chance only, however many entries it makes largest.
        """
        picked = np.take_along_axis(b, a.argmax(-1)[..., None], -1)[..., 0]
        self.rows += picked.size
        self.kept += int(np.count_nonzero(picked >= b.max(-1)))
        if self.kl is None or b.min() < -1e-6 or np.abs(b.sum(-1) - 1).max() > 1e-3:
            self.kl = None
            return
        p, q = np.clip(b, 1e-12, None), np.clip(a, 1e-12, None)
        self.kl += float((p * np.log(p / q)).sum())

    def _agreement(self) -> float | None:
        if self.dtype and not is_inexact(self.dtype):
            return (self.elements - self.mismatches) / self.elements if self.elements else None
        return self.kept / self.rows if self.rows else None

    def result(self) -> OutputComparison:
        """Return the comparison over all that was added."""
        problem = self.problem
        if not all(map(math.isfinite, (self.error, self.reference, self.candidate, self.dot, self.max_abs))):
            problem = problem or "its values are too large to compare"
        relative = math.sqrt(self.error / self.reference) if self.reference else (math.inf if self.max_abs else 0.0)
        norms = math.sqrt(self.reference) * math.sqrt(self.candidate)
        share = EXACT_SHARE * EXACT_RELATIVE_L2.get(self.dtype, EXACT_RELATIVE_L2["float32"])
        worst = [entries.worst(share) for _, entries in sorted(self.entries.items())]
        entry_l2, entry = max(worst, key=lambda found: round(found[0], 9), default=(0.0, ""))
        return OutputComparison(
            name=self.name,
            dtype=self.dtype,
            elements=self.elements,
            finite=self.finite,
            entry_l2=entry_l2,
            entry=entry,
            max_abs=self.max_abs,
            atol_needed=max(self.excess, 0.0),
            relative_l2=relative,
            sqnr_db=-20 * math.log10(relative)
            if 0 < relative < math.inf
            else (math.inf if not relative else -math.inf),
            cosine=min(max(self.dot / norms, -1.0), 1.0) if norms else float(self.reference == self.candidate),
            argmax=self._agreement(),
            kl=max(self.kl, 0.0) / self.rows if self.rows and self.kl is not None else None,
            mismatches=self.mismatches,
            problem=problem,
        )


def _form(value: Any) -> str:
    return "sequence" if isinstance(value, list) else "map" if isinstance(value, dict) else "tensor"


def _map_values(candidate: Mapping[Any, Any], reference: Mapping[Any, Any]) -> tuple[Array, Array]:
    """Return the values of two maps in one order; the runtime hands float32 out as Python floats."""
    both = np.array([[values[key] for key in reference] for values in (candidate, reference)])
    if both.dtype == np.float64:
        with np.errstate(over="ignore"):
            narrow = both.astype(np.float32)
        both = narrow if np.array_equal(narrow, both, equal_nan=True) else both
    return both[0], both[1]


def compare(candidate: Iterable[Outputs], reference: Iterable[Outputs], samples: int, rtol: float = 0.0) -> Comparison:
    """Compare outputs batch by batch; `rtol` is the share of |reference| that `atol_needed` leaves out.

    An output that one side lacks is a problem of that output. Raises ValueError when the batches do not pair up.
    """
    running: dict[str, Running] = {}
    for mine, theirs in zip(candidate, reference, strict=True):
        for name in (*theirs, *(name for name in mine if name not in theirs)):
            stats = running.setdefault(name, Running(name, rtol))
            if name in mine and name in theirs:
                stats.update(mine[name], theirs[name])
            else:
                stats.problem = "missing" if name in theirs else "not in the reference"
    return Comparison(tuple(stats.result() for stats in running.values()), samples)


def rtol_of(tolerance: Tolerance | None) -> float:
    """Return the relative part of a tolerance, 0 without one."""
    return tolerance.rtol or 0.0 if tolerance is not None else 0.0
