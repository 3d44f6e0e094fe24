"""A compile in progress: each step on a copy of the graph, checked, compared, priced, kept or reverted."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from ccompile import (
    contracts,
    cost,
    graph,
    locking,
    onnx_io,
    registry,
    runtime,
    snapshots,
)
from ccompile.acting import act, check_selectors
from ccompile.analysis.shapes import ValueType
from ccompile.caching import Cache, Kept, digest_of
from ccompile.comparison import class_axis, compare, rtol_of
from ccompile.core import Pass, PassResult, Site, View
from ccompile.cost import ModelCost
from ccompile.data import Data, DataSet, open_data
from ccompile.decisions import Decisions
from ccompile.errors import DataError, ModelError, Problem, SpecError
from ccompile.evidence import (
    ComparisonRecord,
    CostRecord,
    SiteRecord,
    SkipRecord,
    StepRecord,
    Verdict,
)
from ccompile.executor import Executor, InProcess
from ccompile.fingerprint import Inputs
from ccompile.metrics import Metric, find_metric, measure, top1
from ccompile.prices import Prices
from ccompile.recording import Recording
from ccompile.request import Request, check_external, dump_name, step_name
from ccompile.runtime import Feeds, Settings
from ccompile.sites import SiteError, site_errors
from ccompile.soundness import Constancy, refuse_random
from ccompile.spec import Spec
from ccompile.stats import Calibration
from ccompile.timing import Timer, interleaved
from ccompile.tolerance import Comparison, Tolerance
from ccompile.weakening import weakest


class Progress(Protocol):
    """Told what is running, in one line: `done` of `total` steps are finished."""

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show it."""
        ...


@dataclass
class State:
    """The graph as it stands, its outputs, the types of its values, and what it costs."""

    model: ir.Model
    outputs: Recording
    types: dict[str, ValueType]
    cost: ModelCost


@dataclass
class Attempt:
    """What a step led to: the new state unless the graph could not even run, and how the contract broke.

    `eased`: how far it went back from the strength that was asked for (0: not at all).
    """

    model: ir.Model
    result: PassResult
    state: State | None = None
    previous: Comparison | None = None
    source: Comparison | None = None
    sites: Sequence[SiteError] = ()
    unmeasured: Mapping[Site, str] = field(default_factory=dict)
    broken: str = ""
    eased: float = 0.0


