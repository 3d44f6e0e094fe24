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

from pydantic import BaseModel, ConfigDict, ValidationError

from ccompile import __version__
from ccompile.core import Candidate, CostReport, Site, Skip
from ccompile.data import DataSet
from ccompile.errors import DataError
from ccompile.sites import SiteError
from ccompile.tolerance import Comparison, Tolerance

SCHEMA = 1
Verdict = Literal["kept", "weakened", "reverted", "failed"]


class Record(BaseModel):
    """Base of everything in the evidence file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class ComparisonRecord(Record):
    """tolerance.Comparison."""

    samples: int
    outputs: tuple[OutputRecord, ...]
    needed: Tolerance | None

    @classmethod
    def of(cls, comparison: Comparison) -> ComparisonRecord:
        """Return the record of a comparison."""
        outputs = tuple(OutputRecord(**_finite(asdict(output))) for output in comparison.outputs)
        return cls(samples=comparison.samples, outputs=outputs, needed=comparison.needed)


class CandidateRecord(Record):
    """core.Candidate: a technique that was weighed at a site."""

    technique: str
    strength: float
    error: float
    impact: float
    cost: float
    chosen: bool = False


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

    @classmethod
    def of(cls, site: Site, error: SiteError | None, unmeasured: str) -> SiteRecord:
        """Return the record of a site, with what was measured there, or why its bound was not."""
        notes = (site.note, f"bound not measured: {unmeasured}" if unmeasured else "")
        return cls(
            nodes=site.nodes,
            note="; ".join(note for note in notes if note),
            bound=site.bound,
            measured=None if error is None else error.gain,
            relative_error=None if error is None else error.relative,
            candidates=_candidates(site.candidates),
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

    @classmethod
    def of(cls, data: DataSet) -> DataRecord:
        """Return the record of a data set."""
        return cls(source=data.source, digest=data.digest, samples=data.samples, notes=data.notes)


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
    decisions: dict[str, str] = {}  # what was decided by times, by step and site
    timing: dict[str, Any] = {}

    def text(self) -> str:
        """Return the JSON text: stable key order, one trailing newline."""
        return json.dumps(_finite(self.model_dump(mode="json")), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """Return the evidence in a file. Raises DataError when it is missing, damaged or of another schema."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the evidence: {error.strerror}", str(path)) from error
        except (ValidationError, UnicodeDecodeError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"not an evidence file of schema {SCHEMA}: {first}", str(path)) from error


def _finite(value: Any) -> Any:
    """Return plain data with infinities and NaN as None, as JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime")
    found = {name: installed_version(name) for name in packages}
    return {"ccompile": __version__, "python": platform.python_version(), **found}
