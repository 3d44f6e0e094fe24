"""The vocabulary: what a pass promises, where it acts, what was measured. No ONNX Runtime, no files, no printing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile.declaration import Declaration
from ccompile.errors import PassError
from ccompile.executor import Executor, InProcess
from ccompile.moments import ChannelMoments, Layer, Moments, Spread
from ccompile.selectors import Facts, SelectorOption
from ccompile.tolerance import Comparison, Tolerance

Array = npt.NDArray[Any]
Kind = Literal["exact", "bounded", "lossy"]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """What was weighed at a site: a technique at a strength, what it loses there and of the outputs, and its cost.

    `error` is the share of the site's power lost, `impact` what that does to the outputs, where that was measured, and
    `cost` is in `unit`, a measure of CostReport.
    """

    technique: str
    strength: float
    error: float
    impact: float | None
    cost: float
    chosen: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Site:
    """A place where a pass acts or acted.

    `nodes` are node names. `input` and `output` name the values around it, so that the driver can measure the local
    error |dy| / |x| on real inputs and hold it against `bound`. `candidates`: what was weighed, cheapest first.
    """

    nodes: tuple[str, ...]
    note: str = ""
    input: str = ""
    output: str = ""
    bound: float | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Skip:
    """A node that a pass left alone, and why; `candidates`: what was weighed, cheapest first."""

    node: str
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One strength at one site: its predicted error (the share of the output's or weight's power lost) and its cost.

    `seconds` are the target's estimate, and `stored_bytes` those of the weight in the file; 0 where not asked for.
    """

    strength: float
    error: float
    params: int
    macs: int
    seconds: float = 0.0
    stored_bytes: float = 0.0


@dataclass(frozen=True)
class PassResult:
    """What a pass did and what it left alone."""

    applied: tuple[Site, ...] = ()
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class CostReport:
    """What a model costs; see cost.py for the conventions. Bytes, counts and seconds per inference."""

    params: int
    nonzero: int
    macs: int
    multiplications: int
    stored_bytes: int
    resident_bytes: int
    moved_bytes: int
    peak_activation_bytes: int
    seconds: float


class Machine(Protocol):
    """The face of a target that passes see."""

    @property
    def name(self) -> str:
        """Return the target's name."""
        ...

    def runs(self, op_type: str, domain: str = "") -> bool:
        """Return whether the target has this op."""
        ...

    @property
    def newest(self) -> int:
        """Return the newest opset that the target takes."""
        ...

    def holds(self, dtype: str) -> bool:
        """Return whether the target has this element type."""
        ...

    def align(self, channels: int) -> int:
        """Return the number of channels that the target really computes for `channels`."""
        ...


class Chain(Protocol):
    """A walk through the source and a graph under work, layer by layer in topological order."""

    def moments(self, layer: Layer, target: Layer | None = None, kept: Array | None = None) -> Moments:
        """Return the layer's current inputs' moments with the source's outputs as targets.

        Raises PassError when the source has no value to fit to.
        """
        ...

    def visible(
        self, known: Moments, fit: tuple[Array, Array], target: Layer | None = None, kept: Array | None = None
    ) -> Moments | None:
        """Return the moments of the layer asked for last, with targets as the activation behind it sees them.

        fit: W[g, o, d], b[g, o] so far. None where the activation, if any, shows all.
        """
        ...

    def channels(self, node: str, value: str, target: str) -> ChannelMoments:
        """Return the moments per channel of what a node reads now, with the source's `target` as target."""
        ...


class Statistics(Protocol):
    """What passes may learn from the calibration set."""

    def moments(self, model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, Moments]:
        """Return the moments of layers of one graph, by node name, its own outputs as targets."""
        ...

    def chain(self, model: ir.Model, reference: ir.Model | None = None, spare: bool = False) -> Chain:
        """Return a walk through the source, or another reference, and `model`.

        spare: leave out the batches that `held_out` uses.
        """
        ...

    def impact(self, model: ir.Model, base: ir.Model | None = None) -> float:
        """Return how far a graph's outputs are from the source's on the calibration set.

        base: a graph that `model` is a changed copy of, so that their common beginning need not run again.
        """
        ...

    def spreads(self, model: ir.Model, axes: Mapping[str, int | None]) -> Mapping[str, Spread]:
        """Return how the named values of one graph are distributed, with their means along an axis each, if any."""
        ...

    def maps(self, model: ir.Model, values: Sequence[str], elements: int) -> Mapping[str, Array]:
        """Return maps [m, ...] drawn from the named values [n, c, ...] of one graph, of about so many elements each."""
        ...

    def held_out(self, model: ir.Model, base: ir.Model) -> Comparison:
        """Return the outputs of a graph against those of another, on the batches that no other statistic has seen."""
        ...


