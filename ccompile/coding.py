"""What all passes share that keep a layer's shape and let its weight take few values: where, how strong, and the fit.

The structure is a set of values (shared levels, an integer grid, zeros), the metric that of every fit: with the
calibration inputs' centred Gram matrix H and the least-squares weight W* towards the outputs of the graph before the
step, E|Y - What X - b|^2 = least + tr((What - W*) H (What - W*)^T), the mean in the bias. Layers are fitted in
topological order on the inputs that the graph so far makes. Weights that are zero may be held at zero: then W* is
first projected on the others, which leaves the loss of every such What as it was but for a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile import cropping, decoding, fitting, graph, impacts, opsets, storage
from ccompile.analysis import linear
from ccompile.core import Array, Budget, Choice, Site, Skip, View
from ccompile.decoding import Form, Means, Sliced
from ccompile.errors import PassError
from ccompile.fitting import Goal, Metric
from ccompile.forms import Grid
from ccompile.layerwise import Data, Layerwise, spared
from ccompile.moments import Layer
from ccompile.numerics import allocation, codebooks
from ccompile.numerics.codebooks import Scope
from ccompile.numerics.levels import Scaled

PROBES = 3  # strengths at which a layer's impact on the outputs is measured
FEWEST = 64  # weights of a layer below which no form of fewer bytes is thought of


@dataclass(frozen=True, eq=False)
class Pattern:
    """A weight as pattern[codes[g, o, d]] * scale[g, o, blocks], or scale[1, 1, 1]."""

    codes: Array
    pattern: Array
    scale: Array


@dataclass(frozen=True, eq=False)
class Fitted:
    """A weight What[g, o, d] of the structure, its loss tr((What - W) H (What - W)^T) summed over groups, and a note.

    grid: the pattern and scales that it is the product of, where it is one.
    """

    weight: Array
    loss: float
    note: str = ""
    grid: Pattern | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What one layer's curve needs: its metrics by group, its form, the strengths, and where it is held at zero."""

    metrics: Sequence[Metric]
    form: Layer
    strengths: Sequence[float]
    held: Array | None