@dataclass
class Run:
    """A compile in progress."""

    request: Request
    executor: Executor = field(default_factory=InProcess)
    steps: list[StepRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    progress: Progress = lambda text, done, total: None
    inputs: Inputs = field(default_factory=Inputs)
    keep: Callable[[Site], bool] = lambda site: True  # which planned sites a compression carries out
    running: tuple[str, int] = ("", 0)  # the step that runs, and its number
    decisions: Decisions = field(default_factory=Decisions)
    timer: Timer = interleaved
    verifying: float = 0.0  # seconds spent in verification runs: sessions made and inferences
    cache: Cache = field(default_factory=Cache)
    at: str = ""  # digest of the graph as it stands, as the cache knows it
    pending: dict[str, Any] | None = None  # where that graph is in the cache, when `state` is still an earlier one
    heard: list[str] = field(default_factory=list)  # what the running step noted

    def read(self) -> None:
        """Read model and data."""
        request, spec = self.request, self.request.spec
        self.settings = Settings(request.threads)
        self.source = onnx_io.load(request.model)
        check_external(request, self.source.external)
        self.data: Data = open_data(spec.data, self.source.model, spec.data_base or spec.base, request.seed)
        self.samples = self.data.verification.samples
        self._note(self.source.notes)
        self._note(self.data.notes)
        if request.lock is not None and request.is_held:
            locking.check_inputs(locking.read(request.lock), self.lock_inputs(), str(request.lock))
        self.at = self.source.digest
        self.cache.begin(request, self.source.digest, self.data)

    def open(self) -> None:
        """Read model and data, run the source once, price it."""
        self.read()
        self.begin()

    def begin(self) -> None:
        """Run the source once, price it."""
        request = self.request
        outputs = self._run_source()
        self.single, one = runtime.one_sample(next(iter(self.feeds())), self.source.model)
        if not one:
            self._note(["no single batch axis: costs are of one whole batch"])
        self.metrics = _metrics(request.spec, self.data.verification, outputs)
        self.source_metrics = self.measure(outputs)
        if undefined := [name for name, value in self.source_metrics.items() if math.isnan(value)]:
            hint = "No gate can hold against it: look at the labels, and at what the metric divides by."
            raise DataError.of(Problem(f"metric `{name}` is NaN on the source model", "", hint) for name in undefined)
        self.origin = self.state = self._state(self.source.model, outputs)
        self._note(self.origin.cost.notes)
        self.statistics = self._calibration()

    def _calibration(self) -> Calibration | None:
        data = self.data.calibration
        if data is None:
            return None
        batches: Callable[[], Iterable[Feeds]] = lambda: (batch.feeds for batch in data.batches())  # noqa: E731
        return Calibration(self.source.model, batches, self.settings, self.request.seed, tell=self._tell)

    def _tell(self, text: str) -> None:
        """Show what of the running step is under way."""
        name, number = self.running
        self.progress(f"{name}: {text}" if text else name, number, len(self.request.spec.passes) + 2)

    @property
    def _default(self) -> Tolerance:
        return contracts.default_tolerance(self.request.spec.gates)

    def _note(self, notes: Iterable[str]) -> None:
        found = list(notes)
        self.heard += found
        self.notes += [note for note in found if note not in self.notes]

    def feeds(self) -> Iterable[Feeds]:
        """Return the verification inputs, batch by batch."""
        return (batch.feeds for batch in self.data.verification.batches())

    def _run_source(self) -> Recording:
        """Return the source's outputs; hold them against the data's own expected outputs where it has some."""
        outputs, expected, constancy = Recording(), Recording(), Constancy()
        start = time.perf_counter()
        session = runtime.Session(self.source.model, self.settings)
        for batch in self.data.verification.batches():
            produced = session.run(batch.feeds)
            outputs.append(produced)
            constancy.add(produced, batch.samples)
            self.inputs.add(batch.feeds, batch.samples)
            if batch.labels is not None:
                self.labels.append(batch.labels)
            if batch.expected is not None:
                expected.append(batch.expected)
        first = next(iter(self.feeds()))
        refuse_random(self.source.model, session.run(first), next(iter(outputs)))
        self.verifying += time.perf_counter() - start
        self._note(constancy.notes)
        if len(expected) and len(expected) == len(outputs):
            pairs = zip(outputs, expected, strict=True)
            mine = [{name: found[name] for name in found if name in wanted} for found, wanted in pairs]
            needed = compare(mine, expected, self.samples).needed
            how = f"within relative L2 {needed.relative_l2:g}" if needed is not None else "NOT at all"
            self._note([f"the source reproduces the data's expected outputs {how}"])
        return outputs

    def measure(self, outputs: Recording) -> dict[str, float]:
        """Return the metrics of outputs on the verification samples."""
        return measure(self.metrics, outputs, self.labels)

    def types_of(self, model: ir.Model) -> dict[str, ValueType]:
        """Return the types of all values for one sample: inferred, and observed where inference does not know."""
        return runtime.types_of(model, self.single, self.settings)

    def price(self, model: ir.Model) -> ModelCost:
        """Return a graph's cost on the target for one sample."""
        return cost.price(model, self.types_of(model), self.request.spec.target)

    def _prices(self) -> Prices:
        request = self.request
        origin = self.origin.cost.report
        return Prices(origin, request.spec.target, self.types_of, self.single, request.threads, self.timer)

    def lock_inputs(self) -> locking.Inputs:
        """Return what the compile is made of, as a lock has it."""
        return locking.Inputs.of(self.request, self.source.digest, self.data)

    def _state(self, model: ir.Model, outputs: Recording) -> State:
        types = self.types_of(model)
        return State(model, outputs, types, cost.price(model, types, self.request.spec.target))

    def step(self, index: int, step: Pass) -> None:
        """Take a step from the cache, or run it and keep it there."""
        self.heard = []
        at = self.at
        if (kept := self.cache.find(index, step, at)) is not None:
            self._repeat_step(index, step, kept)
            return
        self.catch_up()
        self._run_step(index, step)
        record, prefix = self.steps[-1], step_name(index, step) + "/"
        after = None
        if record.verdict in ("kept", "weakened"):
            after = self.cache.keep_graph(self.state.model)
            self.at = digest_of(after) if after is not None else ""
        if after is not None or self.at:
            made = {key: made for key, made in self.decisions.made.items() if key.startswith(prefix)}
            self.cache.keep(index, step, at, Kept(record, tuple(self.heard), made, self.seconds[-1], after))

    def _repeat_step(self, index: int, step: Pass, kept: Kept) -> None:
        """Do what a step did, without its work; the graph is loaded when the next one needs it."""
        self.steps.append(kept.record)
        self.seconds.append(kept.seconds)
        self._note(kept.notes)
        self.decisions.made.update(kept.decisions)
        if kept.after is None:
            return
        self.at, self.pending = digest_of(kept.after), kept.after
        if self.request.dump is not None:
            onnx_io.save(self.cache.graph_of(kept.after), self.request.dump / dump_name(index, step))

    def catch_up(self) -> None:
        """Load the graph that the cache has led to, and run it."""
        if self.pending is None:
            return
        model, self.pending = self.cache.graph_of(self.pending), None
        outputs = Recording()
        for produced in runtime.outputs_of(model, self.feeds(), self.settings):
            outputs.append(produced)
        self.state = self._state(model, outputs)

    def _run_step(self, index: int, step: Pass) -> None:
        """Run one step on a copy; keep, revert, weaken or fail it."""
        start = time.perf_counter()
        self.running = f"step {index + 1} {step.pass_name()}", index + 1
        self._tell("")
        self._note(check_selectors(step, self.state.model, f"step {index + 1} {step.pass_name()}"))
        known: dict[Hashable, Any] = {}
        attempt = self._attempt(index, step, 0.0, known)
        reason = self._complaint(step, attempt) if attempt.broken else ""
        if reason and step.on_violation == "weaken":
            milder = weakest(lambda ease: self._attempt(index, step, ease, known))
            attempt = milder if milder is not None and milder.result.applied else attempt
        verdict: Verdict = "weakened" if attempt.eased else "kept"
        if attempt.broken:
            verdict = "failed" if step.on_violation == "fail" else "reverted"
        if self.request.dump is not None:
            onnx_io.save(attempt.model, self.request.dump / dump_name(index, step))
        self._note_unmeasured(index, step, attempt)
        self.steps.append(self._record(index, step, attempt, verdict, reason))
        if attempt.state is not None and not attempt.broken:
            self.state = attempt.state
        self.seconds.append(time.perf_counter() - start)

    def _complaint(self, step: Pass, attempt: Attempt) -> str:
        """Return how the contract broke, on what, where, and what would have passed."""
        reason = f"{attempt.broken} ({self.samples} samples, seed {self.request.seed})"
        if attempt.previous is None:
            return reason
        before, after, sites = self.state.model, attempt.model, attempt.result.applied
        text = contracts.advice(step, before, after, sites, attempt.previous, self.feeds, self.settings, self._default)
        return reason + "\n" + text if text else reason

    def _note_unmeasured(self, index: int, step: Pass, attempt: Attempt) -> None:
        if unmeasured := attempt.unmeasured:
            site, reason = next(iter(unmeasured.items()))
            share = f"{len(unmeasured)} of {len(unmeasured) + len(attempt.sites)} sites"
            where = f"step {index + 1} {step.pass_name()}: bound not measured at {share}"
            self._note([f"{where}, first {', '.join(site.nodes)}: {reason}"])

    def _act(self, index: int, step: Pass, model: ir.Model, ease: float, known: dict[Hashable, Any]) -> PassResult:
        rng = np.random.default_rng([self.request.seed, index])
        view = View(
            model,
            self.request.spec.target,
            rng,
            step,
            graph.facts,
            lambda values: runtime.evaluate(values, self.settings),
            self.statistics,
            self._prices(),
            self.executor,
            self._tell,
            registry.find,
            partial(self.decisions.decide, step_name(index, step)),
            _results=known,
        )
        result = act(step, view, ease, self.keep)
        graph.remove_dead(model.graph)
        graph.name_nodes(model.graph)
        return result

    def _attempt(self, index: int, step: Pass, ease: float, known: dict[Hashable, Any]) -> Attempt:
        """Run a step on a copy of the graph, `ease` of the way back from its strength; `known`: computed before."""
        model = graph.copy(self.state.model)
        result = self._act(index, step, model, ease, known)
        self._tell("verification")
        attempt = self._verified(step, model, result)
        attempt.eased = ease
        return attempt

    def _verified(self, step: Pass, model: ir.Model, result: PassResult) -> Attempt:
        before = self.state
        if not result.applied:
            previous = compare(before.outputs, before.outputs, self.samples)
            source = compare(before.outputs, self.origin.outputs, self.samples)
            return Attempt(model, result, before, previous, source)
        if graph.signature(model) != graph.signature(self.source.model):
            return Attempt(model, result, broken="the model's inputs or outputs are not what they were")
        if (complaint := onnx_io.check(model)) and not onnx_io.check(before.model):
            return Attempt(model, result, broken=f"ONNX's checker refuses the graph: {complaint}")
        outputs = Recording()
        start = time.perf_counter()
        try:
            for produced in runtime.outputs_of(model, self.feeds(), self.settings):
                outputs.append(produced)
        except ModelError as error:
            return Attempt(model, result, broken=str(error))
        self.verifying += time.perf_counter() - start
        rtol = rtol_of(step.tolerance)
        previous = compare(outputs, before.outputs, self.samples, rtol)
        source = compare(outputs, self.origin.outputs, self.samples, rtol)
        bounded = [site for site in result.applied if site.bound is not None]
        first = next(iter(self.feeds()))
        sites, unmeasured = site_errors(before.model, model, bounded, first, self.settings)
        broken = contracts.broken(step, previous, sites, result.applied, unmeasured, self._default)
        return Attempt(model, result, self._state(model, outputs), previous, source, sites, unmeasured, broken)

    def _record(self, index: int, step: Pass, attempt: Attempt, verdict: Verdict, reason: str) -> StepRecord:
        result = attempt.result
        errors = {error.site: error for error in attempt.sites}
        state = attempt.state
        weights = {}
        if step.kind == "lossy":
            weights = snapshots.weights_of(self.state.model, attempt.model, result.applied)
        sites = [
            SiteRecord.of(site, errors.get(site), attempt.unmeasured.get(site, ""), weights.get(site))
            for site in result.applied
        ]
        nodes = list((state or self.state).model.graph)
        return StepRecord(
            index=index + 1,
            name=step.pass_name(),
            options=step.given(),
            contract=step.kind,
            tolerance=step.tolerance,
            verdict=verdict,
            reason=reason,
            weakened=attempt.eased,
            applied=tuple(sites),
            skipped=tuple(SkipRecord.of(skip) for skip in result.skipped),
            against_previous=None if attempt.previous is None else ComparisonRecord.of(attempt.previous),
            against_source=None if attempt.source is None else ComparisonRecord.of(attempt.source),
            metrics=self.measure(state.outputs) if state is not None else {},
            cost=CostRecord.of(state.cost.report) if state is not None else None,
            nodes=len(nodes),
            ops=dict(sorted(collections.Counter(node.op_type for node in nodes).items())),
            change=snapshots.change_of(self.state.model, attempt.model),
        )


def _metrics(spec: Spec, data: DataSet, outputs: Recording) -> dict[str, Metric]:
    """Return the metrics that the gates name; with labels and none named, top1 where an output has scores."""
    if spec.gates.metric and not data.has_labels:
        raise SpecError(
            "gates.metric needs labels", spec.name, "Give `data.verification` a source with `labels: <key>`."
        )
    if spec.gates.metric:
        return {name: find_metric(name, spec.base) for name in spec.gates.metric}
    values = next(iter(outputs)).values() if data.has_labels else ()
    scores = (value for value in values if isinstance(value, np.ndarray) and value.ndim == 2)
    return {"top1": top1} if any(class_axis(value) is not None for value in scores) else {}
