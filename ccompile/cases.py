"""What a compile or a check judged, one case per contract, gate and comparison; and recorded evidence judged anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ccompile import contracts
from ccompile.core import Pass, Site
from ccompile.errors import DataError, Problem, SpecError
from ccompile.evidence import Evidence, GateRecord, StepRecord
from ccompile.runtime import Timing
from ccompile.sites import SiteError
from ccompile.spec import Gates, MetricGate
from ccompile.tolerance import Comparison, Tolerance

Verdict = Literal["holds", "broken", "not judged"]
_JUDGING = ("tolerance", "on_violation")  # options of a step that only judge it


@dataclass(frozen=True)
class Case:
    """One thing that was judged: how far, where, and in `passing` what limit would have passed, if any can."""

    group: str
    name: str
    verdict: Verdict
    detail: str
    passing: str = ""

    def __str__(self) -> str:
        text = f"{self.group} {self.name}: {self.detail}"
        return f"{text}\n  {self.passing}" if self.passing else text


def recorded(evidence: Evidence) -> list[Case]:
    """Return the contracts and gates of a compile as it judged them."""
    return [*map(_contract, evidence.steps), *map(gate_case, evidence.gates)]


def gate_case(gate: GateRecord) -> Case:
    """Return the case of a gate."""
    passing = ""
    if not gate.holds and gate.value is not None and math.isfinite(gate.value):
        passing = f"A limit of {gate.value:.6g} would pass."
    return Case("gate", gate.name, "holds" if gate.holds else "broken", gate.detail, passing)


def _contract(step: StepRecord) -> Case:
    reason, _, advice = step.reason.partition("\n")
    done = f"{step.verdict}, {len(step.applied)} sites"
    if step.verdict == "failed":
        return _case_of(step, reason, " ".join(advice.split()))
    return Case("contract", _name(step), "holds", f"{done}: {reason}" if reason else done)


def _name(step: StepRecord) -> str:
    return f"{step.index} {step.name}"


def _case_of(step: StepRecord, broken: str, passing: str = "") -> Case:
    return Case("contract", _name(step), "broken" if broken else "holds", broken or step.verdict, passing)


def rejudged(
    evidence: Evidence, passes: Sequence[Pass] | None, gates: Gates | None, limits: Mapping[str, float]
) -> list[Case]:
    """Return recorded contracts and gates under other limits, without running anything.

    passes, gates: of the spec that has them, None for those recorded; limits: of gates, which override. Raises
    SpecError when the spec has other steps than were compiled, DataError when the evidence does not hold what a limit
    needs.
    """
    wanted = gates_with(gates_of(evidence.gates) if gates is None else gates, limits)
    judging = _judging(evidence, passes)
    default = contracts.default_tolerance(wanted)
    cases = [_rejudge(step, asked, default) for step, asked in zip(evidence.steps, judging, strict=True)]
    if evidence.final is None:
        raise DataError("the compile failed before its result was compared: nothing to judge anew")
    return [*cases, *map(gate_case, _gates_again(evidence, wanted, evidence.final.comparison()))]


def _judging(evidence: Evidence, passes: Sequence[Pass] | None) -> list[Tolerance | None]:
    """Return the tolerance that each step is judged by; raises SpecError when these are not the steps recorded."""
    if passes is None:
        return [step.tolerance for step in evidence.steps]
    problems = []
    if [step.pass_name() for step in passes] != [step.name for step in evidence.steps]:
        problems = [Problem(f"the compile ran {', '.join(step.name for step in evidence.steps)}", "passes")]
    for step, asked in zip(evidence.steps, passes, strict=False):
        if not problems and _work(step.options) != _work(asked.given()):
            problems.append(Problem(f"step {_name(step)} was compiled with other options", f"passes[{step.index - 1}]"))
    if problems:
        last = problems.pop()
        raise SpecError.of(
            [*problems, Problem(last.message, last.where, "Only tolerances and gates can be judged anew: compile.")]
        )
    return [asked.tolerance for asked in passes]


def _work(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _JUDGING}


def _rejudge(step: StepRecord, asked: Tolerance | None, default: Tolerance) -> Case:
    if step.verdict == "reverted":
        return _contract(step)
    if step.against_previous is None:
        return _contract(step)  # it did not even run: no tolerance changes that
    _check_rtol(asked, step.tolerance, f"step {_name(step)}")
    previous = step.against_previous.comparison()
    broken = contracts.left(step.contract, asked or default, previous) or _broken_bound(step)
    passing = ""
    if broken and step.contract != "exact" and (needed := contracts.passing_tolerance(asked, previous)) is not None:
        passing = f"`tolerance: {needed}` would pass."
    return _case_of(step, broken, passing)


def _broken_bound(step: StepRecord) -> str:
    for site in step.applied:
        if site.bound is None or site.measured is None:
            continue
        error = SiteError(Site(site.nodes, bound=site.bound), site.measured, site.relative_error or 0.0)
        if not error.holds:
            return f"site {', '.join(site.nodes)} broke its own bound: {site.measured:.4g} > {site.bound:.4g}"
    return ""


def _check_rtol(asked: Tolerance | None, recorded: Tolerance | None, where: str) -> None:
    """Refuse a smaller `rtol` than was recorded: what is left of each element then is not known."""
    now, then = ((tolerance.rtol or 0.0) if tolerance is not None else 0.0 for tolerance in (asked, recorded))
    if now < then:
        raise DataError(
            f"`rtol` {now:g} is less than the {then:g} that was recorded", where, "Check without rejudging."
        )


def gates_of(records: Sequence[GateRecord]) -> Gates:
    """Return the gates that were judged."""
    plain: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}
    for gate in records:
        if gate.name.startswith("metric."):
            name, _, limit = gate.name.removeprefix("metric.").rpartition(".")
            metrics.setdefault(name, {})[limit] = gate.limit
        else:
            plain[gate.name] = gate.limit
    return Gates(**plain, metric={name: MetricGate(**limits) for name, limits in metrics.items()})


def gates_with(gates: Gates, limits: Mapping[str, float]) -> Gates:
    """Return gates of which some have other limits."""
    return gates.model_copy(update=dict(limits))


def _gates_again(evidence: Evidence, gates: Gates, final: Comparison) -> Iterator[GateRecord]:
    _check_rtol(gates.tolerance, gates_of(evidence.gates).tolerance, "gates")
    before, after = (known_metrics(found) for found in (evidence.source_metrics, evidence.result_metrics))
    for name in gates.metric:
        if name not in before or name not in after:
            raise DataError(
                f"metric `{name}` was not measured by the compile", "gates.metric", "Check without rejudging."
            )
    raced = evidence.timing.get("measured")
    if gates.measured_seconds is not None and not raced:
        raise DataError("nothing was timed by the compile", "gates.measured_seconds", "Check with --timing.")
    race = timing_of(raced) if raced else None
    costs = evidence.source_cost.report(), evidence.result_cost.report()
    return contracts.gate_records(gates, *costs, final, (before, after), race)


def known_metrics(found: Mapping[str, float | None]) -> dict[str, float]:
    """Return recorded metrics; NaN is null in JSON."""
    return {name: math.nan if value is None else value for name, value in found.items()}


def timing_of(raced: Mapping[str, Any]) -> Timing:
    """Return a recorded race. Raises DataError when it is not one."""
    try:
        return Timing(**{name: value for name, value in raced.items() if name != "threads"})
    except TypeError as error:
        raise DataError(f"the evidence's `timing.measured` is damaged: {error}") from error
