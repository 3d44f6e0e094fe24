"""The loop: copy, run, check, compare, price, keep or revert; and what is written at the end."""

from __future__ import annotations

import collections
import hashlib
import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from ccompile import __version__, cost, files, graph, runtime, verify
from ccompile import target as targets
from ccompile.analysis.shapes import ValueType, infer
from ccompile.core import Comparison, Compression, Pass, PassResult, Rewrite, Site, Skip, Tolerance, View
from ccompile.cost import ModelCost
from ccompile.data import Batch, Data, DataSet, open_data
from ccompile.errors import CcompileError, ContractError, ModelError, PassError, SpecError
from ccompile.evidence import (
    ComparisonRecord,
    CostRecord,
    DataRecord,
    Evidence,
    FileRecord,
    GateRecord,
    SiteRecord,
    SkipRecord,
    StepRecord,
    Verdict,
)
from ccompile.runtime import Feeds, Settings
from ccompile.spec import Spec
from ccompile.verify import Metric, Recording, SiteError

ANY = Tolerance.model_construct(relative_l2=math.inf)  # fails on NaN, infinities, shapes and types only


class Progress(Protocol):
    """Told what is running: `done` of `total` steps are finished."""

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show it."""
        ...


@dataclass(frozen=True)
class Request:
    """One compile. threads: 0 means all cores; measure: race the result against the source on this machine."""

    model: Path
    spec: Spec
    output: Path
    evidence: Path | None = None
    dump: Path | None = None
    seed: int = 0
    threads: int = 0
    measure: bool = False

    @property
    def evidence_path(self) -> Path:
        """Return where the evidence goes."""
        return self.evidence or self.output.with_name(self.output.name + ".evidence.json")


def compile_model(request: Request, progress: Progress = lambda text, done, total: None) -> Evidence:
    """Run a compile; write the model and its evidence when all held, only the evidence when a contract or gate broke.

    Raises CcompileError (exit 2) when the request itself is wrong; then nothing is written.
    """
    _check_paths(request)
    start = time.perf_counter()
    total = len(request.spec.passes) + 2
    progress("reading the model", 0, total)
    run = _Run(request)
    progress("running the source", 0, total)
    run.open()
    for index, step in enumerate(request.spec.passes):
        progress(f"step {index + 1} {step.pass_name()}", index + 1, total)
        run.step(index, step)
        if run.steps[-1].verdict == "failed":
            break
    progress("gates and output", total - 1, total)
    evidence = run.finish(start)
    progress("done", total, total)
    return evidence


def _check_paths(request: Request) -> None:
    """Refuse outputs that would destroy an input, or that cannot be written, before any work."""
    inputs = {request.model: "the model", Path(request.spec.name): "the spec"}
    for output, what in ((request.output, "the output"), (request.evidence_path, "the evidence")):
        for path, name in inputs.items():
            if output.exists() and path.exists() and output.samefile(path):
                raise CcompileError(f"{what} would overwrite {name}", str(output), "Choose another path with -o.")
        if output.is_dir():
            raise CcompileError(f"{what} is a folder", str(output), "Name a file.")
        if not output.parent.is_dir():
            raise CcompileError(f"the folder of {what} does not exist", str(output.parent), "Make it first.")
    if request.output.exists() and request.evidence_path.exists() and request.output.samefile(request.evidence_path):
        raise CcompileError("the model and the evidence would be one file", str(request.output))


@dataclass
class _State:
    """The graph as it stands, its outputs, and what it costs."""

    model: ir.Model
    outputs: Recording
    types: dict[str, ValueType]
    cost: ModelCost


@dataclass
class _Run:
    request: Request
    steps: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def open(self) -> None:
        """Read model and data, run the source once, price it."""
        request = self.request
        self.settings = Settings(request.threads)
        self.source = graph.load(request.model)
        self.notes += self.source.notes
        self.data: Data = open_data(request.spec.data, self.source.model, request.spec.base, request.seed)
        self.notes += [note for note in self.data.notes if note not in self.notes]
        self.metrics = _metrics(request.spec, self.data.verification)
        self.labels: list[Any] = []
        outputs, expected = Recording(), Recording()
        session = runtime.Session(self.source.model, self.settings)
        for batch in self.data.verification.batches():
            outputs.append(session.run(batch.feeds))
            if batch.labels is not None:
                self.labels.append(batch.labels)
            if batch.expected is not None:
                expected.append(batch.expected)
        del session
        self.samples = self.data.verification.samples
        self._check_expected(outputs, expected)
        self.single, self.shapes = _single(next(iter(self._feeds())), self.source.model)
        self.source_metrics = self._measure(outputs)
        if self.metrics is None:
            self.metrics = {}
        self.origin = self._state(self.source.model, outputs)
        self.notes += [note for note in self.origin.cost.notes if note not in self.notes]
        self.state = self.origin

    def _feeds(self) -> Iterable[Feeds]:
        return (batch.feeds for batch in self.data.verification.batches())

    def _check_expected(self, outputs: Recording, expected: Recording) -> None:
        if len(expected) and len(expected) == len(outputs):
            named = [
                {k: v for k, v in mine.items() if k in theirs} for mine, theirs in zip(outputs, expected, strict=True)
            ]
            found = verify.compare(named, expected, self.samples)
            needed = found.needed
            what = f"within relative L2 {needed.relative_l2:g}" if needed else "NOT at all"
            self.notes.append(f"the source reproduces the data's expected outputs {what}")

    def _measure(self, outputs: Recording) -> dict[str, float]:
        if self.metrics is None:  # labels, but no metric named: top1 where an output has scores
            flat = [v for v in next(iter(outputs)).values() if isinstance(v, np.ndarray) and v.ndim == 2]
            scores = any(verify.class_axis(value) is not None for value in flat)
            self.metrics = {"top1": verify.top1} if scores else {}
        return verify.measure(self.metrics, outputs, self.labels)

    def _state(self, model: ir.Model, outputs: Recording) -> _State:
        known: dict[str, ValueType] = infer(model, self.shapes)
        produced = [str(output.name) for node in model.graph for output in node.outputs if output.name]
        if any(name not in known or known[name].static is None for name in produced):
            known |= runtime.observed_shapes(model, self.single, self.settings)
        return _State(model, outputs, known, cost.price(model, known, self.request.spec.target))

    def step(self, index: int, step: Pass) -> None:
        """Run one step and keep, revert or fail it."""
        start = time.perf_counter()
        before = self.state
        model = graph.copy(before.model)
        self._check_selectors(index, step, model)
        rng = np.random.default_rng([self.request.seed, index])
        view = View(
            model, self.request.spec.target, rng, step, graph.facts, lambda v: runtime.evaluate(v, self.settings)
        )
        result = _act(step, view)
        graph.remove_dead(model.graph)
        graph.name_nodes(model.graph)
        state, attempt = self._attempt(step, model, result)
        verdict: Verdict = "kept"
        if attempt.broken:
            verdict = "reverted" if step.on_violation == "revert" else "failed"
            attempt.broken += self._advice(index, step, model, result, attempt)
        if state is not None and verdict == "kept":
            self.state = state
        if self.request.dump is not None:
            name = f"{index + 1:02d}-{step.pass_name()}.onnx"
            self.request.dump.mkdir(parents=True, exist_ok=True)
            graph.save(model, self.request.dump / name)
        self.steps.append(self._record(index, step, result, attempt, verdict, state))
        self.seconds.append(time.perf_counter() - start)

    def _check_selectors(self, index: int, step: Pass, model: ir.Model) -> None:
        """Refuse an `only` that names nothing: the step would silently do nothing."""
        facts = [graph.facts(node) for node in model.graph]
        where = f"step {index + 1} {step.pass_name()}"
        for selector in step.only or ():
            if not any(selector.matches(known) for known in facts):
                names = ", ".join(sorted(str(known["name"]) for known in facts)[:8])
                raise PassError(f"`only: {selector}` names no node", where, f"Nodes begin with: {names}")
        for selector in step.skip:
            if not any(selector.matches(known) for known in facts):
                self.notes.append(f"{where}: `skip: {selector}` names no node")

    def _attempt(self, step: Pass, model: ir.Model, result: PassResult) -> tuple[_State | None, _Attempt]:
        before = self.state
        attempt = _Attempt()
        if not result.applied:
            attempt.previous = verify.compare(before.outputs, before.outputs, self.samples)
            attempt.source = verify.compare(before.outputs, self.origin.outputs, self.samples)
            return before, attempt
        if graph.signature(model) != graph.signature(self.source.model):
            attempt.broken = "the model's inputs or outputs are not what they were"
            return None, attempt
        complaint = graph.check(model)
        if complaint and not graph.check(before.model):
            attempt.broken = f"ONNX's checker refuses the graph: {complaint}"
            return None, attempt
        outputs = Recording()
        try:
            for produced in runtime.outputs_of(model, self._feeds(), self.settings):
                outputs.append(produced)
        except ModelError as error:
            attempt.broken = str(error)
            return None, attempt
        state = self._state(model, outputs)
        rtol = verify.rtol_of(step.tolerance)
        attempt.previous = verify.compare(outputs, before.outputs, self.samples, rtol)
        attempt.source = verify.compare(outputs, self.origin.outputs, self.samples, rtol)
        bounded = [site for site in result.applied if site.bound is not None]
        attempt.sites = verify.site_errors(before.model, model, bounded, self.single, self.settings)
        attempt.broken = _judge(step, attempt.previous, attempt.sites)
        return state, attempt

    def _advice(self, index: int, step: Pass, model: ir.Model, result: PassResult, attempt: _Attempt) -> str:
        """Return who is to blame and what would have passed."""
        if attempt.previous is None:
            return ""
        lines = [f" ({self.samples} samples, seed {self.request.seed})"]
        tolerance = step.tolerance or ANY

        def breaks(output: Any) -> bool:
            one = Comparison((output,), self.samples)
            return bool(one.exact_violations() if step.kind == "exact" else one.violations(tolerance))

        rtol = verify.rtol_of(step.tolerance)
        guilty = verify.blame(self.state.model, model, result.applied, self._feeds, breaks, self.settings, rtol)
        if guilty is not None:
            nodes = ", ".join(guilty.site.nodes)
            bound = f", bound {guilty.site.bound:.3g}" if guilty.site.bound is not None else ""
            error = guilty.comparison.relative_l2
            lines.append(f"  First site to leave it: {nodes} (relative L2 {error:.3g} at its output{bound}).")
        needed = attempt.previous.needed
        if needed is not None and step.kind != "exact":
            asked = (step.tolerance or needed).limits()
            passing = {name: value for name, value in needed.limits().items() if name in asked} or needed.limits()
            if "rtol" in asked and "atol" in needed.limits():
                passing |= {"rtol": asked["rtol"], "atol": needed.limits()["atol"]}
            lines.append(f"  The tolerance {Tolerance(**passing)} would have passed; or ask for less compression.")
        return "\n".join(lines)

    def _record(
        self,
        index: int,
        step: Pass,
        result: PassResult,
        attempt: _Attempt,
        verdict: Verdict,
        state: _State | None,
    ) -> StepRecord:
        measured = {error.site: error for error in attempt.sites}
        shown = state or self.state
        nodes = list(shown.model.graph)
        return StepRecord(
            index=index + 1,
            name=step.pass_name(),
            options=step.given(),
            contract=step.kind,
            tolerance=step.tolerance,
            verdict=verdict,
            reason=attempt.broken,
            applied=tuple(_site_record(site, measured.get(site)) for site in result.applied),
            skipped=tuple(SkipRecord(node=skip.node, reason=skip.reason) for skip in result.skipped),
            against_previous=None if attempt.previous is None else ComparisonRecord.of(attempt.previous),
            against_source=None if attempt.source is None else ComparisonRecord.of(attempt.source),
            metrics=self._measure(state.outputs) if state is not None else {},
            cost=CostRecord.of(state.cost.report) if state is not None else None,
            nodes=len(nodes),
            ops=dict(sorted(collections.Counter(node.op_type for node in nodes).items())),
        )

    def finish(self, start: float) -> Evidence:
        """Judge the gates, check the target, write model and evidence."""
        request = self.request
        failed = [f"step {s.index} {s.name}: {s.reason}" for s in self.steps if s.verdict == "failed"]
        gates: tuple[GateRecord, ...] = ()
        final = None
        race = None
        if not failed:
            if request.measure or request.spec.gates.measured_seconds is not None:
                race = runtime.race(self.state.model, self.source.model, self.single, request.threads or 1)
            rtol = verify.rtol_of(request.spec.gates.tolerance)
            final = verify.compare(self.state.outputs, self.origin.outputs, self.samples, rtol)
            gates = tuple(self._gates(final, race))
            failed = [f"gate {gate.name}: {gate.detail}" for gate in gates if not gate.holds]
        output = None
        if not failed:
            self._check_target()
            output = self._write()
        evidence = self._evidence(failed, final, gates, output)
        timing = {"steps": self.seconds, "total": time.perf_counter() - start}
        if race is not None:
            timing["measured"] = vars(race)
        evidence = evidence.model_copy(update={"timing": timing})
        files.write_text(request.evidence_path, evidence.text())
        return evidence

    def _check_target(self) -> None:
        problems = targets.check(
            self.state.model,
            self.request.spec.target,
            self.state.cost.report,
            self.state.cost.peak_node,
            self.state.types,
        )
        if problems:
            error = ModelError(problems[0].message)
            error.problems = problems
            raise error

    def _write(self) -> FileRecord:
        """Write the model; the file itself must reproduce what was verified before it takes its name."""
        request = self.request
        first = next(iter(self.data.verification.batches()))
        recorded = next(iter(self.state.outputs))

        def approve(path: Path) -> None:
            written = runtime.run_file(path, first.feeds, self.settings)
            if broken := verify.compare([written], [recorded], first.samples).exact_violations():
                name, found = next(iter(broken.items()))
                raise ContractError(f"the file written does not reproduce output `{name}`: {found[0]}", str(path))

        provenance = {
            "ccompile.version": __version__,
            "ccompile.source": self.source.digest,
            "ccompile.spec": request.spec.digest,
            "ccompile.data": self.data.verification.digest,
        }
        data = graph.save(self.state.model, request.output, provenance, approve=approve)
        size = request.output.stat().st_size + (data.stat().st_size if data is not None else 0)
        with request.output.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(name=request.output.name, digest=digest, bytes=size)

    def _gates(self, final: Comparison, race: runtime.Timing | None) -> Iterable[GateRecord]:
        gates = self.request.spec.gates
        before, after = self.origin.cost.report, self.state.cost.report
        for name, limit in gates.shares.items():
            if name == "measured_seconds":
                share = 1 / race.ratio if race is not None else math.nan
            else:
                base = getattr(before, name)
                share = getattr(after, name) / base if base else float(getattr(after, name) > 0)
            detail = f"{share:.4g} of the source's, at most {limit:g} asked"
            yield GateRecord(name=name, limit=limit, value=share, holds=share <= limit, detail=detail)
        if gates.tolerance is not None:
            broken = final.violations(gates.tolerance)
            for name, limit in gates.tolerance.limits().items():
                one = final.violations(Tolerance(**{name: limit})) if name not in ("atol", "rtol") else broken
                found = [f"`{output}` {text}" for output, texts in one.items() for text in texts]
                value = (final.needed.limits() if final.needed is not None else {}).get(name)
                yield GateRecord(
                    name=name, limit=limit, value=value, holds=not found, detail="; ".join(found[:3]) or "holds"
                )
        values = self._measure(self.state.outputs)
        for name, gate in gates.metric.items():
            value, base = values[name], self.source_metrics[name]
            if gate.drop is not None:
                detail = (
                    f"{value:.5g} against the source's {base:.5g}: drop {base - value:.4g}, at most {gate.drop:g} asked"
                )
                holds = base - value <= gate.drop + 1e-12
                yield GateRecord(
                    name=f"metric.{name}.drop", limit=gate.drop, value=base - value, holds=holds, detail=detail
                )
            if gate.min is not None:
                detail = f"{value:.5g}, at least {gate.min:g} asked"
                yield GateRecord(
                    name=f"metric.{name}.min", limit=gate.min, value=value, holds=value >= gate.min, detail=detail
                )

    def _evidence(
        self, failed: Sequence[str], final: Comparison | None, gates: tuple[GateRecord, ...], output: FileRecord | None
    ) -> Evidence:
        request = self.request
        kept = [step.cost for step in self.steps if step.cost is not None and step.verdict == "kept"]
        spec_bytes = Path(request.spec.name).stat().st_size if Path(request.spec.name).exists() else 0
        return Evidence(
            verdict="failed" if failed else "ok",
            reason="\n".join(failed),
            source=FileRecord(name=request.model.name, digest=self.source.digest, bytes=self.source.size),
            output=output,
            spec=FileRecord(name=Path(request.spec.name).name, digest=request.spec.digest, bytes=spec_bytes),
            target=request.spec.target.name,
            seed=request.seed,
            versions=versions(),
            notes=tuple(self.notes),
            calibration=_data_record(self.data.calibration),
            verification=_data_record(self.data.verification) or DataRecord(source="", digest="", samples=0),
            source_cost=CostRecord.of(self.origin.cost.report),
            source_metrics=self.source_metrics,
            steps=tuple(self.steps),
            final=None if final is None else ComparisonRecord.of(final),
            survey=cost.survey_metrics(self.origin.cost.report, self.state.cost.report) if kept else {},
            gates=gates,
        )


@dataclass
class _Attempt:
    """What a step led to."""

    previous: Comparison | None = None
    source: Comparison | None = None
    sites: Sequence[SiteError] = ()
    broken: str = ""


def _act(step: Pass, view: View) -> PassResult:
    if isinstance(step, Rewrite):
        return step.run(view)
    if isinstance(step, Compression):
        return _compress(step, view)
    raise PassError(f"`{step.pass_name()}` is neither a Rewrite nor a Compression")


def _compress(step: Compression, view: View) -> PassResult:
    """Let the pass name its sites, pick strengths on the graph as it came in, and apply them in topological order."""
    applied: list[Site] = []
    skipped: list[Skip] = []
    plan = []
    for site in step.sites(view):
        chosen = site if isinstance(site, Skip) else step.pick(site, step.choices(site, view))
        if isinstance(chosen, Skip):
            skipped.append(chosen)
        elif isinstance(site, Site):
            plan.append((site, chosen))
    for site, choice in plan:
        applied.append(step.apply(site, choice, view))
    return PassResult(tuple(applied), tuple(skipped))


def _judge(step: Pass, previous: Comparison, sites: Sequence[SiteError]) -> str:
    """Return how the contract broke, or nothing."""
    broken = previous.exact_violations() if step.kind == "exact" else {}
    broken = broken or previous.violations(step.tolerance or ANY)
    if broken:
        name, found = next(iter(broken.items()))
        kind = "is more than float reordering away" if step.kind == "exact" else "left its tolerance"
        return f"output `{name}` {kind}: {'; '.join(found)}"
    for error in sites:
        if not error.holds:
            nodes = ", ".join(error.site.nodes)
            return f"site {nodes} broke its own bound: |dy|/|x| is {error.gain:.4g}, promised {error.site.bound:.4g}"
    return ""


def _site_record(site: Site, error: SiteError | None) -> SiteRecord:
    return SiteRecord(
        nodes=site.nodes,
        note=site.note,
        bound=site.bound,
        measured=None if error is None else error.gain,
        relative_error=None if error is None else error.relative,
    )


def _data_record(data: DataSet | None) -> DataRecord | None:
    if data is None:
        return None
    return DataRecord(source=data.source, digest=data.digest, samples=data.samples, notes=tuple(data.notes))


def _metrics(spec: Spec, data: DataSet) -> dict[str, Metric] | None:
    """Return the metrics of the gates; None when labels are there but no metric is named."""
    if not spec.gates.metric:
        return None if data.has_labels else {}
    if not data.has_labels:
        raise SpecError(
            "gates.metric needs labels", spec.name, "Give `data.verification` a source with `labels: <key>`."
        )
    return {name: verify.find_metric(name, spec.base) for name in spec.gates.metric}


def _single(feeds: Feeds, model: ir.Model) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return one sample's feeds and shapes: every axis that has the batch's symbol is cut to 1.

    The batch's symbol is the open first axis of the first input that has one; unnamed open first axes count as well.
    """
    declared = {str(value.name): graph.declared_shape(value) or () for value in model.graph.inputs}
    symbols = [dims[0] for dims in declared.values() if dims and not isinstance(dims[0], int)]
    symbol = symbols[0] if symbols else ""
    single: dict[str, Any] = {}
    for name, value in feeds.items():
        if isinstance(value, np.ndarray) and symbols:
            open_axes = [axis for axis, dim in enumerate(declared[name]) if _is_batch(axis, dim, symbol)]
            for axis in open_axes:
                value = value.take([0], axis=axis) if value.shape[axis] else value
        single[name] = value
    return single, {name: value.shape for name, value in single.items() if isinstance(value, np.ndarray)}


def _is_batch(axis: int, dim: int | str | None, symbol: int | str | None) -> bool:
    return dim == symbol if isinstance(symbol, str) and symbol else axis == 0 and dim is None


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime")
    found = {name: installed_version(name) for name in packages}
    return {"ccompile": __version__, "python": platform.python_version(), **found}


__all__ = ["Batch", "Progress", "Request", "compile_model", "versions"]