class Coding(Layerwise):
    """Options that all such passes share."""

    after: ClassVar[tuple[str, ...]] = ("fold-batchnorm", "prune-channels")
    ops: ClassVar[tuple[str, ...]] = ("Conv", "ConvTranspose", "Gemm", "MatMul")

    error: float | None = Field(None, gt=0, lt=1, description="share of a layer's output power that may be lost")
    # -------------------------------------------------------------------------------- what a structure is

    @property
    def budget(self) -> Budget | None:
        """Return the share of the source's cost to spend over all layers, if that says how strong."""
        raise NotImplementedError

    def strengths(self, form: Layer) -> list[float]:
        """Return the strengths that a curve of a layer tells, mildest first."""
        raise NotImplementedError

    def label(self, strength: float) -> str:
        """Return what a strength is, in words."""
        raise NotImplementedError

    def unfit(self, form: Layer) -> str:
        """Return why the layer cannot be coded, or nothing."""
        return ""

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return the weight of the structure that loses least of the metrics' W; held[g, o, d]: False stays zero.

        rough: it need not be the best, for curves and trials.
        """
        raise NotImplementedError

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return about how many bytes a weight takes at a strength; `zeros`: the share of it that is held at zero."""
        raise NotImplementedError

    def slices(self, form: Layer) -> Sliced:
        """Return the parts of a stored weight that have levels or scales of their own."""
        found = sliced(form, "tensor")
        assert isinstance(found, Sliced)
        return found

    def form_of(self, form: Layer, strength: float, plain: Array, means: Means) -> Form | None:
        """Return how a fitted weight, as stored, can be written that only the pass knows; None for no such way."""
        return None

    def feed(self, node: ir.Node, form: Layer) -> None:
        """Put what the structure wants of the inputs before a layer that is about to be coded; most want nothing."""

    @property
    def crops(self) -> bool:
        """Return whether outer taps of a kernel that are zero go."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Return whether weights that are zero stay so."""
        return False

    # -------------------------------------------------------------------------------- where

    def sites(self, view: View) -> list[Site | Skip]:
        """Return the layers whose weight may be coded, and why others are left alone."""
        found: list[Site | Skip] = []
        for node in view.graph:
            if node.op_type not in self.ops or node.domain not in ("", "ai.onnx"):
                continue
            form = linear.layer(node)
            if excluded := view.excluded(node):
                found.append(excluded)
            elif reason := form if isinstance(form, str) else self._refusal(node, form, view):
                found.append(Skip(str(node.name), reason))
            else:
                assert isinstance(form, Layer)
                found.append(Site((form.name,), input=form.input, output=form.output))
        return found

    def _refusal(self, node: ir.Node, form: Layer, view: View) -> str:
        value = node.inputs[form.weight]
        if (reason := graph.weight_refusal(value)) and not storage.is_lossless(value):
            return reason
        weight = graph.constant(value)
        if weight is None or weight.dtype.name not in ("float16", "float32", "float64"):
            return "its weight is not of a plain float type"
        if not graph.is_finite(weight):
            return "its weight is not finite"
        if weight.size < FEWEST:
            return f"{weight.size} weights are too few for a smaller form"
        if graph.opset(view.graph) < decoding.OLDEST:
            return f"codes need opset {decoding.OLDEST}, and the model has {graph.opset(view.graph)}"
        if self.statistics == "calibration" and (reason := fitting.refusal(node, form)):
            return f"{reason}: `statistics: weights` codes it"
        return self.unfit(form)

    # -------------------------------------------------------------------------------- what it loses and costs

    def prepare(self, sites: Sequence[Site], view: View) -> None:
        """Fit all sites at all strengths that may be asked for."""
        tasks = [self._task(self._form(view, site), view) for site in sites]
        for site, task, lost in zip(sites, tasks, view.map(self.shares_lost, tasks), strict=True):
            view.remember(("lost", self.pass_name(), site.nodes[0]), dict(zip(task.strengths, lost, strict=True)))

    def choices(self, site: Site, view: View) -> list[Choice]:
        """Return the layer as it is (strength 0), then strengths that store less; error is the share of power lost."""
        form = self._form(view, site)
        node = graph.node_named(view.graph, form.name)
        weight = graph.constant(node.inputs[form.weight])
        assert weight is not None
        task = self._task(form, view)
        losses = view.once(
            ("lost", self.pass_name(), form.name),
            lambda: dict(zip(task.strengths, view.map(self.shares_lost, [task])[0], strict=True)),
        )
        macs = view.costs.nodes(view.model)[form.name][0] if view.costs is not None else weight.size
        whole = storage.stored_bytes(node.inputs[form.weight])
        zeros = 0.0 if task.held is None else float(np.mean(~task.held))
        found = [Choice(0.0, 0.0, weight.size, macs, stored_bytes=float(whole))]
        for strength, error in losses.items():
            size = self.stored(form, strength, weight.itemsize, zeros)
            if size < found[-1].stored_bytes:
                found.append(Choice(strength, error, weight.size, macs, stored_bytes=size))
        return found

    def shares_lost(self, task: Task) -> list[float]:
        """Return the share of a layer's output power that each strength loses, or of its weight's without data."""
        power = sum(metric.power for metric in task.metrics)
        losses = [self.fit(task.metrics, task.form, strength, task.held, True).loss for strength in task.strengths]
        return [min(loss / power, 1.0) if power > 0 else 0.0 for loss in losses]

    def _task(self, form: Layer, view: View) -> Task:
        given = self.wanted(form.name)
        strengths = self.strengths(form) if given is None or self.on_violation == "weaken" else [given]
        if given is not None and given not in strengths:
            strengths = sorted({*strengths, given}, key=lambda strength: -self.stored(form, strength, 4, 0.0))
        return Task(self._metrics(view, form), form, strengths, self._held(view, form))

    def _held(self, view: View, form: Layer) -> Array | None:
        W = linear.matrix(graph.node_named(view.graph, form.name), form)
        return _free(W) if self.keeps_zeros else None

    # -------------------------------------------------------------------------------- how strong

    def pick(self, site: Site, choices: Sequence[Choice]) -> Choice | Skip:
        """Return the strength that is wanted, or the strongest that loses as little as `error` says."""
        name, rest = site.nodes[0], choices[1:]
        if (wanted := self.wanted(name)) is not None:
            same = [choice for choice in rest if choice.strength == wanted]
            return same[0] if same else Skip(name, f"{self.label(wanted)} would store no less")
        fits = [choice for choice in rest if choice.error <= (self.error or 0.0)]
        if not fits:
            reason = (
                f"{self.label(rest[0].strength)}, the mildest, loses {rest[0].error:.3g}"
                if rest
                else "no form is smaller"
            )
            return Skip(name, reason)
        return fits[-1]

    def plan(self, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        """Spend a budget over all layers, or pick layer by layer."""
        if self.budget is None or not curves:
            return super().plan(curves, view)
        assert view.costs is not None
        ((_, share),) = self.budget.given
        now = view.costs.report(view.model).stored_bytes - sum(choices[0].stored_bytes for _, choices in curves)
        allowed = [(site, self._allowed(site, choices)) for site, choices in curves]
        costs = [np.array([choice.stored_bytes for choice in choices]) for _, choices in allowed]
        limit = (
            share * view.costs.source.stored_bytes
            - now
            - self._reserve([site for site, _ in curves], "stored_bytes", view)
        )
        return self.spend(allowed, costs, limit, view)

    def spend(
        self, curves: Sequence[tuple[Site, Sequence[Choice]]], costs: Sequence[Array], limit: float, view: View
    ) -> list[Choice | Skip]:
        """Return the choice of each layer that together lose least and cost at most `limit`."""
        tables = [
            allocation.Curve(self.impacts(site, choices, view), cost)
            for (site, choices), cost in zip(curves, costs, strict=True)
        ]
        try:
            options = allocation.allocate(tables, limit)
        except ValueError as error:
            raise PassError(f"the budget cannot be met: {error}", hint="Raise it, or allow more layers.") from error
        chosen = [choices[option] for (_, choices), option in zip(curves, options, strict=True)]
        return [spared(site, choice) for (site, _), choice in zip(curves, chosen, strict=True)]

    def impacts(self, site: Site, choices: Sequence[Choice], view: View) -> Array:
        """Return what each choice does to the outputs, measured by coding this layer alone at some strengths."""
        errors = np.array([choice.error for choice in choices])
        if not self.sensitivity or view.stats is None:
            return errors
        form, points = self._form(view, site), {}
        lossy = [choice for choice in choices if choice.error > 0]
        for index in np.unique(np.linspace(0, len(lossy) - 1, PROBES).round().astype(int)) if lossy else ():
            choice = lossy[index]
            trial = graph.copy(view.model)
            fitted = self.fit(self._metrics(view, form), form, choice.strength, self._held(view, form), True)
            self._impose(trial, form, fitted.weight, view)
            points[choice.error] = view.stats.impact(trial, view.model)
        return impacts.interpolated(points, errors)

    # -------------------------------------------------------------------------------- the fit

    def apply_all(self, plan: Sequence[tuple[Site, Choice]], view: View) -> list[Site]:
        """Code layer by layer in topological order, each fitted to what the graph so far makes of the data."""
        if not plan:
            return []
        begin(view)
        found = self._walk(plan, lambda node, site, choice, data: self.code(node, site, choice, data, view), view)
        graph.remove_dead(view.graph)
        view.changed()
        return found

    def code(self, node: ir.Node, site: Site, choice: Choice, data: Data | None, view: View) -> Site:
        """Code one layer, fitted on a walk through the data that has come to it, or without data to its weight."""
        form = linear.layer(node)
        assert isinstance(form, Layer)
        self.feed(node, form)
        W = linear.matrix(node, form)
        held, bias = _free(W) if self.keeps_zeros else None, None
        if data is None:
            metrics = [Metric(group, None, float(np.square(group).sum())) for group in W]
            fitted = self.fit(metrics, form, choice.strength, held)
            note = f"{choice.error:.3g} of the weight's power lost"
        else:
            was, chain = data

            def fit(goal: Goal, rough: bool = False) -> Fitted:
                return self.fit(goal.metrics, form, choice.strength, held, rough)

            first = fitting.goal(node, was, chain, self.ridge, lambda goal: fit(goal, True).weight)
            fitted, goal = fitting.fitted(first, fit, lambda found: found.weight, was, chain)
            lost = fitting.lost(first.moments, fitted.weight, goal.bias(fitted.weight))
            bias = None if form.op == "MatMul" else goal.bias(fitted.weight)
            note = f"{lost:.3g} of the output's power lost, {choice.error:.3g} predicted"
        small = self._store(node, form, choice.strength, fitted, bias, _means(view))
        label = "; ".join(text for text in (f"{self.label(choice.strength)}, {note}", fitted.note, small.name) if text)
        return Site((form.name,), label, site.input, site.output)

    def _store(
        self, node: ir.Node, form: Layer, strength: float, fitted: Fitted, bias: Array | None, means: Means
    ) -> Form:
        """Give the node its weight in the smallest form, and its bias."""
        if "alpha" in node.attributes:
            node.attributes.pop("alpha")  # the fitted weight has it in it
        try:
            linear.store(node, form, fitted.weight, bias)
        except FloatingPointError as error:
            raise PassError(str(error), hint="Leave the layer alone with `skip`.") from error
        plain = graph.constant(node.inputs[form.weight])
        assert plain is not None
        if self.crops and cropping.crop(node):
            return _encoded(node, means)
        part = self.slices(form)
        grid = None if fitted.grid is None else _grid(form, fitted.grid, part, plain, means)
        more = [each for each in (grid, self.form_of(form, strength, plain, means)) if each is not None]
        small = storage.smallest(plain, means, [part], more)
        storage.replace_weight(node, form.weight, small, means)
        return small


def begin(view: View) -> None:
    """Raise the opset where that can be and the target has it: codes of 4 bits then need no unpacking."""
    if view.target.holds("uint4") and view.target.newest >= decoding.NATIVE:
        opsets.raise_to(view.model, decoding.NATIVE)


def _encoded(node: ir.Node, means: Means) -> Form:
    """Give a convolution whose shape has changed its weight in the smallest form."""
    weight = graph.constant(node.inputs[1])
    assert weight is not None
    small = storage.smallest(weight, means)
    storage.replace_weight(node, 1, small, means)
    return small


def _free(W: Array) -> Array | None:
    """Return where a weight is not zero; None where nothing is."""
    free = W != 0
    return None if free.all() else free


def _means(view: View) -> Means:
    return Means(graph.opset(view.graph), view.target.runs, view.target.holds("uint4"))


def scaled(parts: Sequence[Scaled], metrics: Sequence[Metric], form: Layer) -> Fitted:
    """Return what groups as patterns times scales make of a layer."""
    lost = codebooks.lost(parts, [metric.W for metric in metrics], [metric.H for metric in metrics])
    scale = parts[0].scale
    blocks = scale if scale.size == 1 else scale.reshape(form.groups, form.out, -1)
    grid = Pattern(
        np.stack([_codes(part) for part in parts]),
        parts[0].pattern,
        blocks.reshape(*(1,) * (3 - blocks.ndim), *blocks.shape),
    )
    return Fitted(np.stack([part.values for part in parts]), lost, grid=grid)


def _codes(part: Scaled) -> Array:
    """Return the codes, where an entry is held at zero that of the pattern's 0 (where it has none, no grid fits)."""
    return part.code if part.mask is None else np.where(part.mask, part.code, np.abs(part.pattern).argmin())


def sliced(form: Layer, scope: Scope, columns: int = 0) -> Sliced | str:
    """Return how a stored weight falls into parts of their own: rows, or blocks of columns; or why it does not."""
    rows, d = form.groups * form.out, form.columns
    if scope == "tensor":
        return Sliced(1, rows * d, 1)
    if form.op == "ConvTranspose":
        return "the weights of an output channel of a ConvTranspose do not lie together: `scope: tensor` codes it"
    size = d if scope == "channel" else columns
    if d % size:
        return f"its rows of {d} weights do not fall into groups of {size}"
    turned = not form.kernel and not form.wide
    return Sliced(d // size, size, rows) if turned else Sliced(rows * (d // size), size, 1)


def _grid(form: Layer, grid: Pattern, part: Sliced, plain: Array, means: Means) -> Grid | None:
    """Return codes[g, o, d] and scales[g, o, blocks] as the weight stores them; None unless every bit comes back."""
    codes = linear.arranged(form, grid.codes).reshape(part.shape)
    scale = (grid.scale[0].T if part.c > 1 else grid.scale).reshape(-1, 1, part.c).astype(plain.dtype)
    pattern = grid.pattern.astype(plain.dtype)
    same = np.array_equal((pattern[codes] * scale).reshape(plain.shape), plain)
    return Grid(codes, pattern, scale, plain.shape, means) if same else None
