"""Evidence and costs as tables: rich ones on a terminal, plain text elsewhere. Builds renderables; prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ccompile.cases import Case
from ccompile.cost import ModelCost, NodeCost
from ccompile.evidence import ComparisonRecord, CostRecord, Evidence, OutputRecord, StepRecord
from ccompile.inspection import Acts, Coupling, GroupFacts
from ccompile.profiling import Measured
from ccompile.tolerance import is_inexact

_STYLE = {
    "kept": "green",
    "weakened": "yellow",
    "reverted": "yellow",
    "failed": "bold red",
    "ok": "bold green",
    "holds": "green",
    "broken": "bold red",
    "not judged": "dim",
}
_GAP = 2  # between two columns
_TEXT = 24  # a column of longer texts may be folded down to this
_STEPS_DROP = ("est. time", "stored", "MACs", "vs previous", "params", "argmax")
_OPS_DROP = ("moved", "stored", "est. time", "params")
_GROUPS_DROP = ("through", "made by", "read by")
_SHOWN = 2  # nodes of a long list
_LAYERS_DROP = ("est. time", "stored", "params", "MACs")


@dataclass(frozen=True)
class _Adaptive:
    """Parts that depend on the width there is."""

    parts: Callable[[int], Iterable[RenderableType]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.parts(options.max_width)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], left: int = 1, drop: Sequence[str] = ()
) -> RenderableType:
    """Return a table whose first `left` columns are text and the rest numbers.

    Cells are plain text, never markup. Where the width does not hold all columns, those of `drop` go, in that order,
    and a line names them.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    return _Adaptive(lambda width: _fitted(list(columns), cells, left, drop, width))


