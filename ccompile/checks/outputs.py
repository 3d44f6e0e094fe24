"""Outputs, accuracy and cost of today against those recorded: how far, what was allowed, what would have passed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from ccompile.cases import Case
from ccompile.core import CostReport
from ccompile.numerics import sketch
from ccompile.prints import OutputPrintRecord
from ccompile.tolerance import EXACT_RELATIVE_L2, Comparison, OutputComparison, Tolerance, is_inexact, round_up


def allowed(dtype: str, drift: Tolerance | None) -> float:
    """Return the relative L2 that an output may be from the recorded one: float reordering, or what drift says."""
    if drift is not None:
        return math.inf if drift.relative_l2 is None else drift.relative_l2
    return EXACT_RELATIVE_L2.get(dtype, EXACT_RELATIVE_L2["float32"])


def drift_case(now: OutputPrintRecord, then: OutputPrintRecord, drift: Tolerance | None) -> Case:
    """Return whether an output is the recorded one, judged by its sketches where it is not bit by bit."""
    if now.digest == then.digest:
        return Case("output", now.name, "holds", "as recorded, bit by bit")
    if (now.dtype, now.elements, now.positions) != (then.dtype, then.elements, then.positions):
        detail = f"{now.elements} elements of {now.dtype}, recorded {then.elements} of {then.dtype}"
        return Case("output", now.name, "broken", detail)
    if now.strange != then.strange:
        return Case("output", now.name, "broken", f"{now.strange} NaN or infinite elements, recorded {then.strange}")
    return _moved(now, then, drift)


def _moved(now: OutputPrintRecord, then: OutputPrintRecord, drift: Tolerance | None) -> Case:
    inexact, broken, passing = is_inexact(now.dtype), [], {}
    relative = _relative(now, then)
    if inexact and relative > (limit := allowed(now.dtype, drift)):
        broken.append(f"relative L2 about {relative:.3g} > {limit:.3g}")
    agreement = _agreement(now, then)
    least = drift.argmax if drift is not None else None
    if least is None and not inexact:
        least = 1.0
    if agreement is not None and least is not None and agreement < least:
        what = "rows keep their largest entry" if inexact else "elements are the same"
        broken.append(f"about {agreement:.2%} of {now.positions} {what}, {least:.2%} asked")
    if inexact and drift is not None and drift.relative_l2 is None and agreement is None:
        broken.append("--argmax says nothing about it, it has no class axis: give --relative-l2 as well")
    if inexact and math.isfinite(relative):
        passing["relative-l2"] = round_up(relative)
    if agreement is not None and least is not None:
        passing["argmax"] = math.floor(agreement * 1e6) / 1e6
    if not broken:
        return Case("output", now.name, "holds", _said(relative, agreement, inexact))
    options = " ".join(f"--{name} {value:g}" for name, value in passing.items())
    return Case("output", now.name, "broken", "; ".join(broken), f"{options} would pass." if options else "")


def _said(relative: float, agreement: float | None, inexact: bool) -> str:
    texts = [f"relative L2 about {relative:.3g}"] if inexact else []
    texts += [f"about {agreement:.2%} agree"] if agreement is not None else []
    return "from the recorded: " + ", ".join(texts)


def _relative(now: OutputPrintRecord, then: OutputPrintRecord) -> float:
    error = sketch.distance(now.sketch("values"), then.sketch("values"))
    return error / then.norm if then.norm else (math.inf if error else 0.0)


def _agreement(now: OutputPrintRecord, then: OutputPrintRecord) -> float | None:
    if not then.positions:
        return None
    moved = sketch.distance(now.sketch("decisions"), then.sketch("decisions")) ** 2 / 2
    return max(1 - moved / then.positions, 0.0)


def metric_cases(now: Mapping[str, float], then: Mapping[str, float], drop: float) -> Iterator[Case]:
    """Yield whether each recorded task metric is still reached; higher is better."""
    for name, base in then.items():
        if name not in now:
            yield Case("metric", name, "not judged", "the data have no labels")
            continue
        lost = base - now[name]
        detail = f"{now[name]:.5g}, recorded {base:.5g}: drop {lost:.4g}, at most {drop:g} allowed"
        holds = lost <= drop + 1e-12 or (math.isnan(base) and math.isnan(now[name]))
        passing = "" if holds or not math.isfinite(lost) else f"--metric-drop {round_up(lost):g} would pass."
        yield Case("metric", name, "holds" if holds else "broken", detail, passing)


def cost_cases(now: CostReport, then: CostReport) -> Iterator[Case]:
    """Yield whether the model costs no more than recorded, by the cost model of today."""
    recorded = asdict(then)
    for name, value in asdict(now).items():
        base = recorded[name]
        detail = f"{value:.6g}, recorded {base:.6g}" + (f" ({value / base - 1:+.2%})" if base and value != base else "")
        yield Case("cost", name, "broken" if value > base * (1 + 1e-9) else "holds", detail)


def source_cases(now: Comparison, then: Comparison, drift: Tolerance | None) -> Iterator[Case]:
    """Yield whether each output is as near to the source's as recorded.

    By the triangle inequality no further than recorded plus what it may itself be from the recorded output.
    """
    recorded = {output.name: output for output in then.outputs}
    for output in now.outputs:
        if output.name in recorded:
            yield _source_case(output, recorded[output.name], drift)


def _source_case(now: OutputComparison, then: OutputComparison, drift: Tolerance | None) -> Case:
    if now.problem != then.problem:
        return Case("source", now.name, "broken", now.problem or "it was broken when it was recorded")
    if not is_inexact(now.dtype):
        agree, base = now.argmax or 0.0, then.argmax or 0.0
        least = base if drift is None or drift.argmax is None else base - (1 - drift.argmax)
        detail = f"{agree:.4%} equal to the source's, recorded {base:.4%}"
        return Case("source", now.name, "holds" if agree >= least else "broken", detail)
    if now.mismatches > then.mismatches:
        return Case("source", now.name, "broken", f"{now.mismatches} NaN or infinite on one side only")
    limit = then.relative_l2 + allowed(now.dtype, drift)
    detail = f"relative L2 {now.relative_l2:.4g} to the source's, recorded {then.relative_l2:.4g}"
    if now.relative_l2 <= limit:
        return Case("source", now.name, "holds", detail)
    needed = round_up(now.relative_l2 - then.relative_l2)
    passing = f"--relative-l2 {needed:g} would pass." if math.isfinite(needed) else ""
    return Case("source", now.name, "broken", f"{detail}, at most {limit:.4g} allowed", passing)