class Costs(Protocol):
    """What passes may learn about cost on the target; shares in a spec are of `source`."""

    @property
    def source(self) -> CostReport:
        """Return the source model's cost."""
        ...

    def report(self, model: ir.Model) -> CostReport:
        """Return a graph's cost."""
        ...

    def nodes(self, model: ir.Model) -> Mapping[str, tuple[int, float]]:
        """Return (MACs, estimated seconds) of each top-level node, by name."""
        ...

    def coding(self, model: ir.Model, values: Iterable[str]) -> Mapping[str, float]:
        """Return the estimated seconds of turning each value into codes of a byte, or back, in a node of its own."""
        ...

    def excerpt(self, model: ir.Model, nodes: Sequence[str]) -> ir.Model:
        """Return some nodes as a model of their own that computes on one sample; constants are shared."""
        ...

    def weigh(self, part: ir.Model) -> Mapping[str, float]:
        """Return the estimated seconds of each node of an excerpt, by name; infinite where a shape is not known."""
        ...

    def timed(self, model: ir.Model, parts: Sequence[ir.Model]) -> Sequence[float]:
        """Return the seconds that each excerpt of `model`, rewritten or not, takes on this machine, run in turns."""
        ...


@dataclass
class View:
    """All that a pass may reach: the graph to rewrite, the target, randomness, and questions about the graph.

    `evaluate` computes values that depend on constants only, with the runtime's own arithmetic. `stats` is None without
    calibration data; `costs` and `find`, which looks a pass up by name, are None where nothing is compiled (inspect).
    `tell` shows what of a long step is running. `decide(site, compute)` is compute(), kept in the evidence, or what an
    earlier compile that is repeated decided there: it is for what times decide.
    """

    model: ir.Model
    target: Machine
    rng: np.random.Generator
    options: Pass
    facts: Callable[[ir.Node], Facts]
    evaluate: Callable[[Sequence[ir.Value]], list[Array]]
    stats: Statistics | None = None
    costs: Costs | None = None
    executor: Executor = field(default_factory=InProcess)
    tell: Callable[[str], None] = lambda text: None
    find: Callable[[str], type[Pass]] | None = None
    decide: Callable[[str, Callable[[], str]], str] = lambda site, compute: compute()
    _answers: dict[Callable[..., Any], Any] = field(default_factory=dict)
    _results: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def graph(self) -> ir.Graph:
        """Return the model's main graph."""
        return self.model.graph

    def ask(self, analysis: Callable[[ir.Model], T]) -> T:
        """Return analysis(model), computed once until `changed` is called."""
        if analysis not in self._answers:
            self._answers[analysis] = analysis(self.model)
        answer: T = self._answers[analysis]
        return answer

    def changed(self) -> None:
        """Forget all answers: the graph is not what it was."""
        self._answers.clear()

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return compute(), computed once in this step for `key` whatever happens to the graph."""
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result

    def remember(self, key: Hashable, value: object) -> None:
        """Have `once` return `value` for `key` in this step."""
        self._results[key] = value

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return function(item) of each item, in order, wherever the executor runs it.

        `function` and items may go to another process: a function of ccompile.numerics, a partial of one, or a method
        of a pass; arrays or frozen dataclasses of them.
        """
        return self.executor.map(function, items)

    def calibration(self, hint: str = "Give `data.calibration`.") -> Statistics:
        """Return what the calibration set can tell; raises PassError, with the hint, where the spec gives none."""
        if self.stats is None:
            name = self.options.pass_name()
            raise PassError(f"{name} fits to calibration data, and the spec gives none", hint=hint)
        return self.stats

    def observe(self, layers: Iterable[Layer]) -> Mapping[str, Moments]:
        """Return the moments by name of all layers observed in this step, with these; each is observed once.

        They are those of the graph as it came in: ask before it changes. Raises PassError without calibration data.
        """
        none: dict[str, Moments] = {}
        known = self.once("moments", lambda: none)
        if missing := {layer.name: layer for layer in layers if layer.name not in known}:
            known.update(self.calibration().moments(self.model, list(missing.values())))
        return known

    def excluded(self, node: ir.Node) -> Skip | None:
        """Return a Skip when the step's `only` or `skip` keep the pass away from `node`."""
        facts = self.facts(node)
        if self.options.only is not None and not any(selector.matches(facts) for selector in self.options.only):
            return Skip(str(facts["name"]), "not named by `only`")
        for selector in self.options.skip:
            if selector.matches(facts):
                return Skip(str(facts["name"]), f"named by `skip`: {selector}")
        return None


