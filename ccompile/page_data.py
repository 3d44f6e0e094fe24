"""What the page's tables and charts are drawn from: plain lists, each text once where that is easy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ccompile.evidence import CandidateRecord, Evidence, SiteRecord, SkipRecord, StepRecord
from ccompile.lineage import Piece, Shown, Stage, origins_of, stages_of
from ccompile.snapshots import LayerRecord, NodeRecord, WeightRecord

MEASURES = ("params", "macs", "stored_bytes", "seconds")
_SHARES = (("stored", "stored_bytes"), ("params", "params"), ("MACs", "macs"), ("est. time", "seconds"))
Plain = dict[str, Any]


def page_data(evidence: Evidence) -> Plain:
    """Return the layers, the sites and the nodes around them."""
    stages = stages_of(evidence)
    nodes = _Nodes()
    return {
        "steps": [f"{step.index} {step.name}" for step in evidence.steps],
        "progress": _progress(evidence),
        "undone": [step.verdict not in ("kept", "weakened") for step in evidence.steps],
        "layers": _layers(evidence, stages),
        "sites": list(_sites(evidence, stages, nodes)),
        "nodes": nodes.rows,
    }


def _progress(evidence: Evidence) -> Plain:
    """Return cost (shares of the source), metrics, agreement and movement after each step; undone ones change none."""
    origin = evidence.source_cost
    cost, metrics = [origin], [evidence.source_metrics]
    agreed: list[float | None] = [1.0]
    moved: list[float | None] = [None]
    for step in evidence.steps:
        stands = step.verdict in ("kept", "weakened")
        cost.append(step.cost if stands and step.cost is not None else cost[-1])
        metrics.append(step.metrics if stands else metrics[-1])
        outputs = () if step.against_source is None else step.against_source.outputs
        found = [output.argmax for output in outputs if output.argmax is not None]
        agreed.append(min(found) if stands and found else agreed[-1])
        errors = [output.relative_l2 for output in outputs if output.relative_l2 is not None]
        moved.append(max(errors) if stands and errors else moved[-1])
    shares = [(label, [getattr(c, name) / (getattr(origin, name) or 1) for c in cost]) for label, name in _SHARES]
    measured = [(name, [values.get(name) for values in metrics]) for name in evidence.source_metrics]
    if any(share != 1.0 for share in agreed) or not measured:
        measured.append(("same class as the source", agreed))
    return {
        "labels": ["source", *(f"{step.index} {step.name}" for step in evidence.steps)],
        "cost": shares,
        "accuracy": measured,
        "moved": moved,
    }


class _Nodes:
    """The distinct nodes that drawings show, each once."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._known: dict[NodeRecord, int] = {}

    def ids(self, shown: Iterable[Shown]) -> list[list[int]]:
        """Return [number, touched] of each node."""
        return [[self._id(one.node), int(one.touched)] for one in shown]

    def _id(self, node: NodeRecord) -> int:
        if node not in self._known:
            self._known[node] = len(self.rows)
            self.rows.append([node.name, node.op, list(node.reads), list(node.makes), list(node.weights)])
        return self._known[node]


# ---------------------------------------------------------------------------------------------- layers


def _layers(evidence: Evidence, stages: Sequence[Stage]) -> list[Plain]:
    """Return one row per source layer with what came of it, then the layers that came of none."""
    origin = origins_of(evidence, stages)
    now: dict[str, list[LayerRecord]] = {}
    for layer in evidence.layers:
        now.setdefault(origin.get(layer.node, layer.node), []).append(layer)
    touched = _touched(evidence, origin)
    rows = []
    for layer in evidence.source_layers:
        heirs = now.pop(layer.node, [])
        rows.append(_row(layer.node, layer.op, [layer], heirs, touched.get(layer.node, [])))
    rows += [_row(name, heirs[-1].op, [], heirs, touched.get(name, [])) for name, heirs in now.items()]
    return rows


def _row(name: str, op: str, before: Sequence[LayerRecord], after: Sequence[LayerRecord], steps: list[int]) -> Plain:
    drifts = [layer.drift for layer in after if layer.drift is not None]
    return {
        "name": name,
        "op": op,
        "now": [[layer.node, layer.op] for layer in after],
        "before": [sum(getattr(layer, what) for layer in before) for what in MEASURES],
        "after": [sum(getattr(layer, what) for layer in after) for what in MEASURES],
        "drift": drifts[-1] if drifts else None,
        "steps": steps,
    }


def _touched(evidence: Evidence, origin: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the steps that acted on each source layer or took it out."""
    found: dict[str, list[int]] = {}
    for number, step in enumerate(evidence.steps):
        if step.verdict not in ("kept", "weakened"):
            continue
        names = [name for site in step.applied for name in site.nodes]
        names += step.change.removed if step.change is not None else ()
        for name in dict.fromkeys(origin.get(name, name) for name in names):
            found.setdefault(name, []).append(number)
    return found


# ---------------------------------------------------------------------------------------------- sites


def _sites(evidence: Evidence, stages: Sequence[Stage], nodes: _Nodes) -> Iterable[Plain]:
    for number, step in enumerate(evidence.steps):
        for index, site in enumerate(step.applied):
            piece = stages[number].piece(index, site) if number < len(stages) else Piece()
            yield _applied(number, site, piece, nodes)
        yield from (_skipped(number, skip) for skip in step.skipped)


def _applied(step: int, site: SiteRecord, piece: Piece, nodes: _Nodes) -> Plain:
    return _row_of(step, site.nodes, site.note, site.candidates) | {
        "acted": True,
        "measured": site.relative_error,
        "bound": site.bound,
        "gain": site.measured,
        "weight": None if site.weight is None else _weight(site.weight),
        "graphs": [nodes.ids(piece.before), nodes.ids(piece.after)],
    }


def _skipped(step: int, skip: SkipRecord) -> Plain:
    return _row_of(step, (skip.node,), skip.reason, skip.candidates) | {"acted": False}


def _row_of(step: int, names: Sequence[str], note: str, candidates: Sequence[CandidateRecord]) -> Plain:
    chosen = next((one for one in candidates if one.chosen), None)
    most = max((one.cost for one in candidates), default=0.0)
    return {
        "step": step,
        "names": list(names),
        "note": note,
        "error": None if chosen is None else chosen.error,
        "impact": None if chosen is None else chosen.impact,
        "share": chosen.cost / most if chosen is not None and most else None,
        "unit": candidates[0].unit if candidates else "",
        "curve": [[one.technique, one.strength, one.error, one.impact, one.cost, one.chosen] for one in candidates],
    }


def _weight(weight: WeightRecord) -> Plain:
    return weight.model_dump(mode="json")


def skips_by_reason(step: StepRecord) -> list[tuple[str, list[str]]]:
    """Return each reason with the nodes left alone for it, the commonest first.

    >>> from types import SimpleNamespace as S
    >>> skips_by_reason(S(skipped=[S(node="a", reason="x"), S(node="b", reason="y"), S(node="c", reason="y")]))
    [('y', ['b', 'c']), ('x', ['a'])]
    """
    found: dict[str, list[str]] = {}
    for skip in step.skipped:
        found.setdefault(skip.reason, []).append(skip.node)
    return sorted(found.items(), key=lambda item: -len(item[1]))
