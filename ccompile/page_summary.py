"""What the page says at a glance: the verdict, what was gained, what was lost, and each gate and pass in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ccompile import report
from ccompile.evidence import CostRecord, Evidence, GateRecord, OutputRecord, StepRecord
from ccompile.page_data import skips_by_reason
from ccompile.report import count, size

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def duration(value: float) -> str:
    """Return seconds in three figures with a unit."""
    return report.duration(value).replace(" us", " \N{MICRO SIGN}s")


_COSTS = (
    ("stored_bytes", "Weights stored", size),
    ("params", "Parameters", count),
    ("nonzero", "Weights not zero", count),
    ("macs", "Multiply-adds", count),
    ("seconds", "Estimated time", duration),
    ("peak_activation_bytes", "Peak activations", size),
)
_TELLING = 0.05
_SAME = 0.0005  # shares of the source that read as 0.0 %


@dataclass(frozen=True)
class Tile:
    """One fact: a large number, what it is made of, and the share of the source that is left, where it is one."""

    label: str
    big: str
    small: str
    tone: str = ""  # good, warn, bad or nothing
    share: float | None = None


@dataclass(frozen=True)
class Cell:
    """A number in the table of passes; `share` of the source's for a bar."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """A pass in the table of passes."""

    step: StepRecord
    options: str
    cells: tuple[Cell, ...]
    reason: str
    skips: list[tuple[str, list[str]]]


def change(share: float) -> str:
    """Return what became of the source's, in percent.

    >>> change(1.5)
    '+50.0 %'
    """
    if abs(share - 1) < _SAME:
        return "±0 %"
    return f"{MINUS if share < 1 else '+'}{abs(share - 1):.1%}".replace("%", " %")


def _tone(share: float) -> str:
    return "" if abs(share - 1) < _SAME else "good" if share < 1 else "warn"


def _final(evidence: Evidence) -> CostRecord:
    """Return what the last graph that stood costs."""
    kept = [step.cost for step in evidence.steps if step.verdict in ("kept", "weakened") and step.cost is not None]
    return kept[-1] if kept else evidence.source_cost


def gains(evidence: Evidence) -> list[Tile]:
    """Return what a compile saves."""
    found = []
    if evidence.output is not None and evidence.source.bytes:
        share = evidence.output.bytes / evidence.source.bytes
        found.append(
            Tile("File", change(share), _pair(evidence.source.bytes, evidence.output.bytes, size), _tone(share), share)
        )
    before, after = evidence.source_cost, _final(evidence)
    for name, label, form in _COSTS:
        was, now = float(getattr(before, name)), float(getattr(after, name))
        share = now / was if was else 1.0
        if name == "nonzero" and abs(share - after.params / max(before.params, 1)) < _TELLING:
            continue  # says what the parameters say
        found.append(Tile(label, change(share), _pair(was, now, form), _tone(share), share))
    if raced := evidence.timing.get("measured"):
        between = f"quartiles {raced['low']:.2f} to {raced['high']:.2f}, {raced['rounds']} pairs"
        tone = "good" if raced["low"] > 1 else "warn" if raced["high"] < 1 else ""
        found.append(Tile("Measured speed-up", f"{raced['ratio']:.2f}x", between, tone))
    return found


def _pair(was: float, now: float, form: object) -> str:
    assert callable(form)
    return f"{form(was)} → {form(now)}"


def losses(evidence: Evidence) -> list[Tile]:
    """Return what a compile costs in accuracy: its metrics, then how far outputs moved."""
    found = []
    kept = [step for step in evidence.steps if step.verdict in ("kept", "weakened")]
    now: Mapping[str, float | None] = kept[-1].metrics if kept else evidence.source_metrics
    for name, was in evidence.source_metrics.items():
        found.append(_metric(name, was, now.get(name)))
    compared = evidence.final or (kept[-1].against_source if kept else None)
    outputs = () if compared is None else compared.outputs
    if agreed := [output.argmax for output in outputs if output.argmax is not None]:
        found.append(
            Tile("Same class as the source", f"{min(agreed):.2%}".replace("%", " %"), _among(outputs, "argmax"))
        )
    if errors := [output.relative_l2 for output in outputs if output.relative_l2 is not None]:
        found.append(Tile("Output moved", number(max(errors)), f"relative L2{_among(outputs, '')}"))
    if broken := [output for output in outputs if output.problem]:
        found.append(Tile("Outputs broken", str(len(broken)), broken[0].problem, "bad"))
    return found


