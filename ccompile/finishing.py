"""The end of a compile: gates judged, the target asked, model and evidence written, or only the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ccompile import __version__, contracts, cost, depfile, disk, drift, locking, onnx_io, runtime, snapshots
from ccompile import target as targets
from ccompile.caching import LostError
from ccompile.comparison import compare, rtol_of
from ccompile.errors import ContractError, ModelError
from ccompile.evidence import ComparisonRecord, CostRecord, DataRecord, Evidence, FileRecord, GateRecord, versions
from ccompile.fingerprint import prints_of
from ccompile.prints import Fingerprint
from ccompile.running import Run
from ccompile.runtime import Timing
from ccompile.tolerance import Comparison


@dataclass(frozen=True)
class _Judged:
    """What the whole compile led to: why it failed, if it did, and what was measured at its end."""

    failed: Sequence[str]
    final: Comparison | None = None
    gates: tuple[GateRecord, ...] = ()
    race: Timing | None = None


def finish(run: Run, start: float) -> Evidence:
    """Judge the gates, check the target, write model and evidence."""
    run.catch_up()
    judged = _judge(run)
    if judged.failed:
        evidence = _evidence(run, judged, None, start)
        disk.write_text(run.request.evidence_path, evidence.text())
    else:
        run.decisions.finish()
        evidence = _write(run, lambda output, seen: _evidence(run, judged, output, start, seen))
    run.cache.keep_whole(evidence, None if judged.failed else run.state.model)
    return evidence


def repeat(run: Run, known: Evidence, model: ir.Model | None) -> Evidence:
    """Write what the same compile led to before: its evidence under the names of this one, and its result."""
    evidence = known.model_copy(update={"source": _source_record(run), "spec": _spec_record(run)})
    if model is None or known.output is None:
        disk.write_text(run.request.evidence_path, evidence.text())
        return evidence
    made: list[Evidence] = []

    def approve(path: Path, data: Path | None) -> None:
        output = FileRecord.of(run.request.output.name, path, data)
        if data is None and output.digest != known.output.digest:  # type: ignore[union-attr]
            raise LostError
        made.append(evidence.model_copy(update={"output": output}))
        _put_beside(run, made[0])

    onnx_io.save(model, run.request.output, _provenance(run), approve=approve)
    return made[0]


def _judge(run: Run) -> _Judged:
    """Return which steps failed, or else which gates; nothing more is measured after a failed step."""
    request, gates = run.request, run.request.spec.gates
    if failed := [f"step {s.index} {s.name}: {s.reason}" for s in run.steps if s.verdict == "failed"]:
        return _Judged(failed)
    race = None
    if request.measure or gates.measured_seconds is not None:
        race = runtime.race(run.state.model, run.source.model, run.single, request.threads)
    final = compare(run.state.outputs, run.origin.outputs, run.samples, rtol_of(gates.tolerance))
    metrics = (run.source_metrics, run.measure(run.state.outputs))
    costs = (run.origin.cost.report, run.state.cost.report)
    records = tuple(contracts.gate_records(gates, *costs, final, metrics, race))
    return _Judged([f"gate {gate.name}: {gate.detail}" for gate in records if not gate.holds], final, records, race)


def _write(run: Run, evidence_of: Callable[[FileRecord, Fingerprint], Evidence]) -> Evidence:
    """Write model and evidence; the model must fit the target, and its file reproduce what was verified.

    The evidence takes its name just before the model: what stands at the output always has its evidence, and a
    build that was cut short between the two is seen as not done.
    """
    request, state = run.request, run.state
    problems = targets.check(state.model, request.spec.target, state.cost.report, state.cost.peak_node, state.types)
    if problems:
        raise ModelError.of(problems)
    made: list[Evidence] = []

    def approve(path: Path, data: Path | None) -> None:
        _refuse_other(run, path)
        seen = Fingerprint.of(onnx_io.load(path).model, run.inputs, prints_of(state.outputs))
        made.append(evidence_of(FileRecord.of(request.output.name, path, data), seen))
        _put_beside(run, made[0])

    onnx_io.save(state.model, request.output, _provenance(run), approve=approve)
    return made[0]


def _put_beside(run: Run, evidence: Evidence) -> None:
    """Write what stands beside the model, which is whole and about to take its name."""
    request, output = run.request, evidence.output
    assert output is not None
    if request.lock is not None and request.is_held:
        locking.check_output(locking.read(request.lock), output, str(request.lock))
    disk.write_text(request.evidence_path, evidence.text())
    if request.depfile is not None:
        disk.write_text(request.depfile, depfile.text(request, run.source.external))
    if request.lock is not None and not request.is_held:
        disk.write_text(request.lock, locking.Lock.of(run.lock_inputs(), evidence).text())


def _provenance(run: Run) -> dict[str, str]:
    return {
        "ccompile.version": __version__,
        "ccompile.source": run.source.digest,
        "ccompile.spec": run.request.spec.digest,
        "ccompile.data": run.data.verification.digest,
    }


def _source_record(run: Run) -> FileRecord:
    return FileRecord(name=run.request.model.name, digest=run.source.digest, bytes=run.source.size)


def _spec_record(run: Run) -> FileRecord:
    name = Path(run.request.spec.name)
    size = name.stat().st_size if name.exists() else 0
    return FileRecord(name=name.name, digest=run.request.spec.digest, bytes=size)


def _refuse_other(run: Run, path: Path) -> None:
    """Refuse a file that does not reproduce the outputs that were verified, on the first batch."""
    first = next(iter(run.data.verification.batches()))
    written = runtime.run_file(path, first.feeds, run.settings)
    again = compare([written], [next(iter(run.state.outputs))], first.samples)
    for name, found in again.exact_violations().items():
        if name not in again.unjudged:  # empty in this batch on both sides: nothing to reproduce
            raise ContractError(f"the file written does not reproduce output `{name}`: {found[0]}", str(path))


def _evidence(
    run: Run, judged: _Judged, output: FileRecord | None, start: float, seen: Fingerprint | None = None
) -> Evidence:
    request = run.request
    total = time.perf_counter() - start
    timing: dict[str, Any] = {"steps": run.seconds, "verification": run.verifying, "total": total}
    if run.statistics is not None and (held := run.statistics.ledger.record()):
        timing["statistics"] = held
    if judged.race is not None:
        timing["measured"] = {**vars(judged.race), "threads": request.threads}  # 0: all cores
    return Evidence(
        verdict="failed" if judged.failed else "ok",
        reason="\n".join(judged.failed),
        source=_source_record(run),
        output=output,
        spec=_spec_record(run),
        target=request.spec.target.name,
        seed=request.seed,
        versions=versions(),
        notes=tuple(run.notes),
        calibration=None if (given := run.data.calibration) is None else DataRecord.of(given),
        verification=DataRecord.of(run.data.verification),
        source_cost=CostRecord.of(run.origin.cost.report),
        source_metrics=run.source_metrics,
        steps=tuple(run.steps),
        final=None if judged.final is None else ComparisonRecord.of(judged.final),
        survey=cost.survey_metrics(run.origin.cost.report, run.state.cost.report),
        gates=judged.gates,
        graph=snapshots.nodes_of(run.source.model),
        source_layers=snapshots.layers_of(run.origin.cost, {}),
        layers=snapshots.layers_of(run.state.cost, _drifts(run)),
        fingerprint=seen,
        decisions=run.decisions.made,
        timing=timing,
    )


def _drifts(run: Run) -> dict[str, float]:
    """Return how far the values that layers make are from the source's, on a few samples."""
    source, state = run.origin, run.state
    feeds, _ = runtime.one_sample(next(iter(run.feeds())), source.model, drift.SAMPLES)
    return drift.drifts(source.model, state.model, (source.types, state.types), feeds, run.settings)
