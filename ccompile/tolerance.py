"""How far outputs may move, and what comparing them found: a Comparison is held against a Tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field, model_validator

from ccompile.declaration import Declaration


class Tolerance(Declaration):
    """How far an output may move; every given limit must hold, on every output.

    `atol` and `rtol` together bound each element: |a - b| <= atol + rtol |b|, b being the reference.
    """

    atol: float | None = Field(None, ge=0, description="largest absolute difference of an element")
    rtol: float | None = Field(None, ge=0, description="largest difference relative to the reference element")
    relative_l2: float | None = Field(None, ge=0, description="|a - b| / |b| over all elements of an output")
    cosine: float | None = Field(None, ge=-1, le=1, description="least cosine similarity of an output")
    argmax: float | None = Field(
        None,
        ge=0,
        le=1,
        description="least share of rows that keep their largest entry, or of equal elements of an integer output",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Tolerance:
        if not self.limits():
            raise ValueError("an empty tolerance promises nothing: give at least one limit")
        return self

    def limits(self) -> dict[str, float]:
        """Return the limits that are given, by name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {value:g}" for name, value in self.limits().items()) + "}"


# What `exact` means: float reordering only, as relative L2 per type. Measured on real nets of 20 to 300 layers in
# float32: 1e-7 to 2e-5; the smallest mistakes that we planted (one wrong bias entry) moved outputs by more than 1e-3.
EXACT_RELATIVE_L2: dict[str, float] = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}

EXACT_ENTRY = 100.0  # times that, at most 0.5, for each index of the class axis (entries are smaller than the whole)
EXACT_SHARE = 0.01  # times that: the share of the output's norm below which an entry, or its error, is rounding


def is_inexact(dtype: str) -> bool:
    """Return whether values of a type are compared by how close they are."""
    return "float" in dtype or dtype.startswith("complex")


_NOTHING_FINITE = "nothing finite was compared"


@dataclass(frozen=True)
class OutputComparison:
    """One output of two models on the same inputs; `reference` is the second operand everywhere.

    `argmax` and `kl` are None where they make no sense (see comparison.class_axis); the `argmax` of an integer, bool or
    string output, which may be an argmax itself, is the share of equal elements. `mismatches` counts entries that
    cannot be close: NaN or infinity on one side only, and any difference of an integer, bool or string. `finite` counts
    the elements that could be compared at all: NaN against NaN says nothing about a model.
    `entry_l2` is the largest relative L2 of one index of the class axis, and `entry` which it is: a small entry may be
    broken while the whole is not.
    """

    name: str
    dtype: str
    elements: int
    max_abs: float
    atol_needed: float
    relative_l2: float
    sqnr_db: float
    cosine: float
    argmax: float | None
    kl: float | None
    mismatches: int
    problem: str = ""
    finite: int = 1
    entry_l2: float = 0.0
    entry: str = ""

    def violations(self, tolerance: Tolerance) -> list[str]:
        """Return what leaves `tolerance`, in words; an output of which nothing was compared always does."""
        if self.problem:
            return [self.problem]
        if self.elements == 0:
            return ["nothing was compared"]
        inexact = is_inexact(self.dtype)
        if self.mismatches and (inexact or tolerance.argmax is None):
            what = "NaN or infinity on one side only" if inexact else "exact values that differ"
            return [f"{self.mismatches} of {self.elements} elements: {what}"]
        if not self.finite:
            return [_NOTHING_FINITE]
        if inexact and self.argmax is None and tolerance.limits().keys() == {"argmax"}:
            return ["argmax says nothing about it, it has no class axis: give another limit as well"]
        measured = {"relative_l2": self.relative_l2, "cosine": self.cosine, "argmax": self.argmax}
        broken = []
        for name, limit in tolerance.limits().items():
            value = measured.get(name)
            if name in ("cosine", "argmax"):
                if value is not None and not value >= limit:
                    broken.append(f"{name} {value:.6g} < {limit:.6g}")
            elif name == "relative_l2" and not self.relative_l2 <= limit:
                broken.append(f"relative_l2 {self.relative_l2:.3g} > {limit:.3g}")
        if tolerance.atol is not None or tolerance.rtol is not None:
            limit = tolerance.atol or 0.0
            if not self.atol_needed <= limit:
                broken.append(f"max abs {self.max_abs:.3g}: needs atol {self.atol_needed:.3g} > {limit:.3g}")
        return broken

    def exact_violations(self) -> list[str]:
        """Return what is more than float reordering, on the whole output or on one entry of it."""
        limit = EXACT_RELATIVE_L2.get(self.dtype, EXACT_RELATIVE_L2["float32"])
        each = min(EXACT_ENTRY * limit, 0.5)
        if (broken := self.violations(Tolerance(relative_l2=limit))) or self.entry_l2 <= each:
            return broken
        return [f"relative_l2 {self.entry_l2:.3g} > {each:.3g} at {self.entry}"]