class Pass(Declaration):
    """One technique: a frozen declaration whose fields are its options. Its name is its file's."""

    kind: ClassVar[Kind]
    after: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False

    only: tuple[SelectorOption, ...] | None = Field(
        None, min_length=1, description="act only on these nodes: globs on names, or {name, op, where}"
    )
    skip: tuple[SelectorOption, ...] = Field((), description="leave these nodes alone: globs, or {name, op, where}")
    tolerance: Tolerance | None = Field(None, description="how far outputs may move in this step")
    on_violation: Literal["fail", "revert", "weaken"] = Field(
        "fail", description="when the contract breaks: stop with exit 1, or undo the step and go on"
    )

    @classmethod
    def pass_name(cls) -> str:
        """Return the kebab-case name that specs use.

        >>> from ccompile.passes.fold_batchnorm import FoldBatchnorm
        >>> FoldBatchnorm.pass_name()
        'fold-batchnorm'
        """
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def members(self, find: Callable[[str], type[Pass]]) -> tuple[Pass, ...]:
        """Return the passes that the options name, ready; `find` looks one up by name.

        Raises ValueError, or what `find` raises, with what is wrong with them.
        """
        return ()

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain data."""
        return self.model_dump(mode="json", exclude_defaults=True)


Share = Annotated[float, Field(gt=0, le=1)]


class Budget(Declaration):
    """A share of the source model's cost that the result may have; exactly one."""

    macs: Share | None = Field(None, description="multiply-accumulates")
    params: Share | None = Field(None, description="parameters")
    stored_bytes: Share | None = Field(None, description="bytes in the file")
    seconds: Share | None = Field(None, description="estimated seconds on the target, in its channel multiples")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(self.given) != 1:
            raise ValueError("give exactly one of `macs`, `params`, `stored_bytes` and `seconds`")
        return self

    @property
    def given(self) -> list[tuple[str, float]]:
        """Return what is budgeted and its share."""
        return [(name, value) for name, value in self.model_dump().items() if value is not None]

    def eased(self, share: float) -> Budget:
        """Return the budget `share` of the way to the whole source.

        >>> Budget(macs=0.5).eased(0.5).macs
        0.75
        """
        return Budget(**{name: value + (1 - value) * share for name, value in self.given})


class Rewrite(Pass):
    """A clean-up or a lowering: it knows by itself where and how to act."""

    on_violation: Literal["fail", "revert"] = Field(
        "fail", description="when the contract breaks: stop with exit 1, or undo the step and go on"
    )

    def run(self, view: View) -> PassResult:
        """Rewrite view.graph in place."""
        raise NotImplementedError


class Compression(Pass):
    """A lossy technique: it says where it may act and what each strength loses; the driver picks."""

    on_violation: Literal["fail", "revert", "weaken"] = Field(
        "fail",
        description="when the contract breaks: stop with exit 1, undo the step and go on, or go back from the strength "
        "that was asked for until it holds",
    )

    def sites(self, view: View) -> list[Site | Skip]:
        """Return every place where the pass may act, and why not elsewhere, in topological order."""
        raise NotImplementedError

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Do for all sites at once, by `view.map`, what their `choices` would do one by one; by default nothing."""

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return the curve strength -> error, cost at `site`, mildest first, without changing the graph."""
        raise NotImplementedError

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return the choice that the options ask for, or why none is worth taking."""
        raise NotImplementedError

    def apply(self, site: Site, choice: Choice, view: View) -> Site:
        """Rewrite the site's nodes and return what now stands there, with its error bound."""
        raise NotImplementedError

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Return what to do at each site: by default `pick`, site by site; a pass with a budget decides jointly."""
        return [self.pick(site, choices) for site, choices in curves]

    def impacts(self, site: Site, choices: Sequence[Choice], view: View) -> Array:
        """Return what each choice does to the outputs, comparable between sites and passes; by default its error."""
        return np.array([choice.error for choice in choices])

    def eased(self, share: float) -> Self:
        """Return the step with budgets that are `share` of the way back to the source's cost; itself without one."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        eased = {name: value.eased(share) for name, value in values if isinstance(value, Budget)}
        return self.model_copy(update=eased) if eased else self

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Carry out a plan: by default `apply`, site by site in topological order."""
        return [self.apply(site, choice, view) for site, choice in plan]