def _among(outputs: Sequence[OutputRecord], what: str) -> str:
    said = f"worst of {len(outputs)} outputs" if len(outputs) > 1 else f"output {outputs[0].name}"
    return f"{what}, {said}" if what or not outputs else f", {said}"


def _metric(name: str, was: float | None, now: float | None) -> Tile:
    if was is None or now is None:
        return Tile(name, NONE, "not measured")
    drop = now - was
    tone = "good" if drop >= -1e-12 else "warn"
    return Tile(
        name, f"{now:.4f}", f"{was:.4f} before, {'+' if drop > 0 else MINUS if drop < 0 else '±'}{abs(drop):.4f}", tone
    )


def number(value: float | None) -> str:
    """Return a number in three figures, a dash for none.

    >>> [number(value) for value in (0.0, 0.01234, 1.5e-7)]
    ['0', '0.0123', '1.5e-07']
    """
    return NONE if value is None else f"{value:.3g}"


def headline(evidence: Evidence) -> str:
    """Return the verdict's counts in one line."""
    held = sum(gate.holds for gate in evidence.gates)
    gates = f"{held} of {_some(len(evidence.gates), 'gate')} held" if evidence.gates else "no gates asked for"
    verdicts = [step.verdict for step in evidence.steps]
    parts = [
        f"{verdicts.count(kind)} {kind}" for kind in ("kept", "weakened", "reverted", "failed") if kind in verdicts
    ]
    return f"{gates} · {_some(len(verdicts), 'pass', 'es')}{': ' if parts else ''}{', '.join(parts)}"


def _some(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{'' if n == 1 else plural}"


def margin(gate: GateRecord) -> float | None:
    """Return how much of a limit from above is used up; None for limits from below."""
    below = gate.name in ("argmax", "cosine") or gate.name.endswith(".min")
    if gate.value is None or below or gate.limit <= 0:
        return None
    return max(0.0, gate.value / gate.limit)


# ---------------------------------------------------------------------------------------------- passes

COST_COLUMNS = (
    ("params", "params", count),
    ("macs", "MACs", count),
    ("stored_bytes", "stored", size),
    ("seconds", "est. time", duration),
)


def columns(evidence: Evidence) -> list[str]:
    """Return the heads of the numbers in the table of passes."""
    return [*evidence.source_metrics, "vs previous", "vs source", "argmax", *(label for _, label, _ in COST_COLUMNS)]


def source_cells(evidence: Evidence) -> list[Cell]:
    """Return the source's numbers."""
    metrics = [Cell(NONE if value is None else f"{value:.4f}") for value in evidence.source_metrics.values()]
    return [*metrics, Cell(""), Cell(""), Cell(""), *_cost_cells(evidence.source_cost, evidence.source_cost)]


def rows(evidence: Evidence) -> Iterable[Row]:
    """Yield one row per pass."""
    for step in evidence.steps:
        metrics = [step.metrics.get(name) for name in evidence.source_metrics]
        cells = [Cell(NONE if value is None else f"{value:.4f}") for value in metrics]
        cells += [
            Cell(text) for text in (_worst(step, "against_previous"), _worst(step, "against_source"), _agreed(step))
        ]
        cells += _cost_cells(step.cost, evidence.source_cost)
        how = f"{step.weakened:.0%} of the way back to none. " if step.weakened else ""
        yield Row(step, _options(step), tuple(cells), how + step.reason, skips_by_reason(step))


def _cost_cells(cost: CostRecord | None, source: CostRecord) -> list[Cell]:
    found = []
    for name, _, form in COST_COLUMNS:
        was = float(getattr(source, name))
        now = None if cost is None else float(getattr(cost, name))
        found.append(Cell(NONE) if now is None else Cell(form(now), now / was if was else None))
    return found


def _worst(step: StepRecord, against: str) -> str:
    compared = getattr(step, against)
    if compared is None:
        return NONE
    if any(output.problem for output in compared.outputs):
        return "broken"
    errors = [output.relative_l2 for output in compared.outputs if output.relative_l2 is not None]
    return f"{max(errors):.1e}" if errors else NONE


def _agreed(step: StepRecord) -> str:
    outputs = () if step.against_source is None else step.against_source.outputs
    agreed = [output.argmax for output in outputs if output.argmax is not None]
    return f"{min(agreed):.2%}".replace("%", " %") if agreed else NONE


def _options(step: StepRecord) -> str:
    """Return the options as a spec writes them, in one line."""
    if not step.options:
        return ""
    text = yaml.safe_dump(step.options, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.strip()[1:-1]
