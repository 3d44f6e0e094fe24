"""Run a compiled model and judge it by its evidence: the file, its inputs, outputs, accuracy, cost and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ccompile import contracts, cost, onnx_io, runtime
from ccompile.cases import Case, gate_case, gates_of, known_metrics, timing_of
from ccompile.checks.artifact import artifact_cases, build_cases
from ccompile.checks.data import changed_inputs, data_cases, opened
from ccompile.checks.outputs import cost_cases, drift_case, metric_cases, source_cases
from ccompile.comparison import compare, rtol_of
from ccompile.core import CostReport
from ccompile.errors import DataError, ModelError
from ccompile.evidence import Evidence, versions
from ccompile.fingerprint import Inputs, prints_of
from ccompile.metrics import find_metric, measure
from ccompile.prints import Fingerprint, InputRecord, OutputPrintRecord
from ccompile.recording import Recording
from ccompile.runtime import Level, Settings, Timing
from ccompile.spec import Gates, Spec
from ccompile.target import Target, load_target, target_names
from ccompile.tolerance import Comparison, Tolerance

SLOWER = 0.1  # share of the recorded speed-up that may be lost
SLOWER_ALONE = 0.5  # share that an inference may take longer than recorded, where only times can be compared
METRIC_DROP = 0.002


@dataclass(frozen=True)
class Check:
    """What is checked against what. `base`: where relative paths of the recorded data start.

    against: the source model; spec: of the build; data: in place of the recorded verification data; drift: how far
    outputs may be from the recorded ones, float reordering by default; metric_drop: in the metric's own unit; slower: a
    share, SLOWER or SLOWER_ALONE by default; other_data: the samples need not be those recorded.
    """

    output: Path
    evidence: Evidence
    base: Path
    against: Path | None = None
    spec: Spec | None = None
    data: Path | None = None
    drift: Tolerance | None = None
    metric_drop: float = METRIC_DROP
    slower: float | None = None
    timing: bool = False
    other_data: bool = False
    threads: int = 0
    level: Level = "none"


@dataclass(frozen=True)
class Checked:
    """What was judged, on what data, and what else is to be known."""

    cases: tuple[Case, ...]
    data: str
    notes: tuple[str, ...]

    @property
    def broken(self) -> list[Case]:
        """Return the cases that broke."""
        return [case for case in self.cases if case.verdict == "broken"]


def check_build(asked: Check) -> Checked:
    """Run a compiled model and judge it by its evidence.

    Raises CcompileError when it cannot be judged: the evidence is of a failed compile or of another model, data or
    models cannot be read, or a limit cannot be held against what was recorded.
    """
    if asked.evidence.output is None or asked.evidence.fingerprint is None:
        raise DataError(
            "the evidence is of a compile that wrote no model, or of an older ccompile", "", "Compile again."
        )
    if wrong := sorted((asked.drift.limits() if asked.drift is not None else {}).keys() - {"relative_l2", "argmax"}):
        raise DataError(
            f"{', '.join(wrong)} cannot be judged: the evidence holds sketches of the outputs, not their elements",
            "",
            "Give --relative-l2 or --argmax; or leave out --evidence, and give --against.",
        )
    if asked.timing and asked.against is None and "measured" not in asked.evidence.timing:
        hint = "Give --against SOURCE to race them, or compile with --measure."
        raise DataError("the evidence holds no measured time to hold --timing against", "", hint)
    run = _Check(asked, asked.evidence.fingerprint)
    cases = (*run.static_cases(), *run.running_cases())
    return Checked(cases, run.data.source, (*_moved_versions(asked.evidence), *run.model.notes, *run.notes))


def _moved_versions(evidence: Evidence) -> Iterator[str]:
    for name, now in versions().items():
        if (then := evidence.versions.get(name)) != now:
            yield f"{name} is {now}, {then or 'unknown'} at the compile"


@dataclass
class _Check:
    """A check in progress."""

    asked: Check
    recorded: Fingerprint
    labels: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        asked = self.asked
        self.evidence = asked.evidence
        self.settings = Settings(asked.threads, level=asked.level)
        self.model = onnx_io.load(asked.output, finite=False)
        self.source = onnx_io.load(asked.against) if asked.against is not None else None
        self._refuse_other_interface()
        self.data, self.notes = opened(asked.evidence, asked.spec, asked.data, self.model.model, asked.base)
        self.gates: Gates = gates_of(asked.evidence.gates) if asked.spec is None else asked.spec.gates

    def _refuse_other_interface(self) -> None:
        """Raise ModelError when this is another model altogether."""
        for model, path in ((self.model, self.asked.output), (self.source, self.asked.against)):
            if model is None:
                continue
            mine = _names(model.model.graph.inputs), _names(model.model.graph.outputs)
            theirs = (
                sorted(found.name for found in self.recorded.inputs),
                sorted(found.name for found in self.recorded.outputs),
            )
            if mine != theirs:
                what, recorded = (f"{', '.join(names)} to {', '.join(outs)}" for names, outs in (mine, theirs))
                message = f"it maps {what}, the model of the evidence {recorded}"
                raise ModelError(message, str(path), "Is it the evidence of this model?")

    def static_cases(self) -> Iterator[Case]:
        """Yield what needs no inference: the file, what it was built from, and what was judged at the compile."""
        yield from artifact_cases(self.model, self.evidence, self.recorded)
        yield from build_cases(self.model.model, self.evidence, self.asked.spec, self.source)
        for step in self.evidence.steps:
            yield Case("contract", f"{step.index} {step.name}", "holds", f"{step.verdict} at the compile")

    def running_cases(self) -> Iterator[Case]:
        """Yield what a run of the model tells; where it does not run, that."""
        outputs, inputs = Recording(), Inputs()
        session: runtime.Session | None = None
        for batch in self.data.batches():
            inputs.add(batch.feeds, batch.samples)
            if batch.labels is not None:
                self.labels.append(batch.labels)
            try:
                session = session or runtime.Session(self.model.model, self.settings)
                outputs.append(session.run(batch.feeds))
            except ModelError as error:
                yield Case("artifact", "runs", "broken", str(error))
                return
        yield Case("artifact", "runs", "holds", f"on {self.data.samples} samples")
        changes = changed_inputs([InputRecord.of(found) for found in inputs.prints], self.recorded.inputs)
        yield from data_cases(changes, self.asked.other_data)
        same = all(change.same for change in changes)
        yield from self._output_cases(outputs, same)
        yield from self._judged(outputs, same)

    def _output_cases(self, outputs: Recording, same: bool) -> Iterator[Case]:
        now = {found.name: OutputPrintRecord.of(found) for found in prints_of(outputs)}
        for then in self.recorded.outputs:
            if same and then.name in now:
                yield drift_case(now[then.name], then, self.asked.drift)
            else:
                yield Case("output", then.name, "not judged", "it was recorded on other samples")

    def _judged(self, outputs: Recording, same: bool) -> Iterator[Case]:
        """Yield accuracy, cost, distance to the source, gates and speed."""
        names = {**self.evidence.source_metrics, **self.gates.metric}
        base = self.asked.base if self.asked.spec is None else self.asked.spec.base
        metrics = measure({name: find_metric(name, base) for name in names}, outputs, self.labels)
        yield from metric_cases(metrics, known_metrics(self.evidence.result_metrics), self.asked.metric_drop)
        price = self._price()
        recorded = self.evidence.result_cost.report()
        if price is None:
            yield Case("cost", "target", "not judged", f"`{self.evidence.target}` is no known target: give --spec")
        else:
            yield from cost_cases(price, recorded)
        final = self._against_source(outputs)
        if final is not None and self.evidence.final is not None and same:
            yield from source_cases(final, self.evidence.final.comparison(), self.asked.drift)
        race = self._race()
        yield from self._gate_cases(price or recorded, final, metrics, race)
        if race is not None:
            yield self._timing_case(race)

    def _price(self) -> CostReport | None:
        target: Target | None = self.asked.spec.target if self.asked.spec is not None else None
        if target is None and self.evidence.target in target_names():
            target = load_target(self.evidence.target, Path())
        if target is None:
            return None
        types = runtime.types_of(self.model.model, self._single(), Settings(self.asked.threads))
        return cost.price(self.model.model, types, target).report

    def _single(self) -> dict[str, Any]:
        return runtime.one_sample(next(self.data.batches()).feeds, self.model.model)[0]

    def _against_source(self, outputs: Recording) -> Comparison | None:
        if self.source is None:
            return None
        feeds = (batch.feeds for batch in self.data.batches())
        theirs = runtime.outputs_of(self.source.model, feeds, Settings(self.asked.threads))
        return compare(outputs, theirs, self.data.samples, rtol_of(self.gates.tolerance))

    def _race(self) -> Timing | None:
        """Return today's times, in turns with the source, or alone where it is not given."""
        if not self.asked.timing:
            return None
        reference = self.model if self.source is None else self.source
        return runtime.race(self.model.model, reference.model, self._single(), self.asked.threads)

    def _gate_cases(
        self, price: CostReport, final: Comparison | None, metrics: Mapping[str, float], race: Timing | None
    ) -> Iterator[Case]:
        """Yield each gate judged on what was measured today, or why it could not be."""
        gates, missing = self._judgeable(final, metrics, race)
        before = known_metrics(self.evidence.source_metrics)
        none = Comparison((), self.data.samples)
        records = contracts.gate_records(
            gates, self.evidence.source_cost.report(), price, final or none, (before, metrics), race
        )
        yield from map(gate_case, records)
        yield from missing

    def _judgeable(
        self, final: Comparison | None, metrics: Mapping[str, float], race: Timing | None
    ) -> tuple[Gates, Sequence[Case]]:
        """Return the gates that can be judged, and a case for each of the others."""
        raced = race is not None and self.source is not None
        before = self.evidence.source_metrics
        metric = {name: gate for name, gate in self.gates.metric.items() if name in metrics and name in before}
        changes: dict[str, Any] = {"metric": metric}
        missing = {f"metric.{name}": "it was not measured" for name in self.gates.metric if name not in metric}
        if final is None and self.gates.tolerance is not None:
            names = self.gates.tolerance.limits()
            changes |= dict.fromkeys(names)
            missing |= dict.fromkeys(names, "give --against SOURCE")
        if self.gates.measured_seconds is not None and not raced:
            changes["measured_seconds"] = None
            missing["measured_seconds"] = "give --timing and --against SOURCE"
        cases = [Case("gate", name, "not judged", reason) for name, reason in missing.items()]
        return self.gates.model_copy(update=changes), cases

    def _timing_case(self, race: Timing) -> Case:
        then = self.evidence.timing.get("measured")
        recorded = timing_of(then) if then else None
        if self.source is not None:
            return _ratio_case(race, recorded.ratio if recorded is not None else 1.0, self.asked.slower)
        assert recorded is not None  # check_build refuses this
        share = SLOWER_ALONE if self.asked.slower is None else self.asked.slower
        limit = recorded.seconds * (1 + share)
        detail = f"{race.seconds:.3g} s, recorded {recorded.seconds:.3g} s, at most {limit:.3g} s allowed"
        return _timing("seconds", race.seconds <= limit, detail, race.seconds / recorded.seconds - 1)


def _ratio_case(race: Timing, recorded: float, slower: float | None) -> Case:
    """Return whether the speed-up over the source is kept: it broke when even the upper quartile is below the limit."""
    limit = recorded * (1 - (SLOWER if slower is None else slower))
    quartiles = f"quartiles {race.low:.3g} to {race.high:.3g}, {race.rounds} pairs"
    detail = f"{race.ratio:.3g} times the source's speed ({quartiles}), recorded {recorded:.3g}, at least {limit:.3g}"
    return _timing("ratio", race.high >= limit, detail, 1 - race.high / recorded)


def _timing(name: str, holds: bool, detail: str, needed: float) -> Case:
    passing = "" if holds else f"--slower {needed + 0.005:.2f} would have passed."
    return Case("timing", name, "holds" if holds else "broken", detail, passing)


def _names(values: Sequence[Any]) -> list[str]:
    return sorted(str(value.name) for value in values)
