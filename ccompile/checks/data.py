"""The inputs of a check: opened as the compile did, and held against what it recorded of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ccompile.cases import Case
from ccompile.core import Array
from ccompile.data import DataSet, DataSource, DataSpec, open_data
from ccompile.errors import DataError
from ccompile.evidence import DataRecord, Evidence
from ccompile.prints import InputRecord
from ccompile.spec import Spec
from ccompile.validation import from_options

SAME = 1e-3  # two descriptions of one distribution agree this closely, as a share of its standard deviation
CHANCE = 1e-6  # probability below which other samples are no samples of the recorded kind
_FILES = ("npz", "test_data", "images")


def opened(
    evidence: Evidence, spec: Spec | None, data: Path | None, model: ir.Model, base: Path
) -> tuple[DataSet, tuple[str, ...]]:
    """Return the verification inputs, and notes: of `spec` where there is one, else as recorded, relative to `base`.

    data: a file or folder in place of the verification source. Raises DataError.
    """
    if spec is not None:
        wanted, base = spec.data or DataSpec(), spec.base
        given = {} if wanted.verification is None else wanted.verification.model_dump(mode="json", exclude_unset=True)
        fitted = wanted.calibration
    else:
        given = dict(evidence.verification.given)
        fitted = _source(evidence.calibration, base)
    if data is not None:
        given = _replaced(given, data)
    if not given and spec is None:
        raise DataError("the evidence does not say what it was verified on", "", "Give --data or --spec.")
    verification = from_options(DataSource, given) if given else None
    if data is None and spec is None and verification is not None:
        _refuse_missing(verification, base)
    found = open_data(DataSpec(calibration=fitted, verification=verification), model, base, evidence.seed)
    return found.verification, tuple(f"data: {note}" for note in found.verification.notes)


def _source(record: DataRecord | None, base: Path) -> DataSource | None:
    """Return the calibration source, which verification must not repeat, where it is still there."""
    if record is None or not record.given:
        return None
    found = from_options(DataSource, record.given)
    return found if found.kind == "synthetic" or (base / getattr(found, found.kind)).exists() else None


def _replaced(given: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """Return the options of a source with another path; of another kind where the path is."""
    if not data.exists():
        raise DataError("there is no such file or folder", f"--data {data}")
    kind = next((kind for kind in _FILES if kind in given), "")
    if data.is_dir() == (kind in ("test_data", "images")) and kind:
        return {**given, kind: str(data.resolve())}
    if kind == "npz" or not kind or not data.is_dir():
        return {"test_data" if data.is_dir() else "npz": str(data.resolve())}
    raise DataError(f"it is a folder, the evidence was made on `{kind}`", f"--data {data}")


def _refuse_missing(source: DataSource, base: Path) -> None:
    if source.kind == "synthetic" or (base / (path := getattr(source, source.kind))).exists():
        return
    hint = "Give --spec SPEC, whose folder its paths are relative to, or --data PATH."
    raise DataError(f"the data `{path}` that it was verified on are not beside the evidence", str(base), hint)


@dataclass(frozen=True)
class InputChange:
    """How one input differs from the recorded one: in its bytes, and, in words, in its distribution."""

    name: str
    same: bool
    distribution: str


def changed_inputs(now: Sequence[InputRecord], then: Sequence[InputRecord]) -> list[InputChange]:
    """Return what became of each recorded input."""
    mine = {found.name: found for found in now}
    return [
        InputChange(old.name, mine[old.name].digest == old.digest, _difference(mine[old.name], old))
        for old in then
        if old.name in mine
    ]


def data_cases(changes: Sequence[InputChange], other_data: bool) -> Iterator[Case]:
    """Yield a case per input: the recorded samples, or, with `other_data`, samples of the recorded kind."""
    for change in changes:
        if change.same:
            yield Case("data", change.name, "holds", "the samples recorded, bit by bit")
        elif change.distribution:
            hint = "Feed it as at the compile: look at the order of channels, scale and mean."
            yield Case("data", change.name, "broken", f"preprocessed otherwise: {change.distribution}", hint)
        elif other_data:
            yield Case("data", change.name, "holds", "other samples of a like distribution")
        else:
            hint = "Give the recorded data, or --other-data to judge by others."
            yield Case("data", change.name, "broken", "other samples than recorded, of a like distribution", hint)


def _difference(now: InputRecord, then: InputRecord) -> str:
    """Return how the distribution of an input differs, or nothing where it may be the same."""
    if now.dtype != then.dtype:
        return f"{now.dtype or 'no numbers'} instead of {then.dtype or 'no numbers'}"
    if len(now.mean) != len(then.mean):
        return f"{len(now.mean)} channels instead of {len(then.mean)}"
    if not now.mean:
        return ""
    mine, theirs = _Shape.of(now), _Shape.of(then)
    if mine.is_near(theirs):
        return ""
    if mine.is_near(theirs.reversed()):
        return "the channels are in reverse order (BGR for RGB)"
    for order, words in ((theirs, ""), (theirs.reversed(), ", and the channels in reverse order (BGR for RGB)")):
        scale, shift = mine.affine(order)
        if scale > 0 and mine.is_near(order.scaled(scale, shift)):
            return f"the values are {scale:.4g} times the recorded ones plus {shift:.4g}{words}"
    return _unlikely(now, then)


def _unlikely(now: InputRecord, then: InputRecord) -> str:
    """Return which channel's mean is none that samples of the recorded kind have (Welch's t-test), or nothing."""
    from scipy import stats

    if now.samples < 2 or then.samples < 2:
        return ""
    for index, (mine, theirs) in enumerate(zip(now.mean, then.mean, strict=True)):
        spreads = max(now.spread[index], 1e-12), max(then.spread[index], 1e-12)
        test = stats.ttest_ind_from_stats(
            mine, spreads[0], now.samples, theirs, spreads[1], then.samples, equal_var=False
        )
        if test.pvalue < CHANCE and abs(mine - theirs) > SAME * max(then.std[index], 1e-12):
            return f"channel {index} has mean {mine:.4g}, recorded {theirs:.4g} (chance {test.pvalue:.1g})"
    return ""


@dataclass(frozen=True, eq=False)
class _Shape:
    """What a distribution looks like: low, high, mean and standard deviation by channel, each [c]."""

    low: Array
    high: Array
    mean: Array
    std: Array

    @classmethod
    def of(cls, record: InputRecord) -> _Shape:
        return cls(*(np.array(getattr(record, name)) for name in ("low", "high", "mean", "std")))

    def is_near(self, other: _Shape) -> bool:
        """Return whether two are the same but for rounding and resampling."""
        unit = SAME * max(float(other.std.max()), 1e-12)
        pairs = ((getattr(self, n), getattr(other, n)) for n in ("low", "high", "mean", "std"))
        return all(bool((np.abs(a - b) <= unit).all()) for a, b in pairs)

    def reversed(self) -> _Shape:
        """Return it with its channels in reverse order."""
        return _Shape(self.low[::-1], self.high[::-1], self.mean[::-1], self.std[::-1])

    def scaled(self, scale: float, shift: float) -> _Shape:
        """Return it for the values scale x + shift, scale > 0."""
        low, high, mean = (part * scale + shift for part in (self.low, self.high, self.mean))
        return _Shape(low, high, mean, self.std * scale)

    def affine(self, other: _Shape) -> tuple[float, float]:
        """Return (scale, shift) that take the other's standard deviation and mean, over all channels, to mine."""
        theirs = math.sqrt(float((other.std**2).mean()))
        scale = math.sqrt(float((self.std**2).mean())) / theirs if theirs else 0.0
        return scale, float(self.mean.mean()) - scale * float(other.mean.mean())
