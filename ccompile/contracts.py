"""Did a step keep its promise, did the result pass its gates, and what to say when not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from ccompile.comparison import rtol_of
from ccompile.core import CostReport, Kind, Pass, Site
from ccompile.evidence import GateRecord
from ccompile.runtime import Feeds, Settings, Timing
from ccompile.sites import SiteError, blame
from ccompile.spec import Gates
from ccompile.tolerance import Comparison, OutputComparison, Tolerance, is_inexact

ANY = Tolerance.model_construct(
    relative_l2=math.inf
)  # what a lossy step without a tolerance must keep: shapes, types, finite values, and integers
DECIDING = Tolerance.model_construct(relative_l2=math.inf, argmax=0.0)  # the same, where a gate bounds moved integers


def broken(
    step: Pass,
    previous: Comparison,
    sites: Sequence[SiteError],
    applied: Sequence[Site] = (),
    unmeasured: Mapping[Site, str] = MappingProxyType({}),
    default: Tolerance = ANY,
) -> str:
    """Return how the step's contract broke, or nothing. `previous`: against the graph that the step was given.

    A bounded pass owes a bound, and a measurement of it, at every site that it `applied`; `unmeasured` says why not.
    `default`: what holds for a step without a tolerance.
    """
    if reason := left(step.kind, step.tolerance or default, previous):
        return reason
    for error in sites:
        if not error.holds:
            nodes = ", ".join(error.site.nodes)
            return f"site {nodes} broke its own bound: |dy|/|x| is {error.gain:.4g}, promised {error.site.bound:.4g}"
    for site in applied if step.kind == "bounded" else ():
        nodes = ", ".join(site.nodes)
        if site.bound is None:
            return f"site {nodes} states no bound, which a bounded pass owes everywhere"
        if site in unmeasured:
            return f"the bound of site {nodes} could not be measured: {unmeasured[site]}"
    return ""


def left(kind: Kind, tolerance: Tolerance, previous: Comparison) -> str:
    """Return how the first output left a contract of this kind and tolerance, or nothing."""
    for what, violations in _violations(kind, tolerance, previous):
        for name, found in violations.items():
            return f"output `{name}` {what}: {'; '.join(found)}"
    return ""


def default_tolerance(gates: Gates) -> Tolerance:
    """Return what a step without a tolerance must keep; integers may move where a gate on argmax says how many."""
    return DECIDING if gates.tolerance is not None and gates.tolerance.argmax is not None else ANY


def _violations(kind: Kind, tolerance: Tolerance, previous: Comparison) -> Iterator[tuple[str, dict[str, list[str]]]]:
    yield "cannot be judged", previous.unjudged
    if kind == "exact":
        yield "is more than float reordering away", previous.exact_violations()
    yield "left its tolerance", previous.violations(tolerance)


def advice(
    step: Pass,
    before: ir.Model,
    after: ir.Model,
    sites: Sequence[Site],
    previous: Comparison,
    batches: Callable[[], Iterable[Feeds]],
    settings: Settings,
    default: Tolerance = ANY,
) -> str:
    """Return lines that name the first guilty site and the tolerance that would have passed."""

    def breaks(output: OutputComparison) -> bool:
        one = Comparison((output,), previous.samples)
        return not one.unjudged and bool(left(step.kind, step.tolerance or default, one))

    lines = []
    rtol = rtol_of(step.tolerance)
    guilty = blame(before, after, sites, batches, breaks, settings, rtol)
    if guilty is not None:
        nodes = ", ".join(guilty.site.nodes)
        bound = f", bound {guilty.site.bound:.3g}" if guilty.site.bound is not None else ""
        error = guilty.comparison.relative_l2
        lines.append(f"  First site to leave it: {nodes} (relative L2 {error:.3g} at its output{bound}).")
    if step.kind != "exact" and (passing := passing_tolerance(step.tolerance, previous)) is not None:
        lines.append(f"  Give the step `tolerance: {passing}`, which would have passed, or ask for less compression.")
    return "\n".join(lines)


def passing_tolerance(asked: Tolerance | None, comparison: Comparison) -> Tolerance | None:
    """Return the smallest tolerance with the limits of `asked` that would have passed, if any can.

    All limits where `asked` is None or none of its limits means anything on these outputs.
    """
    needed = comparison.needed
    if needed is None:
        return None
    measured = needed.limits()
    wanted = asked.limits() if asked is not None else measured
    limits = {name: measured[name] for name in wanted if name in measured}
    if comparison.decided:
        limits["argmax"] = measured["argmax"]
    if "rtol" in wanted:
        limits |= {"rtol": wanted["rtol"], "atol": measured["atol"]}
    return Tolerance(**(limits or measured))


def gate_records(
    gates: Gates,
    before: CostReport,
    after: CostReport,
    final: Comparison,
    metrics: tuple[Mapping[str, float], Mapping[str, float]],
    race: Timing | None,
) -> Iterator[GateRecord]:
    """Yield one record per gate. `final`: against the source; `metrics`: of the source and of the result."""
    yield from _cost_gates(gates, before, after, race)
    yield from _accuracy_gates(gates, final)
    yield from _metric_gates(gates, *metrics)


def _cost_gates(gates: Gates, before: CostReport, after: CostReport, race: Timing | None) -> Iterator[GateRecord]:
    for name, limit in gates.shares.items():
        if name == "measured_seconds":
            share = 1 / race.ratio if race is not None else math.nan
        else:
            base = getattr(before, name)
            share = getattr(after, name) / base if base else float(getattr(after, name) > 0)
        detail = f"{share:.4g} of the source's, at most {limit:g} asked"
        yield GateRecord(name=name, limit=limit, value=share, holds=share <= limit, detail=detail)


def _accuracy_gates(gates: Gates, final: Comparison) -> Iterator[GateRecord]:
    if gates.tolerance is None:
        return
    passing = passing_tolerance(gates.tolerance, final)
    for name, limit in gates.tolerance.limits().items():
        single = name not in ("atol", "rtol")
        judged = final
        if name == "argmax" and len(gates.tolerance.limits()) > 1:  # the others judge what has no class axis
            judged = Comparison(tuple(o for o in final.outputs if o.argmax is not None or o.problem), final.samples)
        elif gates.tolerance.argmax is not None and final.decided:  # argmax judges what is an integer
            close = tuple(o for o in final.outputs if is_inexact(o.dtype) or o.problem)
            judged = Comparison(close or final.outputs, final.samples)
            single = single and bool(close)
        violations = judged.violations(Tolerance(**{name: limit}) if single else gates.tolerance)
        found = [f"`{output}` {text}" for output, texts in violations.items() for text in texts]
        value = passing.limits().get(name) if passing is not None else None
        measured = f"{value:g} measured" if value is not None else "only integers, which argmax judges"
        detail = "; ".join(found[:3]) if found else f"{measured}, {limit:g} asked"
        yield GateRecord(name=name, limit=limit, value=value, holds=not found, detail=detail)


def _metric_gates(gates: Gates, before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[GateRecord]:
    for name, gate in gates.metric.items():
        value, base = after[name], before[name]
        if gate.drop is not None:
            drop = base - value
            text = f"{value:.5g} against the source's {base:.5g}: drop {drop:.4g}, at most {gate.drop:g} asked"
            holds = drop <= gate.drop + 1e-12
            yield GateRecord(name=f"metric.{name}.drop", limit=gate.drop, value=drop, holds=holds, detail=text)
        if gate.min is not None:
            text = f"{value:.5g}, at least {gate.min:g} asked"
            yield GateRecord(
                name=f"metric.{name}.min", limit=gate.min, value=value, holds=value >= gate.min, detail=text
            )