def _cell(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _floors(columns: Sequence[str], rows: Sequence[Sequence[Text]], left: int) -> list[int]:
    """Return the width below which each column cannot be read: a number's own, a text's own or _TEXT."""
    widths = [max(cell_len(name), *(row[i].cell_len for row in rows), 0) for i, name in enumerate(columns)]
    return [min(width, _TEXT) if index < left else width for index, width in enumerate(widths)]


def _fitted(
    columns: list[str], rows: Sequence[Sequence[Text]], left: int, drop: Sequence[str], width: int
) -> Iterable[RenderableType]:
    floors = _floors(columns, rows, left)
    shown, dropped = list(range(len(columns))), []
    for name in drop:
        if sum(floors[i] + _GAP for i in shown) - _GAP <= width:
            break
        shown = [i for i in shown if columns[i] != name]
        dropped.append(name)
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for i in shown:
        fixed = i >= left or max((row[i].cell_len for row in rows), default=0) <= _TEXT
        made.add_column(
            Text(columns[i]),
            justify="left" if i < left else "right",
            overflow="fold",
            no_wrap=fixed,
            min_width=floors[i],
        )
    for row in rows:
        made.add_row(*(row[i] for i in shown))
    yield made
    if dropped:
        yield Text(f"left out at this width: {', '.join(dropped)}")


def count(value: float) -> str:
    """Return a count in four figures with its unit.

    >>> [count(n) for n in (950, 266_610, 15_470_264_320)]
    ['950', '266.6 k', '15.47 G']
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.4g}"


def size(value: float) -> str:
    """Return bytes in four figures with a decimal unit.

    >>> size(1_067_507)
    '1.068 MB'
    """
    return f"{count(value)}B" if value >= 1e3 else f"{value:.0f} B"


def duration(value: float) -> str:
    """Return seconds in three figures with a unit.

    >>> duration(0.00123)
    '1.23 ms'
    """
    for limit, unit, scale in ((1, "s", 1), (1e-3, "ms", 1e3), (0, "us", 1e6)):
        if value >= limit:
            return f"{value * scale:.3g} {unit}"
    return "0"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _moved(comparison: ComparisonRecord | None) -> tuple[str, str]:
    """Return the worst relative L2 and the least argmax agreement of a comparison.

    Integers that differ, which a limit on argmax may allow, count in the agreement only.
    """
    if comparison is None:
        return "-", "-"
    if any(_is_broken(output) for output in comparison.outputs):
        return "broken", "-"
    close = [output for output in comparison.outputs if not output.mismatches]
    errors = [output.relative_l2 if output.relative_l2 is not None else float("inf") for output in close]
    argmax = [output.argmax for output in comparison.outputs if output.argmax is not None]
    return f"{max(errors):.1e}" if errors else "-", f"{min(argmax):.2%}" if argmax else "-"


def _is_broken(output: OutputRecord) -> bool:
    return bool(output.problem) or (output.mismatches > 0 and is_inexact(output.dtype))


def _furthest(output: OutputRecord) -> str:
    """Return how far the worst element is, or what is worse than far."""
    if output.problem:
        return output.problem
    if output.mismatches:
        return f"{output.mismatches} {'broken' if is_inexact(output.dtype) else 'differ'}"
    return _shown(output.max_abs, ".3g")


def _costs(cost: CostRecord | None) -> tuple[str, ...]:
    if cost is None:
        return ("-",) * 4
    return count(cost.params), count(cost.macs), size(cost.stored_bytes), duration(cost.seconds)


def _verdict(text: str) -> Text:
    return Text(text, _STYLE[text])


def _row(step: StepRecord, names: Sequence[str]) -> tuple[str | Text, ...]:
    moved = (*_moved(step.against_previous)[:1], *_moved(step.against_source))
    metrics = tuple(_shown(step.metrics.get(name), ".4f") for name in names)
    sites = f"{len(step.applied)}/{len(step.applied) + len(step.skipped)}"
    return (f"{step.index} {step.name}", _verdict(step.verdict), sites, *moved, *metrics, *_costs(step.cost))


def evidence_table(evidence: Evidence) -> RenderableType:
    """Return what a compile shows: one row per step, then gates, notes and the verdict."""
    names = list(evidence.source_metrics)
    columns = ["step", "verdict", "sites", "vs previous", "vs source", "argmax", *names]
    columns += ["params", "MACs", "stored", "est. time"]
    metrics = tuple(_shown(value, ".4f") for value in evidence.source_metrics.values())
    first = ("source", "", "", "", "", "", *metrics, *_costs(evidence.source_cost))
    rows = [first, *(_row(step, names) for step in evidence.steps)]
    parts: list[RenderableType] = [table(columns, rows, left=3, drop=_STEPS_DROP)]
    if evidence.gates:
        gates = [(gate.name, _verdict("holds" if gate.holds else "broken"), gate.detail) for gate in evidence.gates]
        parts += [Text(), table(["gate", "verdict", "measured"], gates, left=3)]
    parts += [Text(), Text(_survey(evidence.survey))]
    if raced := evidence.timing.get("measured"):
        text = f"{raced['ratio']:.2f}x (quartiles {raced['low']:.2f} to {raced['high']:.2f}, {raced['rounds']} pairs)"
        parts.append(Text(f"measured speed-up on this machine: {text}"))
    parts += [Text()] + [Text(f"note: {note}") for note in evidence.notes]
    parts += [Text(f"note: {_undone(step)}") for step in evidence.steps if step.verdict in ("weakened", "reverted")]
    if (data := evidence.calibration) and (used := evidence.timing.get("statistics")):
        held = f"{used['layers']} layers, up to {used['rows']:,} rows each, {size(used['bytes'])} held at most"
        parts.append(Text(f"calibrated on {data.samples} samples: {data.source}; {held}"))
    data = evidence.verification
    parts.append(Text(f"verified on {data.samples} samples: {data.source}; target {evidence.target}"))
    return Group(*parts)


def _undone(step: StepRecord) -> str:
    """Say that a step was undone, or how far it went back, and what broke."""
    how = f"weakened, {step.weakened:.1%} of the way back to none" if step.weakened else "reverted"
    return f"step {step.index} {step.name} {how}: {' '.join(step.reason.split())}"


def _survey(survey: Mapping[str, float | None]) -> str:
    """Return the survey's metrics: compression rate a / a*, space saving 1 - a* / a, estimated speed-up s / s*."""
    names = {"params": "params", "macs": "MACs", "stored_bytes": "stored bytes"}
    rates = [f"{text} {_shown(survey[f'compression_rate.{name}'], '.3g')}x" for name, text in names.items()]
    savings = [f"{text} {_shown(survey[f'space_saving.{name}'], '.1%')}" for name, text in names.items()]
    speed = f"estimated speed-up: {_shown(survey['speed_up'], '.3g')}x"
    return f"compression rate: {', '.join(rates)}; space saving: {', '.join(savings)}; {speed}"


def verdict_lines(evidence: Evidence, output: str, record: str) -> list[str]:
    """Return the closing lines in plain text."""
    if evidence.verdict == "failed":
        return [*evidence.reason.splitlines(), f"Nothing was written but the evidence: {record}"]
    assert evidence.output is not None
    share = evidence.output.bytes / evidence.source.bytes if evidence.source.bytes else 1
    return [f"{output}: {size(evidence.output.bytes)}, {share:.1%} of the source's file; evidence in {record}"]


def evidence_summary(evidence: Evidence) -> str:
    """Return one line per Skip, for -v."""
    lines = []
    for step in evidence.steps:
        for site in step.applied:
            error = f", measured |dy|/|y| {site.relative_error:.3g}" if site.relative_error is not None else ""
            lines.append(f"step {step.index} {step.name}: {', '.join(site.nodes)}: {site.note}{error}")
        lines += [f"step {step.index} {step.name}: left alone {skip.node}: {skip.reason}" for skip in step.skipped]
    return "\n".join(lines)


def measured_table(measured: Measured, target: str) -> RenderableType:
    """Return the layers with their measured and estimated times, the slowest first, and how much is estimated well."""
    whole = max(sum(layer.seconds for layer in measured.layers), 1e-30)
    rows = [
        (
            ", ".join(layer.nodes) or "(made by the runtime)",
            duration(layer.seconds),
            f"{layer.seconds / whole:.1%}",
            duration(layer.estimate),
            f"{layer.estimate / layer.seconds:.2f}" if layer.seconds else "-",
        )
        for layer in sorted(measured.layers, key=lambda layer: -layer.seconds)
    ]
    total = (
        f"one inference: {duration(measured.seconds)} on {measured.threads or 'all'} threads; the layers: "
        f"{duration(whole)}, estimated {duration(sum(layer.estimate for layer in measured.layers))} on {target}; "
        f"{measured.near:.0%} of the time is in layers whose estimate is at most a fifth off"
    )
    columns = ("layer", "measured", "share", "estimated", "est. / meas.")
    return Group(table(columns, rows, left=1), Text(total))


def inspect_table(cost: ModelCost, acts: Sequence[Acts], target: str, said: Sequence[str] = ()) -> RenderableType:
    """Return the cost per op and per layer with the passes that could act, then the notes, `said` first."""
    report = cost.report
    whole = max(report.seconds, 1e-30)
    kinds: dict[str, list[float]] = {}
    for node in cost.nodes:
        row = kinds.setdefault(node.op, [0, 0, 0, 0, 0, 0])
        found = (1, node.params, node.macs, node.stored_bytes, node.moved_bytes, node.seconds)
        kinds[node.op] = [a + b for a, b in zip(row, found, strict=True)]
    per_op = [
        (op, f"{n:.0f}", count(params), count(macs), size(kept), size(moved), duration(s), f"{s / whole:.1%}")
        for op, (n, params, macs, kept, moved, s) in sorted(kinds.items(), key=lambda item: -item[1][5])
    ]
    could = {entry.node: entry for entry in acts}

    def per_layer(narrow: bool) -> list[tuple[str, ...]]:
        return [_layer(node, could.get(node.name), whole, narrow) for node in cost.nodes]

    def by_layer(width: int) -> Iterable[RenderableType]:
        wide = [[_cell(cell) for cell in row] for row in per_layer(narrow=False)]
        needed = sum(max((row[i].cell_len for row in wide), default=0) + _GAP for i in range(len(layers)))
        narrow = needed - _GAP > width
        yield table(layers, per_layer(narrow), left=3, drop=_LAYERS_DROP)
        if narrow:
            yield from _refusals(acts)

    total = (
        f"total: {report.params:,} params ({report.nonzero:,} nonzero), {report.macs:,} MACs, "
        f"{report.multiplications:,} multiplications, stored {size(report.stored_bytes)}, resident "
        f"{size(report.resident_bytes)}, moved {size(report.moved_bytes)}, peak activations "
        f"{size(report.peak_activation_bytes)} at `{cost.peak_node}`, estimated {duration(report.seconds)} on {target}"
    )
    columns = ["op", "nodes", "params", "MACs", "stored", "moved", "est. time", "share"]
    layers = ["layer", "op", "passes", "params", "MACs", "stored", "est. time", "share"]
    notes = [Text(f"note: {note}") for note in (*said, *cost.notes)]
    return Group(table(columns, per_op, drop=_OPS_DROP), Text(), _Adaptive(by_layer), Text(), Text(total), *notes)


def _layer(node: NodeCost, entry: Acts | None, whole: float, narrow: bool) -> tuple[str, ...]:
    costs = (count(node.params), count(node.macs), size(node.stored_bytes), duration(node.seconds))
    return (node.name, node.op, _acts(entry, narrow), *costs, f"{node.seconds / whole:.1%}")


def _acts(entry: Acts | None, narrow: bool) -> str:
    if entry is None:
        return ""
    refused = () if narrow else entry.refused
    return ", ".join([*entry.could, *(f"not {name}: {reason}" for name, reason in refused)])


def _refusals(acts: Sequence[Acts]) -> Iterable[RenderableType]:
    """Yield each reason once, with the layers it holds for."""
    layers: dict[tuple[str, str], list[str]] = {}
    for entry in acts:
        for refusal in entry.refused:
            layers.setdefault(refusal, []).append(entry.node)
    for (name, reason), nodes in layers.items():
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        yield Text(f"not {name}: {reason}: {', '.join(nodes[:3])}{more}")


def groups_table(found: Coupling) -> RenderableType:
    """Return one row per group of coupled channels, then the notes; long lists end in a count."""
    rows = [
        (g.name, _listed(g.producers), _listed(g.through), _listed(g.readers), _pins(g), str(g.units))
        for g in found.groups
    ]
    free = [group.units for group in found.groups if not group.pinned]
    columns = ["group", "made by", "through", "read by", "pinned by", "units"]
    shown = [table(columns, rows, left=5, drop=_GROUPS_DROP), Text()] if rows else []
    total = Text(f"groups: {len(rows)}, of them free: {len(free)}, with {sum(free):,} units")
    return Group(*shown, total, *(Text(f"note: {note}") for note in found.notes))


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are.

    >>> _listed(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    shown = names if len(names) <= _SHOWN + 1 else names[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")


def _pins(group: GroupFacts) -> str:
    """Return what pins a group: its first reason, with the node where that is not the group's name, and a count."""
    if not group.pinned:
        return ""
    node, reason = group.pinned[0]
    more = f" and {len(group.pinned) - 1} more" if len(group.pinned) > 1 else ""
    return (reason if node == group.name else f"{node}: {reason}") + more


def comparison_table(record: ComparisonRecord, source: str) -> RenderableType:
    """Return one row per output, and what it was compared on."""
    rows = [
        (
            output.name,
            output.dtype,
            count(output.elements),
            _furthest(output),
            _shown(output.relative_l2, ".3g"),
            _shown(output.sqnr_db, ".1f"),
            _shown(output.cosine, ".6f"),
            _shown(output.argmax, ".2%"),
            _shown(output.kl, ".3g"),
        )
        for output in record.outputs
    ]
    columns = ["output", "type", "elements", "max abs", "relative L2", "SQNR dB", "cosine", "argmax", "KL"]
    return Group(table(columns, rows, left=2), Text(f"on {record.samples} samples: {source}"))


def cases_table(cases: Sequence[Case]) -> RenderableType:
    """Return one row per thing that was judged."""
    rows = [(f"{case.group} {case.name}", _verdict(case.verdict), case.detail) for case in cases]
    return table(["judged", "verdict", "found"], rows, left=3)