@dataclass(frozen=True)
class Comparison:
    """All outputs of two models on the same inputs."""

    outputs: tuple[OutputComparison, ...]
    samples: int

    def violations(self, tolerance: Tolerance) -> dict[str, list[str]]:
        """Return, by output, what leaves `tolerance`; comparing nothing at all is a violation."""
        return self._violations(lambda output: output.violations(tolerance))

    def exact_violations(self) -> dict[str, list[str]]:
        """Return, by output, what is more than float reordering."""
        return self._violations(OutputComparison.exact_violations)

    def _violations(self, judge: Callable[[OutputComparison], list[str]]) -> dict[str, list[str]]:
        if not self.outputs:
            return {"": ["nothing was compared"]}
        broken = {output.name: judge(output) for output in self.outputs} | self.unjudged
        return {name: found for name, found in broken.items() if found}

    @property
    def unjudged(self) -> dict[str, list[str]]:
        """Return, by output, that it had no element, or no finite one, on any sample."""
        said = f"it is empty on all {self.samples} samples; real verification data may fill it"
        empty = {output.name: [said] for output in self.outputs if not output.elements and not output.problem}
        strange = [o for o in self.outputs if o.elements and not (o.finite or o.mismatches or o.problem)]
        return empty | {output.name: [_NOTHING_FINITE] for output in strange}

    @property
    def decided(self) -> bool:
        """Return whether integers differ, which only a limit on argmax can allow."""
        return any(output.mismatches and not is_inexact(output.dtype) for output in self.outputs)

    @property
    def needed(self) -> Tolerance | None:
        """Return the smallest limits, in three digits, that each would pass alone; None when no tolerance can.

        Where integers differ, each passes together with that on argmax only.
        """
        if not self.outputs or any(o.problem or not o.finite or not o.elements for o in self.outputs):
            return None
        if any(o.mismatches and is_inexact(o.dtype) for o in self.outputs):
            return None
        close = [o for o in self.outputs if is_inexact(o.dtype) or not self.decided]
        limits = (
            {
                "atol": round_up(max(o.atol_needed for o in close)),
                "relative_l2": round_up(max(o.relative_l2 for o in close)),
                "cosine": _round_down(min(o.cosine for o in close)),
            }
            if close
            else {}
        )
        if argmax := [o.argmax for o in self.outputs if o.argmax is not None]:
            limits["argmax"] = _round_down(min(argmax))
        finite = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        return Tolerance(**finite) if finite else None


def _round_down(value: float) -> float:
    """Return the largest multiple of 1e-6 that is <= value."""
    if not math.isfinite(value):
        return value
    rounded = math.floor(value * 1e6) / 1e6
    return rounded if rounded <= value else (math.floor(value * 1e6) - 1) / 1e6


def round_up(value: float, digits: int = 3) -> float:
    """Return the least number of `digits` significant decimals that is >= value.

    >>> round_up(0.03121)
    0.0313
    >>> round_up(0.0)
    0.0
    """
    if abs(value) < 1e-300 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    rounded = float(f"{math.ceil(value / step - 1e-9) * step:.{digits}g}")
    return rounded if rounded >= value else float(f"{rounded + step:.{digits}g}")
