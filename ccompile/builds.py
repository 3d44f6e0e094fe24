"""Two builds side by side, from their evidence: what they were made of, accuracy, cost, gates, steps, choices."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ccompile.errors import SpecError, nearest
from ccompile.evidence import Evidence, GateRecord, SiteRecord, StepRecord

Kind = Literal["origin", "accuracy", "cost", "gates", "steps", "choices"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SHARES: tuple[Kind, ...] = ("accuracy", "cost")  # kinds of numbers, of which some change may be allowed
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Change:
    """One difference between two builds. `by`: how much worse, in the kind's unit; 0 where no number says so.

    The unit of accuracy is the metric's own, that of cost a share of the build before. `worse`: it counts for
    `fails`; choices that differ are neither better nor worse, and count.
    """

    kind: Kind
    what: str
    before: str
    after: str
    worse: bool
    by: float = 0.0


def changes(before: Evidence, after: Evidence) -> list[Change]:
    """Return what changed, kind by kind in the order of KINDS."""
    return [
        *_origin(before, after),
        *_accuracy(before, after),
        *_cost(before, after),
        *_gates(before, after),
        *_steps(before, after),
    ]


@dataclass(frozen=True)
class Limit:
    """A kind of change that fails, and by how much it may be worse."""

    kind: Kind
    allowed: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Return the limit that `cost`, `cost=0.02` or `accuracy=0.005` says. Raises SpecError."""
        name, equals, number = text.partition("=")
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None:
            raise SpecError(f"there is no kind of change `{name}`", "--fail-on", nearest(name, KINDS))
        try:
            allowed = float(number) if equals else 0.0
        except ValueError:
            allowed = math.nan
        if not 0 <= allowed < math.inf or (equals and kind not in _SHARES):
            hint = "Write `cost=0.02`, a share, or `accuracy=0.005`, in the metric's unit; other kinds take no number."
            raise SpecError(f"`{text}` is no limit", "--fail-on", hint)
        return cls(kind, allowed)

    def breaks(self, change: Change) -> bool:
        """Return whether a change is one that must not be."""
        return change.kind == self.kind and change.worse and (change.by > self.allowed or not self.allowed)


def failures(found: Iterable[Change], limits: Sequence[Limit]) -> list[Change]:
    """Return the changes that a limit does not allow."""
    return [change for change in found if any(limit.breaks(change) for limit in limits)]


def _origin(before: Evidence, after: Evidence) -> Iterator[Change]:
    def of(found: Evidence) -> dict[str, str]:
        plain = {
            "verdict": found.verdict,
            "source": f"{found.source.name} {found.source.digest[:12]}",
            "spec": f"{found.spec.name} {found.spec.digest[:12]}",
            "target": found.target,
            "seed": str(found.seed),
            "calibration": "none"
            if found.calibration is None
            else _data(found.calibration.source, found.calibration.digest),
            "verification": _data(found.verification.source, found.verification.digest),
        }
        return plain | {f"version of {name}": version for name, version in found.versions.items()}

    yield from _told("origin", of(before), of(after))


def _data(source: str, digest: str) -> str:
    return f"{source} {digest[:12]}"


def _told(kind: Kind, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    """Yield the texts that differ, by name; any difference counts."""
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name):
            yield Change(kind, name, old.get(name, "none"), new.get(name, "none"), worse=True)


def _accuracy(before: Evidence, after: Evidence) -> Iterator[Change]:
    old, new = _quality(before), _quality(after)
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            yield Change("accuracy", name, _shown(a), _shown(b), b is None, math.inf if b is None else 0.0)
            continue
        lost = b - a if name.startswith("relative L2") else a - b
        if abs(lost) > _ROUNDING * max(abs(a), abs(b), _ROUNDING):
            yield Change("accuracy", name, _shown(a), _shown(b), worse=lost > 0, by=max(lost, 0.0))


def _quality(found: Evidence) -> dict[str, float | None]:
    """Return the metrics of the result, and how far each output is from the source's."""
    plain: dict[str, float | None] = dict(found.result_metrics)
    for output in found.final.outputs if found.final is not None else ():
        plain[f"relative L2 of {output.name}"] = output.relative_l2
        if output.argmax is not None:
            plain[f"argmax of {output.name}"] = output.argmax
    return plain


def _cost(before: Evidence, after: Evidence) -> Iterator[Change]:
    old, new = _price(before), _price(after)
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            yield Change("cost", name, _shown(a), _shown(b), worse=False)
        elif abs(b - a) > _ROUNDING * max(a, b):
            by = b / a - 1 if a else math.inf
            yield Change("cost", name, _shown(a), f"{_shown(b)} ({by:+.2%})", worse=b > a, by=max(by, 0.0))


def _price(found: Evidence) -> dict[str, float]:
    plain: dict[str, float] = dict(found.result_cost.model_dump())
    if found.output is not None:
        plain["bytes of the file"] = found.output.bytes
    return plain


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _gates(before: Evidence, after: Evidence) -> Iterator[Change]:
    old, new = ({gate.name: gate for gate in found.gates} for found in (before, after))
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if a is None or b is None or (a.holds, a.limit) != (b.holds, b.limit):
            moved = a is not None and b is not None and a.limit != b.limit
            worse = moved or b is None or (not b.holds and (a is None or a.holds))
            yield Change("gates", name, _gate(a), _gate(b), worse)


def _gate(gate: GateRecord | None) -> str:
    return "none" if gate is None else f"{'holds' if gate.holds else 'broken'}: {gate.detail}"


def _steps(before: Evidence, after: Evidence) -> Iterator[Change]:
    old, new = _numbered(before.steps), _numbered(after.steps)
    yield from _told("steps", _told_steps(old), _told_steps(new))
    for name in [name for name in new if name in old]:
        yield from _told("choices", _sites(name, old[name]), _sites(name, new[name]))


def _numbered(steps: Sequence[StepRecord]) -> dict[str, StepRecord]:
    """Return steps by name; the second of a name is `name #2`."""
    seen: Counter[str] = Counter()
    found = {}
    for step in steps:
        seen[step.name] += 1
        found[step.name if seen[step.name] == 1 else f"{step.name} #{seen[step.name]}"] = step
    return found


def _told_steps(steps: Mapping[str, StepRecord]) -> dict[str, str]:
    return {name: f"{step.verdict}, {json.dumps(step.options, sort_keys=True)}" for name, step in steps.items()}


def _sites(name: str, step: StepRecord) -> dict[str, str]:
    """Return what was done at each site of a step, and why not elsewhere."""
    undone = " (reverted)" if step.verdict == "reverted" else ""
    applied = {f"{name} {', '.join(site.nodes)}": _choice(site) + undone for site in step.applied}
    return applied | {f"{name} {skip.node}": f"left alone: {skip.reason}" for skip in step.skipped}


def _choice(site: SiteRecord) -> str:
    chosen = next((weighed for weighed in site.candidates if weighed.chosen), None)
    technique = f" [{chosen.technique} {chosen.strength:g}]" if chosen is not None else ""
    return (site.note or "done") + technique
