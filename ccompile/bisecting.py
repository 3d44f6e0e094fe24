"""Which step, and which of its sites, breaks a contract or a limit.

Steps run in order, each verified as in a compile, so that every prefix is judged for the price of one compile. The
sites of the guilty step are bisected: prefixes of them, in the order of the plan, are carried out on the graph before
the step. Bisection ends at a prefix that breaks and holds without its last site, whether or not more sites are always
worse: that site tips it over. Only where it breaks alone as well is it alone to blame.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ccompile import contracts, graph
from ccompile.comparison import compare, rtol_of
from ccompile.core import Compression, Pass, Site
from ccompile.executor import executor
from ccompile.request import Request
from ccompile.running import Progress, Run
from ccompile.selectors import Selector
from ccompile.spec import Gates

_QUALITY = ("atol", "rtol", "relative_l2", "cosine", "argmax", "metric")


@dataclass(frozen=True)
class Guilt:
    """The site that tips a step over: its nodes, whether it breaks it alone, and how."""

    nodes: tuple[str, ...]
    alone: bool
    reason: str
    place: int  # among the sites of the step, from 1
    sites: int
    tried: int  # times that the step was carried out for it


@dataclass(frozen=True)
class Bisected:
    """What broke. `step` is 0 where nothing did, or where the source itself does, as `reason` then says."""

    step: int = 0
    name: str = ""
    reason: str = ""
    guilt: Guilt | None = None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Return whether everything held."""
        return not self.reason


def bisect(request: Request, limits: Gates | None, progress: Progress = lambda text, done, total: None) -> Bisected:
    """Find what breaks first: a step's own contract, or a limit on the result against the source.

    limits: of accuracy; None: those of the spec's gates. Writes nothing; raises CcompileError as a compile does.
    """
    spec = request.spec
    wanted = _quality(spec.gates if limits is None else limits)
    measured = spec.gates.model_copy(update={"metric": {**spec.gates.metric, **wanted.metric}})
    request = replace(request, spec=replace(spec, gates=measured))
    with executor(request.jobs) as executing:
        search = _Search(request, executing, progress=progress, limits=wanted)
        search.open()
        return search.find()


def _quality(gates: Gates) -> Gates:
    """Return the gates on accuracy alone."""
    return Gates(**{name: getattr(gates, name) for name in _QUALITY})


@dataclass(frozen=True)
class _Crossing:
    """Where the limits broke after they had held: the step's index, and the run's state before it."""

    index: int
    before: Any
    reason: str


@dataclass
class _Search(Run):
    """A search in progress."""

    limits: Gates = field(default_factory=Gates)

    def find(self) -> Bisected:
        """Run the steps; then look for the site."""
        if reason := self._left(self.state):
            return Bisected(reason=f"the source itself: {reason}")
        crossing: _Crossing | None = None
        healed: list[str] = []
        for index, step in enumerate(self.request.spec.passes):
            before = self.state
            self.step(index, step)
            if self.steps[-1].verdict == "failed":
                return self._blame(_Crossing(index, before, self.steps[-1].reason), self._breaks_contract, healed)
            reason = self._left(self.state)
            if reason and crossing is None:
                crossing = _Crossing(index, before, reason)
            elif not reason and crossing is not None:
                healed.append(f"step {crossing.index + 1} breaks it too, and step {index + 1} mends that")
                crossing = None
        if crossing is None:
            return Bisected(notes=tuple(healed))
        return self._blame(crossing, self._breaks_limits, healed)

    def _left(self, state: Any) -> str:
        """Return which limits a state leaves, or nothing."""
        final = compare(state.outputs, self.origin.outputs, self.samples, rtol_of(self.limits.tolerance))
        metrics = self.source_metrics, self.measure(state.outputs)
        costs = self.origin.cost.report, state.cost.report
        records = contracts.gate_records(self.limits, *costs, final, metrics, None)
        return "; ".join(f"{gate.name}: {gate.detail}" for gate in records if not gate.holds)

    def _breaks_contract(self, attempt: Any) -> str:
        return str(attempt.broken)

    def _breaks_limits(self, attempt: Any) -> str:
        return str(attempt.broken) or self._left(attempt.state)

    def _blame(self, crossing: _Crossing, breaks: Callable[[Any], str], notes: Sequence[str]) -> Bisected:
        """Look for the site of a step that is known to break."""
        self.state = crossing.before
        step = self.request.spec.passes[crossing.index]
        self.running = f"step {crossing.index + 1} {step.pass_name()}: which site", crossing.index + 1
        guilt = _search(_Trials(self, crossing.index, step), breaks)
        if guilt is None:
            notes = [*notes, "no site is to blame: carried out node by node, the step holds"]
        return Bisected(crossing.index + 1, step.pass_name(), crossing.reason, guilt, tuple(notes))


@dataclass
class _Trials:
    """One step carried out at some of its units: the sites of its plan, or the nodes that a rewrite may act on."""

    search: _Search
    index: int
    step: Pass
    tried: int = 0
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def whole(self) -> tuple[list[tuple[str, ...]], Any]:
        """Return the units in order, and what the whole step leads to."""
        if not isinstance(self.step, Compression):
            facts = [graph.facts(node) for node in self.search.state.model.graph]
            only = self.step.only
            wanted = [one for one in facts if only is None or any(selector.matches(one) for selector in only)]
            units: list[tuple[str, ...]] = [(str(one["name"]),) for one in wanted]
            return units, self.at(units)
        planned: dict[tuple[str, ...], None] = {}
        attempt = self._attempt(self.step, lambda site: planned.setdefault(site.nodes) is None)
        return list(planned), attempt

    def at(self, units: Sequence[tuple[str, ...]]) -> Any:
        """Return what the step leads to at these units."""
        if isinstance(self.step, Compression):
            allowed = set(units)
            return self._attempt(self.step, lambda site: site.nodes in allowed)
        only = tuple(Selector(name=glob.escape(name)) for (name,) in units)
        return self._attempt(self.step.model_copy(update={"only": only}), lambda site: True)

    def _attempt(self, step: Pass, keep: Callable[[Site], bool]) -> Any:
        self.tried += 1
        self.search.keep = keep
        ease = self.search.steps[self.index].weakened
        return self.search._attempt(self.index, step, ease, self._known)


def _search(trials: _Trials, breaks: Callable[[Any], str]) -> Guilt | None:
    """Return the unit that tips a step over: it breaks with those before it, and holds without it."""
    units, attempt = trials.whole()
    if not units or not breaks(attempt):
        return None
    holding, breaking = 0, len(units)
    while breaking - holding > 1:
        middle = (holding + breaking) // 2
        if breaks(tried := trials.at(units[:middle])):
            breaking, attempt = middle, tried
        else:
            holding = middle
    guilty = units[holding]
    alone = attempt if breaking == 1 else trials.at([guilty])
    reason = breaks(alone) if alone.result.applied else ""
    return Guilt(guilty, bool(reason), reason, breaking, len(units), trials.tried)
