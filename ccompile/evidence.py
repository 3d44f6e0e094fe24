"""The record of a compile: what every step did, skipped, cost and moved. JSON on disk, schema-versioned.

Everything but `timing` is a function of source, spec, data, seed and versions: two runs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ccompile import __version__
from ccompile.core import Candidate, CostReport, Site, Skip
from ccompile.data import DataSet
from ccompile.errors import DataError
from ccompile.prints import Fingerprint
from ccompile.record import Record, finite
from ccompile.sites import SiteError
from ccompile.snapshots import ChangeRecord, LayerRecord, NodeRecord, WeightRecord
from ccompile.tolerance import Comparison, OutputComparison, Tolerance

SCHEMA = 1
_ORIGIN = "Evidence is what a compile writes beside its output: OUT.evidence.json."
Verdict = Literal["kept", "weakened", "reverted", "failed"]


class OutputRecord(Record):
    """core.OutputComparison; infinities are null."""

    name: str
    dtype: str
    elements: int
    max_abs: float | None
    atol_needed: float | None
    relative_l2: float | None
    sqnr_db: float | None
    cosine: float | None
    argmax: float | None
    kl: float | None
    mismatches: int
    problem: str
    finite: int = 1
    entry_l2: float | None = 0.0
    entry: str = ""

    def comparison(self) -> OutputComparison:
        """Return the comparison as it was: numbers that JSON has not were infinite, or NaN for a cosine."""
        plain = self.model_dump()
        errors = ("max_abs", "atol_needed", "relative_l2", "entry_l2")
        plain |= {name: math.inf for name in errors if plain[name] is None}
        if plain["sqnr_db"] is None:
            plain["sqnr_db"] = math.inf if plain["relative_l2"] == 0 else -math.inf
        if plain["cosine"] is None:
            plain["cosine"] = math.nan
        return OutputComparison(**plain)


class ComparisonRecord(Record):
    """tolerance.Comparison."""

    samples: int
    outputs: tuple[OutputRecord, ...]
    needed: Tolerance | None

    @classmethod
    def of(cls, comparison: Comparison) -> ComparisonRecord:
        """Return the record of a comparison."""
        outputs = tuple(OutputRecord(**finite(asdict(output))) for output in comparison.outputs)
        return cls(samples=comparison.samples, outputs=outputs, needed=comparison.needed)

    def comparison(self) -> Comparison:
        """Return the comparison as it was."""
        return Comparison(tuple(output.comparison() for output in self.outputs), self.samples)


class CandidateRecord(Record):
    """core.Candidate: a technique that was weighed at a site."""

    technique: str
    strength: float
    error: float | None
    impact: float | None
    cost: float
    chosen: bool = False
    unit: str = ""


def _candidates(found: Sequence[Candidate]) -> tuple[CandidateRecord, ...]:
    return tuple(CandidateRecord(**vars(candidate)) for candidate in found)


class SiteRecord(Record):
    """core.Site with what was measured there: |dy| / |x| against `bound`, and |dy| / |y|."""

    nodes: tuple[str, ...]
    note: str
    bound: float | None = None
    measured: float | None = None
    relative_error: float | None = None
    candidates: tuple[CandidateRecord, ...] = ()
    output: str = ""
    weight: WeightRecord | None = None

    @classmethod
    def of(cls, site: Site, error: SiteError | None, unmeasured: str, weight: WeightRecord | None = None) -> SiteRecord:
        """Return the record of a site, with what was measured there, or why its bound was not."""
        notes = (site.note, f"bound not measured: {unmeasured}" if unmeasured else "")
        return cls(
            nodes=site.nodes,
            note="; ".join(note for note in notes if note),
            bound=site.bound,
            measured=None if error is None else error.gain,
            relative_error=None if error is None else error.relative,
            candidates=_candidates(site.candidates),
            output=site.output,
            weight=weight,
        )


class SkipRecord(Record):
    """core.Skip."""

    node: str
    reason: str
    candidates: tuple[CandidateRecord, ...] = ()

    @classmethod
    def of(cls, skip: Skip) -> SkipRecord:
        """Return the record of a node left alone."""
        return cls(node=skip.node, reason=skip.reason, candidates=_candidates(skip.candidates))


class CostRecord(Record):
    """core.CostReport."""

    params: int
    nonzero: int
    macs: int
    multiplications: int
    stored_bytes: int
    resident_bytes: int
    moved_bytes: int
    peak_activation_bytes: int
    seconds: float

    @classmethod
    def of(cls, report: CostReport) -> CostRecord:
        """Return the record of a cost report."""
        return cls(**asdict(report))

    def report(self) -> CostReport:
        """Return the cost report as it was."""
        return CostReport(**self.model_dump())


class StepRecord(Record):
    """One step: the pass with its options, what it did, how outputs moved, what the graph costs now."""

    index: int
    name: str
    options: dict[str, Any]
    contract: Literal["exact", "bounded", "lossy"]
    tolerance: Tolerance | None
    verdict: Verdict
    reason: str
    weakened: float = 0.0  # how far it went back from the strength asked for, after that broke its contract
    applied: tuple[SiteRecord, ...]
    skipped: tuple[SkipRecord, ...]
    against_previous: ComparisonRecord | None
    against_source: ComparisonRecord | None
    metrics: Mapping[str, float | None]
    cost: CostRecord | None
    nodes: int
    ops: dict[str, int]
    change: ChangeRecord | None = None


class GateRecord(Record):
    """One gate: what was asked, what was found, whether it held."""

    name: str
    limit: float
    value: float | None
    holds: bool
    detail: str = ""


class DataRecord(Record):
    """The verification (or calibration) data."""

    source: str
    digest: str
    samples: int
    notes: tuple[str, ...] = ()
    given: dict[str, Any] = Field({})  # as the spec says it; paths are relative to the spec

    @classmethod
    def of(cls, data: DataSet) -> DataRecord:
        """Return the record of a data set."""
        given = dict(data.given)
        return cls(source=data.source, digest=data.digest, samples=data.samples, notes=data.notes, given=given)


class FileRecord(Record):
    """A file by content."""

    name: str
    digest: str
    bytes: int

    @classmethod
    def of(cls, name: str, path: Path, data: Path | None) -> FileRecord:
        """Return the record of the model at `path`, which will be called `name`, and of its external data."""
        size = path.stat().st_size + (data.stat().st_size if data is not None else 0)
        with path.open("rb") as stream:
            return cls(name=name, digest=hashlib.file_digest(stream, "sha256").hexdigest(), bytes=size)


class Evidence(Record):
    """Everything about one compile."""

    evidence_schema: Literal[1] = 1
    verdict: Literal["ok", "failed"]
    reason: str = ""
    source: FileRecord
    output: FileRecord | None
    spec: FileRecord
    target: str
    seed: int
    versions: dict[str, str]
    notes: tuple[str, ...]
    calibration: DataRecord | None
    verification: DataRecord
    source_cost: CostRecord
    source_metrics: Mapping[str, float | None]
    steps: tuple[StepRecord, ...]
    final: ComparisonRecord | None
    survey: Mapping[str, float | None]
    gates: tuple[GateRecord, ...]
    graph: tuple[NodeRecord, ...] = ()
    source_layers: tuple[LayerRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    fingerprint: Fingerprint | None = None
    decisions: dict[str, str] = Field(default_factory=dict)  # what was decided by times, by step and site
    timing: dict[str, Any] = Field(default_factory=dict)

    @property
    def result(self) -> StepRecord | None:
        """Return the last step that was not undone; None where the result is the source."""
        return next((step for step in reversed(self.steps) if step.verdict in ("kept", "weakened")), None)

    @property
    def result_cost(self) -> CostRecord:
        """Return what the result costs."""
        return self.source_cost if self.result is None or self.result.cost is None else self.result.cost

    @property
    def result_metrics(self) -> Mapping[str, float | None]:
        """Return the task metrics of the result."""
        return self.source_metrics if self.result is None else self.result.metrics

    def text(self) -> str:
        """Return the JSON text: stable key order, one trailing newline."""
        return json.dumps(finite(self.model_dump(mode="json")), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """Return the evidence in a file. Raises DataError when it is missing, damaged or of another schema."""
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the evidence: {error.strerror}", str(path)) from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"not an evidence file of schema {SCHEMA}, or a damaged one: {error}", str(path), _ORIGIN
            ) from error
        if not isinstance(plain, dict) or "evidence_schema" not in plain:
            raise DataError(f"not an evidence file of schema {SCHEMA}, but JSON of something else", str(path), _ORIGIN)
        if (found := plain["evidence_schema"]) != SCHEMA:
            message = f"not an evidence file of schema {SCHEMA}, which ccompile {__version__} reads, but of {found!r}"
            raise DataError(message, str(path), "Compile again, or use the version that wrote it.")
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = f"not an evidence file of schema {SCHEMA}: `{where}`: {first['msg']}"
            raise DataError(message, str(path), _ORIGIN) from error


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime")
    found = {name: installed_version(name) for name in packages}
    return {"ccompile": __version__, "python": platform.python_version(), **found}
